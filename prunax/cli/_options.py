"""What the options mean: patterns, layouts, and which tensors are pruned."""

import argparse
import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prunax import _leaf_names
from prunax.export._checkpoints import Tensor

if TYPE_CHECKING:
    from prunax import patterns

__all__ = ["Choice", "Layout", "UsageError"]

Make = Callable[["Layout"], "patterns.Pattern"]


class UsageError(ValueError):
    """Something that the user asked for and cannot have. The message says what to do instead."""


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


class Choice(NamedTuple):
    """Which tensors are pruned.

    Attributes:
        tensors: Those that are.
        whole: Name -> why it is left whole, of the others.
        rule: How they were chosen, in words.
    """

    tensors: list[Tensor]
    whole: dict[str, str]
    rule: str


def allocation(name: str) -> Any:
    """The allocation of that name."""
    from prunax import allocation as allocations

    return {
        "uniform": allocations.uniform,
        "global": allocations.global_ranking,
        "erdos-renyi": allocations.erdos_renyi,
        "lamp": allocations.lamp,
    }[name]


def pattern(text: str) -> Make:
    """Turn the spelling of a pattern into a function that makes it for a layout."""
    from prunax import patterns

    numbers = [int(n) for n in re.findall(r"\d+", text)]
    if text.startswith("block"):
        return lambda layout: patterns.Block((numbers[0], numbers[1]))
    if numbers:
        return lambda layout: patterns.NM(numbers[0], numbers[1], axis=layout.inputs)
    if text == "fan-in":
        return lambda layout: patterns.ConstantFanIn(axis=layout.inputs)
    if text == "channel":
        return lambda layout: patterns.Channel(axis=layout.outputs)
    return lambda layout: patterns.Unstructured()


def choose(tensors: Sequence[Tensor], args: argparse.Namespace) -> Choice:
    """Choose the tensors to prune.

    Args:
        tensors: All of them.
        args: With the globs ``where``, ``exclude`` and ``select``.

    Returns:
        The `Choice`, of no tensor perhaps.

    Raises:
        UsageError: If a glob matches nothing, or a tensor named by ``select`` has no magnitude.
    """
    for glob in [*args.where, *args.exclude, *args.select]:
        if not any(_matches(t, [glob]) for t in tensors):
            raise UsageError(f"{glob!r} matches no tensor. `prunax inspect` lists their names.")
    if args.select and args.where:
        raise UsageError(
            "--select says which tensors exactly, --where which of the safe ones. Pass one."
        )
    known = _leaf_names.folders({t.path: t.shape for t in tensors})
    under = any(t.path.startswith("params/") for t in tensors)
    whole: dict[str, str] = {}
    for t in tensors:
        reason = _no_magnitude(t)
        if args.select:
            named = _matches(t, args.select)
            if named and reason and not _matches(t, args.exclude):
                raise UsageError(f"{_ranked(t)} Leave it out with --exclude.")
            reason = "" if named else "not named by --select"
        elif not reason:
            reason = _leaf_names.why_whole(t.path, t.shape, known)
            if not reason and under and not t.path.startswith("params/"):
                reason = "not among the params"
            if not reason and args.where and not _matches(t, args.where):
                reason = "not named by --where"
        if not reason and _matches(t, args.exclude):
            reason = "excluded"
        if reason:
            whole[t.name] = reason
    for glob in args.where:
        found = [t for t in tensors if _matches(t, [glob])]
        if all(t.name in whole and not _matches(t, args.exclude) for t in found):
            why = f"{found[0].name!r} is left whole: {whole[found[0].name]}."
            why = _ranked(found[0]) if _no_magnitude(found[0]) else why
            raise UsageError(
                f"--where {glob!r} chooses nothing. {why} --select prunes whatever it names."
            )
    if args.select:
        rule = f"those that match {', '.join(args.select)}"
    else:
        rule = "weights of two axes or more; biases, normalisation and embeddings stay"
        rule += f"; those that match {', '.join(args.where)}" if args.where else ""
    return Choice([t for t in tensors if t.name not in whole], whole, rule)


def delicate(tensors: Sequence[Tensor]) -> dict[str, list[str]]:
    """Say which of the chosen tensors cost more than others of their size, by what they do."""
    experts = any("experts" in t.path for t in tensors)
    routers = ("router", "gate") if experts else ("router",)
    found = {
        "makes the logits": [t.name for t in tensors if _layer(t) in ("lm_head", "embed_out")],
        "chooses experts": [
            t.name for t in tensors if _layer(t) in routers and "experts" not in t.path.split("/")
        ],
    }
    return {what: names for what, names in found.items() if names}


