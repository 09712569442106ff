"""Masks and params in files: one safetensors file a tree, checked when read, never unpickled.

The tree itself is not in the file, only the paths, shapes and dtypes of its leaves. Reading takes a tree like the one
that was written, so that no stored text decides which classes are made.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunax import patterns, trees
from prunax.export._container import FormatError
from prunax.export._encoding import DTYPES
from prunax.export._store import ArrayReader, ArrayWriter, Stored, readable
from prunax.export._verify import verify_pattern

__all__ = ["load_masks", "load_params", "read_metadata", "save_masks", "save_params"]

PyTree = Any
Path = str | os.PathLike[str]


def save_masks(
    path: Path,
    masks: PyTree,
    *,
    pattern: patterns.Pattern | None = None,
    sparsity: float | None = None,
    overwrite: bool = False,
) -> None:
    """Write masks into a safetensors file, one bit a weight.

    Args:
        path: The file, ``masks.safetensors``. It appears whole or not at all.
        masks: A mask tree, True = kept: bool arrays, and scalars for leaves that are not prunable.
        pattern: The pattern they follow: written into the file's metadata, after a check that they do follow it.
        sparsity: The sparsity they were asked for: written into the metadata.
        overwrite: Whether a file that is there already may be replaced.

    Raises:
        FileExistsError: If the file is there already, unless `overwrite`.
        TypeError: If a mask is not boolean, naming the leaf.
        ValueError: If the masks do not follow the pattern, or two leaves have one path, naming the leaf.

    Examples:
        >>> import os, tempfile, jax.numpy as jnp, prunax
        >>> params = {"dense": {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.ones(2)}}
        >>> masks = prunax.compute_masks(params, 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "masks.safetensors")
        ...     prunax.export.save_masks(file, masks, sparsity=0.5)
        ...     prunax.export.load_masks(file, params)["dense"]["kernel"].tolist()
        [[False, False], [False, False], [True, True], [True, True]]
    """
    trees.check_masks("save_masks", masks, masks)
    if pattern is not None:
        verify_pattern(masks, pattern)
    metadata = {} if pattern is None else {"prunax.pattern": repr(pattern)}
    if sparsity is not None:
        metadata["prunax.sparsity"] = repr(float(sparsity))
    _save("save_masks", path, masks, kind="masks", metadata=metadata, overwrite=overwrite)


def load_masks(path: Path, like: PyTree) -> PyTree:
    """Read masks that `save_masks` wrote.

    Args:
        path: The file.
        like: The params that the masks are for, or a mask tree: arrays or `jax.ShapeDtypeStruct`. Masks get the
            sharding of its leaves, where those have one.

    Returns:
        A mask tree of the structure of `like`, True = kept.

    Raises:
        FormatError: If the file is damaged or holds something else. A `ValueError`.
        ValueError: If its paths or shapes are not those of `like`, naming the leaf.
        OSError: If the file cannot be read.

    Examples:
        >>> import os, tempfile, jax, jax.numpy as jnp, prunax
        >>> masks = {"kernel": jnp.array([[True, False]]), "bias": jnp.array(True)}
        >>> like = jax.eval_shape(lambda: {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "masks.safetensors")
        ...     prunax.export.save_masks(file, masks)
        ...     prunax.export.load_masks(file, like)["kernel"].tolist()
        [[True, False]]
    """
    with _open("load_masks", path, "masks") as reader:
        names, leaves, treedef = _named_leaves("load_masks", like)
        _check_names("load_masks", path, reader, names)
        for name, leaf in zip(names, leaves, strict=True):
            shape = reader.leaves[name].shape
            if shape not in ((), np.shape(leaf)):
                raise ValueError(
                    f"load_masks: the mask of {name!r} in {path} has shape {shape}, the leaf has {np.shape(leaf)}. "
                    f"Pass the params that the masks were made for."
                )
        return treedef.unflatten(
            _on_device(reader.read(name), leaf) for name, leaf in zip(names, leaves, strict=True)
        )


def save_params(path: Path, params: PyTree, *, overwrite: bool = False) -> None:
    """Write params into a safetensors file, pruned weights compressed away.

    A leaf is stored as one bit a weight (is it zero?) and the weights that are not, where that is smaller: from 4%
    zeros on for float32. At 50% the file has 0.53 times the size, at 90% 0.13 times. Whether a weight is zero is asked
    of its bits, so -0.0 and every NaN come back as they were; masks are not needed.

    Args:
        path: The file, ``params.safetensors``. It appears whole or not at all.
        params: Any pytree of arrays, of every dtype that JAX knows but those of random keys. Python numbers are stored
            too; other leaves (functions, texts) are left out.
        overwrite: Whether a file that is there already may be replaced.

    Raises:
        FileExistsError: If the file is there already, unless `overwrite`.
        TypeError: If a leaf is a typed random key, or its dtype is not one of numbers, naming it.
        ValueError: If two leaves have one path, or a leaf lies on devices of other processes.

    Examples:
        >>> import os, tempfile, jax.numpy as jnp, prunax
        >>> params = {"dense": {"kernel": jnp.zeros((100, 80)).at[0].set(2.0)}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "params.safetensors")
        ...     prunax.export.save_params(file, params)
        ...     print(os.path.getsize(file) < 2_000, prunax.export.load_params(file, params)["dense"]["kernel"][0, 0])
        True 2.0
    """
    _save("save_params", path, params, kind="params", metadata={}, overwrite=overwrite)


def load_params(path: Path, like: PyTree | None = None) -> PyTree:
    """Read params that `save_params` or ``prunax prune --compress`` wrote, bit for bit.

    Args:
        path: The file.
        like: A tree of the same structure: arrays or `jax.ShapeDtypeStruct`. Where its leaf is a NumPy array or a
            Python number, so is the result's; others become JAX arrays, with the sharding of the leaf where it has one.

    Returns:
        A tree of the structure of `like`. Without it a dict, path -> NumPy array.

    Raises:
        FormatError: If the file is damaged or holds something else. A `ValueError`.
        ValueError: If its paths, shapes or dtypes are not those of `like`, naming the leaf.
        OSError: If the file cannot be read.

    Examples:
        >>> import os, tempfile, jax.numpy as jnp, prunax
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "params.safetensors")
        ...     prunax.export.save_params(file, {"dense": [jnp.ones(2)]})
        ...     prunax.export.load_params(file)
        {'dense/0': array([1., 1.], dtype=float32)}
    """
    with _open("load_params", path, "params") as reader:
        if like is None:
            return {name: reader.read(name) for name in reader.leaves}
        names, leaves, treedef = _named_leaves("load_params", like)
        stored = [n for n, leaf in zip(names, leaves, strict=True) if _is_stored(leaf)]
        _check_names("load_params", path, reader, stored)
        for name, leaf in zip(names, leaves, strict=True):
            if _is_stored(leaf):
                _check_leaf(path, name, reader.leaves[name], leaf)
        return treedef.unflatten(
            _placed(reader.read(name), leaf) if _is_stored(leaf) else leaf
            for name, leaf in zip(names, leaves, strict=True)
        )


def read_metadata(path: Path) -> dict[str, str]:
    """Read what a file says about itself.

    Args:
        path: A file that prunax wrote, or any safetensors file.

    Returns:
        The texts of its header: ``prunax.version``, ``prunax.kind``, ``prunax.pattern``, ``prunax.sparsity`` where
        they are known, and those of other programs.

    Raises:
        FormatError: If the file is damaged. A `ValueError`.
        OSError: If the file cannot be read.

    Examples:
        >>> import os, tempfile, jax.numpy as jnp, prunax
        >>> masks = {"kernel": jnp.array([[True], [False]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "masks.safetensors")
        ...     prunax.export.save_masks(file, masks, pattern=prunax.patterns.NM(1, 2))
        ...     prunax.export.read_metadata(file)["prunax.pattern"]
        'NM(n=1, m=2, axis=-2)'
    """
    with ArrayReader(path) as reader:
        return readable(reader.metadata)


def _save(
    function: str,
    path: Path,
    tree: PyTree,
    *,
    kind: str,
    metadata: Mapping[str, str],
    overwrite: bool,
) -> None:
    names, leaves, _ = _named_leaves(function, tree)
    arrays = {n: leaf for n, leaf in zip(names, leaves, strict=True) if _is_stored(leaf)}
    for name, leaf in arrays.items():
        if jnp.issubdtype(getattr(leaf, "dtype", np.bool_), jax.dtypes.extended):
            raise TypeError(
                f"{function}: {name!r} is a typed random key. Store jax.random.key_data(key) instead."
            )
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"{function}: {name!r} lies partly on devices of other processes. Gather it first, or write an Orbax "
                f"checkpoint."
            )
    for name, leaf in arrays.items():
        if _dtype(leaf).name not in DTYPES:
            raise TypeError(
                f"{function}: {name!r} is {_dtype(leaf)}, which is no dtype of numbers that can be stored. Convert it, "
                f"or take it out of the tree."
            )
    kinds = {n: (np.shape(leaf), _dtype(leaf).name) for n, leaf in arrays.items()}
    with ArrayWriter(path, kinds, kind=kind, metadata=metadata, overwrite=overwrite) as writer:
        # Wide elements first: whoever maps the file into memory finds each tensor aligned.
        for name in sorted(arrays, key=lambda n: -_dtype(arrays[n]).itemsize):
            array = np.asarray(jax.device_get(arrays[name]))
            writer.add(name, array.astype(DTYPES[array.dtype.name], copy=False))  # little-endian


def _named_leaves(function: str, tree: PyTree) -> tuple[list[str], list[Any], Any]:
    names = trees.paths(tree)
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(
                f"{function}: two leaves have the path {name!r}. Rename one of them: a '/' in a name may be the cause."
            )
        seen.add(name)
    leaves, treedef = jax.tree.flatten(tree)
    return names, leaves, treedef


def _is_stored(leaf: Any) -> bool:
    return trees.is_array(leaf) or isinstance(leaf, bool | int | float | complex)


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype) if trees.is_array(leaf) else np.asarray(leaf).dtype


def _open(function: str, path: Path, kind: str) -> ArrayReader:
    reader = ArrayReader(path)
    if reader.kind == kind:
        return reader
    reader.__exit__()
    if reader.kind is None:
        raise FormatError(
            f"{function}: {path} is a safetensors file of another program. Read it with the safetensors package."
        )
    raise FormatError(
        f"{function}: {path} holds {reader.kind}. Read it with prunax.export.load_{reader.kind}."
    )


def _check_names(function: str, path: Path, reader: ArrayReader, names: list[str]) -> None:
    missing = [name for name in names if name not in reader.leaves]
    if missing:
        raise ValueError(
            f"{function}: {missing[0]!r} is not in {path}, which holds {', '.join(list(reader.leaves)[:8])}, ... "
            f"Pass a tree like the one that was saved."
        )
    known = set(names)
    extra = [name for name in reader.leaves if name not in known]
    if extra:
        raise ValueError(
            f"{function}: {path} holds {extra[0]!r}, which `like` lacks. Pass a tree like the one that was saved."
        )


def _check_leaf(path: Path, name: str, stored: Stored, leaf: Any) -> None:
    wanted = (_dtype(leaf).name, np.shape(leaf))
    if (stored.dtype, stored.shape) != wanted:
        raise ValueError(
            f"load_params: {name!r} in {path} is {stored.dtype} {stored.shape}, the leaf of `like` is {wanted[0]} "
            f"{wanted[1]}. Pass a tree like the one that was saved; cast afterwards."
        )
    on_device = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    if on_device and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise ValueError(
            f"load_params: {name!r} is {leaf.dtype}, which JAX would narrow. Enable jax_enable_x64, or give a NumPy "
            f"array for it in `like`."
        )


def _placed(array: np.ndarray, leaf: Any) -> Any:
    """Make of an array what its leaf is: a NumPy array, a Python number, or a JAX array."""
    if isinstance(leaf, np.ndarray | np.generic):
        return array
    return _on_device(array, leaf) if trees.is_array(leaf) else array.item()


def _on_device(array: np.ndarray, leaf: Any) -> jax.Array:
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and array.shape == leaf.shape:
        return jax.device_put(array, sharding)
    return jnp.asarray(array)
