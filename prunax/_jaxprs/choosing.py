"""Which leaves of a function's params are kernels: the jaxpr says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prunax._jaxprs import flattening

__all__ = ["Kernels", "kernels"]

PyTree = Any


@dataclass(frozen=True)
class Kernels:
    """A `where` of leaves that multiply activations. `prunax.kernels` makes one.

    Attributes:
        paths: The leaves' paths.
        left_out: ``(path, why)`` for each floating-point leaf of two or more axes that is none.
    """

    paths: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def __call__(self, path: str, leaf: Any) -> bool:
        """Whether a leaf is one of them."""
        return path in self.paths

    def __repr__(self) -> str:
        out = f"; left out: {', '.join(path for path, _ in self.left_out)}" if self.left_out else ""
        return f"<kernels: {', '.join(self.paths) or 'none'}{out}>"


def kernels(fn: Callable[..., Any], params: PyTree, *args: Any) -> Kernels:
    """Find the leaves that multiply activations in a product or convolution: what is worth pruning.

    Names do not matter: the function's jaxpr is read, and nothing is run. Position tables, class tokens, scales and
    moving averages are not among them, whatever they are called; nor are tables that are looked up in, even where they
    are the output's kernel too, kernels that are recomputed before their product (weight standardisation, weight or
    spectral norm), and leaves that no output needs.

    Args:
        fn: ``fn(params, *args)``, any JAX function.
        params: Pytree of arrays, the one whose leaves are to be pruned: paths are those in this tree.
        *args: Example inputs, arrays or `jax.ShapeDtypeStruct`.

    Returns:
        ``where(path, leaf) -> bool``, for every function of prunax that takes one. It prints the paths, compares equal
        to another of the same paths, and says why of the leaves it leaves out, in `left_out`.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"body": jnp.ones((4, 3)), "position": jnp.ones((5, 4)), "unused": jnp.ones((3, 3))}
        >>> where = prunax.kernels(lambda p, x: (x + p["position"]) @ p["body"], params, jnp.ones((5, 4)))
        >>> where
        <kernels: body; left out: position, unused>
        >>> prunax.compute_masks(params, 0.5, where=where)["position"].shape
        ()
    """
    program = flattening.trace(fn, params, *args)
    paths = program.selection.paths
    chosen = program.kernels
    why = {n: reason.text for n, reason in program.reasons.items()}
    left = [
        (path, why.get(n, f"{path!r} is looked up in"))
        for n, path in enumerate(paths)
        if n not in chosen
    ]
    return Kernels(tuple(paths[n] for n in chosen), tuple(left))
