"""What the options mean: patterns, layouts, and which tensors are pruned."""

import argparse
import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from prunax import _leaf_names, allocation, patterns
from prunax.cli.sources import Tensor, UsageError

__all__ = ["Layout"]

ALLOCATIONS = {
    "uniform": allocation.uniform,
    "global": allocation.global_ranking,
    "erdos-renyi": allocation.erdos_renyi,
    "lamp": allocation.lamp,
}
PATTERNS = "unstructured, N:M (2:4), fan-in, block:HxW (block:32x32), channel"


class Layout(NamedTuple):
    """Where the inputs and outputs of a weight are.

    Attributes:
        name: ``in-out`` or ``out-in``.
        reason: Why it was taken.
    """

    name: str
    reason: str

    @property
    def inputs(self) -> int:
        """The axis summed over. PyTorch's convolutions are (out, in, height, width), Flax's end in (in, out)."""
        return -2 if self.name == "in-out" else 1

    @property
    def outputs(self) -> int:
        """The axis of the output units."""
        return -1 if self.name == "in-out" else 0


def fraction(text: str) -> float:
    """Parse a sparsity."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1 (0.8 for 80%)")
    return value


def pattern(text: str) -> Callable[[Layout], patterns.Pattern]:
    """Parse a pattern into a function that makes it for a layout."""
    groups = re.fullmatch(r"(\d+):(\d+)", text)
    blocks = re.fullmatch(r"block:(\d+)x(\d+)", text)
    try:
        if groups:
            n, m = int(groups[1]), int(groups[2])
            patterns.NM(n, m)
            return lambda layout: patterns.NM(n, m, axis=layout.inputs)
        if blocks:
            block = patterns.Block((int(blocks[1]), int(blocks[2])))
            return lambda layout: block
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if text == "unstructured":
        return lambda layout: patterns.Unstructured()
    if text == "fan-in":
        return lambda layout: patterns.ConstantFanIn(axis=layout.inputs)
    if text == "channel":
        return lambda layout: patterns.Channel(axis=layout.outputs)
    raise argparse.ArgumentTypeError(f"{text!r} is none of: {PATTERNS}")


def select(
    tensors: Sequence[Tensor], where: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Tensor], str]:
    """Choose the tensors to prune.

    Args:
        tensors: All of them.
        where: Globs of names; none for the default choice.
        exclude: Globs of names that are left alone.

    Returns:
        The chosen ones, and a sentence that says how.

    Raises:
        UsageError: If there are none, or one of them has no magnitude.
    """
    for glob in [*where, *exclude]:
        if not any(_matches(t, glob) for t in tensors):
            raise UsageError(f"{glob!r} matches no tensor. `prunax inspect` lists their names.")
    if where:
        chosen = [t for t in tensors if any(_matches(t, glob) for glob in where)]
        rule = f"those that match {', '.join(where)}"
    else:
        known = _leaf_names.folders({t.path: t.shape for t in tensors})
        under = any(t.path.startswith("params/") for t in tensors)
        chosen = [
            t
            for t in tensors
            if not _leaf_names.why_whole(t.path, t.shape, known)
            and _has_magnitude(t)
            and (t.path.startswith("params/") or not under)
        ]
        rule = "weights of two axes or more; biases, normalisation and embeddings stay (choose others with --where)"
    chosen = [t for t in chosen if not any(_matches(t, glob) for glob in exclude)]
    if not chosen:
        raise UsageError("no tensor is chosen. Name some with --where 'GLOB'.")
    for t in chosen:
        if not _has_magnitude(t):
            raise UsageError(
                f"{t.name!r} is {t.dtype_name} and has no magnitude to rank. Leave it out with --exclude."
            )
    return chosen, rule


def find_layout(asked: str, tensors: Sequence[Tensor]) -> Layout:
    """Take the layout that was asked for, or the one that the names tell of.

    Raises:
        UsageError: If the names tell of none, or of two.
    """
    if asked != "auto":
        return Layout(asked, "as asked by --layout")
    last = {t.path.rsplit("/", 1)[-1] for t in tensors}
    if last <= {"kernel"}:
        return Layout("in-out", "since all names end in 'kernel', as in Flax")
    if last <= {"weight"}:
        return Layout(
            "out-in",
            "since all names end in 'weight', as in PyTorch and Hugging Face (GPT-2's Conv1D is the other way: "
            "--layout in-out)",
        )
    raise UsageError(
        f"the names ({', '.join(sorted(last)[:5])}) do not tell whether weights are stored as (in, out) or (out, in), "
        f"and the pattern depends on it. Say which: --layout in-out or --layout out-in."
    )


def describe(chosen: patterns.Pattern, layout: Layout | None, sparsity: float | None) -> str:
    """Say in words what a pattern removes, and along which axis."""
    amount = "" if sparsity is None else f"{sparsity:.4g} of "
    if layout is None:
        match chosen:
            case patterns.Block():
                size = " x ".join(map(str, chosen.shape))
                return f"{amount}the {size} blocks of the last two axes as they are stored"
            case _:
                return f"{amount}the weights, one by one: the layout does not matter"
    stored = "(in, out)" if layout.name == "in-out" else "(out, in)"
    match chosen:
        case patterns.NM():
            what = f"keeps {chosen.n} of every {chosen.m} weights in a row along the input axis"
            axis = layout.inputs
        case patterns.ConstantFanIn():
            what = f"{amount}the inputs of each output unit, along the input axis"
            axis = layout.inputs
        case _:
            what = f"{amount}the output channels, whole, along the output axis"
            axis = layout.outputs
    return f"{what}, axis {axis} of weights stored as {stored}, {layout.reason}"


def fit(
    make: Callable[[Layout], patterns.Pattern], asked: str, tensors: Sequence[Tensor]
) -> tuple[patterns.Pattern, Layout | None]:
    """Make a pattern for the layout of the tensors, which is None where the pattern does not ask for it."""
    flax, pytorch = make(Layout("in-out", "")), make(Layout("out-in", ""))
    if flax == pytorch:
        return flax, None
    layout = find_layout(asked, tensors)
    return make(layout), layout


def _has_magnitude(tensor: Tensor) -> bool:
    # Scales of eight bits have an exponent and nothing else, hence no zero.
    return jnp.issubdtype(tensor.dtype, jnp.floating) and tensor.dtype_name != "float8_e8m0fnu"


def _matches(tensor: Tensor, glob: str) -> bool:
    return fnmatch.fnmatchcase(tensor.name, glob) or fnmatch.fnmatchcase(tensor.path, glob)
