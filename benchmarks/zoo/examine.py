"""Prunes one network of the zoo, and says what came of it, as a line of JSON:

python -m benchmarks.zoo.examine keras/VGG16
"""

import json
import re
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import zoo
from prunax import calibration, structured, trees

SPARSITY = 0.5
TOLERANCE = 1e-5  # of the largest output
Record = dict[str, Any]


def examine(network: zoo.Network) -> Record:
    """Removes half of every group that may shrink, and by Wanda half of every layer.

    Returns:
        A flat record. `pruned` and `wanda` say "passed", or what was raised; `difference` is that of the smaller
        function from the whole one with the removed units at zero, relative to the largest output.
    """
    fn, params, args = network
    record: Record = {"parameters": sum(map(np.size, _floating(params)))}
    dense = jax.jit(fn)(params, *args)
    begin = time.process_time()
    try:
        record |= _prune(network, dense)
    except Exception as error:
        record["pruned"] = _reason(error)
    record["seconds"] = round(time.process_time() - begin, 2)
    begin = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            record |= _wanda(network)
        except Exception as error:
            record["wanda"] = _reason(error)
    said = [str(w.message) for w in caught]
    return record | {
        "whole": [text[:1500] for text in said if "left whole" in text],
        "wanda seconds": round(time.process_time() - begin, 2),
    }


def _prune(network: zoo.Network, dense: Any) -> Record:
    fn, params, args = network
    begin = time.process_time()
    shrunk = structured.prune_channels(fn, params, *args, sparsity=SPARSITY)
    record: Record = {"seconds to prune": round(time.process_time() - begin, 2)}
    output = shrunk.fn(shrunk.params, *args)
    # What does not merely go (a softmax over the units) is no part of what a zero can show.
    keep = {group: units for group, units in shrunk.keep.items() if group.preserved}
    record |= {
        "groups": len(shrunk.keep),
        "not preserved": len(shrunk.keep) - len(keep),
        "prunable": _share(params, shrunk.keep),
        "left": sum(map(np.size, _floating(shrunk.params))) / sum(map(np.size, _floating(params))),
        "finite": all(np.isfinite(x).all() for x in _floating((dense, output))),
    }
    if len(keep) < len(shrunk.keep):
        small = structured.shrink(params, keep)
        output = structured.shrink_function(fn, keep)(small, *args)
    whole = jax.jit(fn)(masked(params, keep), *args)
    return record | {
        "pruned": "passed",
        "difference": difference(output, whole),
        "change": difference(whole, dense),
    }


def masked(params: zoo.PyTree, keep: Mapping[structured.AxisGroup, np.ndarray]) -> zoo.PyTree:
    """Params of full size, with zeros wherever the units lie that are not kept."""
    leaves = dict(zip(trees.paths(params), jax.tree.leaves(params), strict=True))
    for group, units in keep.items():
        gone = np.setdiff1d(np.arange(group.size), units)
        for path, axis, position, _ in group.members:
            leaf = leaves[path] = np.array(leaves[path])
            leaf[_along(axis, position.indices(group.size)[gone])] = 0
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference of two trees of arrays, relative to the largest value of the second."""
    pairs = list(zip(_floating(ours), _floating(theirs), strict=True))
    if any(np.shape(a) != np.shape(b) for a, b in pairs):
        return float("inf")
    scale = max(float(np.abs(b).max()) for _, b in pairs if np.size(b))
    return max(float(np.abs(a - b).max()) for a, b in pairs if np.size(b)) / (scale or 1.0)


def _share(params: zoo.PyTree, groups: Iterable[structured.AxisGroup]) -> float:
    """The share of the parameters that go or stay with some unit of the groups."""
    touched = {
        path: np.zeros(np.shape(leaf), bool)
        for path, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True)
        if np.issubdtype(leaf.dtype, np.floating)
    }
    total = sum(x.size for x in touched.values())
    for group in groups:
        for path, axis, position, _ in group.members:
            touched[path][_along(axis, position.indices(group.size))] = True
    return float(sum(x.sum() for x in touched.values()) / total)


def _wanda(network: zoo.Network) -> Record:
    fn, params, args = network
    result = calibration.wanda(lambda p, batch: fn(p, *batch), params, [args], SPARSITY)
    masks = [np.asarray(mask) for mask in jax.tree.leaves(result.masks) if np.ndim(mask)]
    weights = sum(mask.size for mask in masks)
    zeros = 1 - sum(int(mask.sum()) for mask in masks) / weights
    output = jax.jit(fn)(result.params, *args)
    if abs(zeros - SPARSITY) > 0.05:
        raise AssertionError(f"{zeros:.1%} of the selected weights are zero")
    if not all(np.isfinite(x).all() for x in _floating(output)):
        raise AssertionError("the output is not finite")
    share = weights / sum(map(np.size, _floating(params)))
    return {"wanda": "passed", "calibrated": share, "zeros": zeros}


def _along(axis: int, indices: np.ndarray) -> Any:
    return (slice(None),) * axis + (indices.ravel(),)


def _floating(tree: Any) -> list[np.ndarray]:
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return [np.asarray(x) for x in leaves if np.issubdtype(x.dtype, np.floating)]


def _reason(error: Exception) -> str:
    text = re.sub(r"\S*/site-packages/", "", str(error).strip())  # without folders of this machine
    return f"{type(error).__name__}: {text[:1500]}"


def main() -> None:
    begin = time.process_time()
    limit = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    try:
        network = zoo.build(sys.argv[1])
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    record: Record = {"seconds to build": round(time.process_time() - begin, 2)}
    if limit:
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + limit, used + limit + 5))
    print(json.dumps(record | examine(network)))


if __name__ == "__main__":
    main()