def find_layout(asked: str, tensors: Sequence[Tensor], everything: Sequence[Tensor] = ()) -> Layout:
    """Take the layout that was asked for, or the one that the names of the chosen tensors tell of.

    Where they are GPT-2's, shapes among `everything` that the checkpoint has tell the rest.

    Raises:
        UsageError: If names and shapes tell of none, or of two.
    """
    if asked != "auto":
        return Layout(asked, "as asked by --layout")
    last = {t.path.rsplit("/", 1)[-1] for t in tensors}
    gpt2 = [t for t in tensors if _is_of_gpt2(t)]
    turned = _lies_the_other_way([t for t in (*tensors, *everything) if _is_of_gpt2(t)])
    if gpt2 and turned is None:
        raise UsageError(
            f"{gpt2[0].name!r} is stored as (in, out) in GPT-2 and as (out, in) in others that took its names. Say "
            f"which: --layout in-out or --layout out-in."
        )
    if gpt2 and turned:
        others = [t for t in tensors if not _is_of_gpt2(t)]
        if others:
            raise UsageError(
                f"{gpt2[0].name!r} is stored as (in, out), as GPT-2's Conv1D, and {others[0].name!r} may lie the other "
                f"way. Prune them one after the other: --select names tensors, --layout how they are stored."
            )
        return Layout("in-out", "since layers that widen have more columns than rows, as in GPT-2")
    if last <= {"kernel"}:
        return Layout("in-out", "since all names end in 'kernel', as in Flax")
    if last <= {"weight"}:
        return Layout("out-in", "since all names end in 'weight', as in PyTorch and Hugging Face")
    raise UsageError(
        f"the names ({', '.join(sorted(last)[:5])}) do not tell whether weights are stored as (in, out) or (out, in), "
        f"and the pattern depends on it. Say which: --layout in-out or --layout out-in."
    )


# Layers that GPT-2 stores the other way round than torch's Linear, and those of them that widen.
_CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")
_WIDE = ("c_attn", "c_fc")


def _layer(tensor: Tensor) -> str:
    return tensor.path.split("/")[-2] if "/" in tensor.path else ""


def _is_of_gpt2(tensor: Tensor) -> bool:
    return _layer(tensor) in _CONV1D and tensor.path.endswith("/weight") and len(tensor.shape) == 2


def _lies_the_other_way(tensors: Sequence[Tensor]) -> bool | None:
    """Whether layers that widen are stored as (in, out); None if no shape tells, or two tell different things."""
    wide = [t.shape for t in tensors if _layer(t) in _WIDE]
    told = {columns > rows for rows, columns in wide if columns != rows}
    return told.pop() if len(told) == 1 else None


def fit(
    make: Make, asked: str, tensors: Sequence[Tensor], everything: Sequence[Tensor]
) -> tuple["patterns.Pattern", Layout | None]:
    """Make a pattern for the layout of the tensors, which is None where the pattern does not ask for it."""
    flax, pytorch = make(Layout("in-out", "")), make(Layout("out-in", ""))
    if flax == pytorch:
        return flax, None
    layout = find_layout(asked, tensors, everything)
    return make(layout), layout


def describe(chosen: "patterns.Pattern", layout: Layout | None, sparsity: float | None) -> str:
    """Say in words what a pattern removes, and along which axis."""
    from prunax import patterns

    amount = "" if sparsity is None else f"{sparsity:.4g} of "
    if layout is None:
        if isinstance(chosen, patterns.Block):
            size = " x ".join(map(str, chosen.shape))
            return f"{amount}the {size} blocks of the last two axes as they are stored"
        return f"{amount}the weights, one by one: the layout does not matter"
    stored, axis = "(in, out)" if layout.name == "in-out" else "(out, in)", layout.inputs
    match chosen:
        case patterns.NM():
            what = f"keeps {chosen.n} of every {chosen.m} weights in a row along the input axis"
        case patterns.ConstantFanIn():
            what = f"{amount}the inputs of each output unit, along the input axis"
        case _:
            what = f"{amount}the output channels, whole, along the output axis"
            axis = layout.outputs
    return f"{what}, axis {axis} of weights stored as {stored}, {layout.reason}"


def _no_magnitude(tensor: Tensor) -> str:
    # Scales of eight bits have an exponent and nothing else, hence no zero.
    if tensor.dtype_name == "float8_e8m0fnu":
        return "float8_e8m0fnu has no zero"
    floating = tensor.dtype.kind == "f" or "float" in tensor.dtype.name
    return "" if floating else f"{tensor.dtype_name} is no floating-point dtype"


def _ranked(tensor: Tensor) -> str:
    return f"{tensor.name!r} is {tensor.dtype_name} and has no magnitude to rank."


def _matches(tensor: Tensor, globs: Sequence[str]) -> bool:
    names = (tensor.name, tensor.path)
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs for name in names)
