"""Block refinement: the kept weights of one block after the other are tuned to the outputs of the dense block."""

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prunax import _masks as mask_trees
from prunax import _progress, schedules, trees
from prunax._jaxprs import programs
from prunax.calibration._blocks import Globs
from prunax.calibration._networks import How, Network, outputs_of, shapes_of
from prunax.calibration._reading import warn
from prunax.calibration._saved_blocks import RefinedBlock, Saved

__all__ = ["Refined", "RefinedBlock", "refine", "relative_error"]

PyTree = Any
Function = Callable[[PyTree, Any], Any]
Loss = Callable[[jax.Array, jax.Array], jax.Array]

PASSES = 3  # through the batches, for each block
PARTS = 64  # that all batches are cut into, so many steps each time through
RATE = 0.01  # of a leaf's root mean square, for each step


class Refined(NamedTuple):
    """Refined parameters.

    Attributes:
        params: The params, with exactly 0.0 where a weight is pruned.
        blocks: What became of each block, in order.
    """

    params: PyTree
    blocks: tuple[RefinedBlock, ...]


def relative_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared error of each vector (of the last axis) over the target's squared length, the mean of all.

    A few vectors of a language model are a hundred times as long as others: each counts alike.

    Args:
        outputs: Any shape.
        targets: The same shape.

    Returns:
        Scalar, float32 (float64 for arrays in it).

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> float(prunax.calibration.relative_error(jnp.array([[3.0, 5.0]]), jnp.array([[3.0, 4.0]])))
        0.03999999910593033
    """
    dtype = trees.wide_dtype(outputs.dtype, targets.dtype)
    outputs, targets = outputs.astype(dtype), targets.astype(dtype)
    squares = jnp.sum(jnp.square(targets), axis=-1)
    # A vector of zeros has no length to compare with: it counts as one of the mean length.
    squares = jnp.where(squares > 0, squares, jnp.maximum(jnp.mean(squares), 1e-12))
    return jnp.mean(jnp.sum(jnp.square(outputs - targets), axis=-1) / squares)


def refine(
    fn: Function,
    params: PyTree,
    masks: PyTree | None,
    batches: Iterable[Any],
    *,
    blocks: str | Sequence[str] | Mapping[str, str],
    teacher: PyTree | tuple[Function, PyTree] | None = None,
    steps: int | None = None,
    size: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    loss: Loss = relative_error,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Refined:
    """Tune the kept weights of one block after the other to the outputs of the dense block, by gradient descent.

    Each block gets the inputs that the refined blocks before it give, and has to give what the dense network gives on
    its own inputs: so it makes up for errors before it as well. All floating-point leaves of a block are tuned, norms
    and biases too. Deterministic.

    Args:
        fn: ``fn(params, batch)``, any JAX function; its jaxpr shows where blocks begin and end.
        params: Pytree of arrays: pruned by any method, smaller, or dense.
        masks: Mask tree, True = kept; what is pruned stays exactly 0.0. None for a smaller network.
        batches: Calibration inputs. All live on the device at once, with what goes into a block and what the dense
            block makes of it; of weights, only one block's are held again, with their optimizer state.
        blocks: What is a block. A glob, each match of which is one, ``"layers/*"``; a row of a stack that
            `jax.lax.scan` runs over counts as a part of the path, ``layers/3``, and a dot in a name as a slash. Or
            several globs, each of which is one block, of all that lies below its matches:
            ``[f"*_{i}" for i in range(30)]``. Or a mapping, from such a glob to that of the teacher's block whose
            output is wanted: of a shallower network ``{"layers/0": "layers/0", "layers/1": "layers/2"}``. What lies in
            no block stays as it is.
        teacher: The dense params, or ``(fn, params)`` where it is another function, as of a smaller network. Left out:
            `params`, which then are dense.
        steps: Gradient steps for each block, a part of the batches each, in order and round again. By default three
            times through.
        size: Examples in a step: batches are cut along the first axis, where all their arrays have it in common. By
            default a 64th of all examples; more steps of fewer examples do more than fewer of more, at the same cost.
        optimizer: By default Adam, at 1% of each leaf's root mean square and falling linearly to nothing. It sees
            float32 weights.
        loss: ``loss(outputs, targets) -> scalar`` of each array that leaves a block.
        checkpoint: A folder in which each finished block is kept. A run that was killed, called again in the same way,
            goes on after its last block, and gives the same weights.
        progress: Show a progress bar.

    Returns:
        `Refined` params, in the dtypes that they came in, with the loss of each block before and after. A block that
        would be no better stays as it was.

    Raises:
        ValueError: If `blocks` matches nothing, or parts of blocks that take turns; if masks or teacher do not fit; if
            a block's outputs are not finite, naming block and batch; if the checkpoint is of another run. Steps that
            are not finite are left out, counted and warned of.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> fn = lambda p, x: jnp.tanh(x @ p["layers"][0]) @ p["layers"][1]
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {"layers": [jax.random.normal(k, (8, 8)) for k in keys[:2]]}
        >>> batches = [jax.random.normal(keys[2], (32, 8))]
        >>> pruned = prunax.calibration.wanda(fn, params, batches, 0.5)
        >>> refined = prunax.calibration.refine(fn, *pruned, batches, blocks="layers/*", teacher=params, steps=20)
        >>> [(b.name, b.after < b.before) for b in refined.blocks]
        [('layers/0', True), ('layers/1', True)]

    References:
        Guo et al., EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs, 2024, arXiv:2402.12419; Wagner et al.,
        A Free Lunch in LLM Compression: Revisiting Retraining after Pruning, 2025, arXiv:2510.14444.
    """
    if steps is not None:
        schedules.check_steps("refine", steps=steps)
    if size is not None:
        schedules.check_steps("refine", size=size)
    batches = [jax.tree.map(jnp.asarray, batch) for batch in batches]
    if not batches:
        raise ValueError("refine: needs at least one batch of calibration data, got none.")
    dense_fn, dense = _teacher(fn, params, masks, teacher)
    start = params if masks is None else mask_trees.apply_masks(params, masks)
    batches, origin = _in_parts(fn, params, batches, size)
    mine, theirs = _globs(blocks)
    student = Network(fn, start, batches, mine)
    same = dense_fn is fn and mine == theirs and shapes_of(dense) == shapes_of(params)
    guide = Network(dense_fn, dense, batches, theirs, student.blocked if same else None)
    _check_order(blocks, student, guide)
    own_masks = _array_masks(params, masks)
    steps = PASSES * len(batches) if steps is None else steps
    optimizer = optimizer or _adam(steps)
    settings = (blocks, steps, student.names, _text(optimizer, loss))
    saved = Saved(checkpoint, [start, masks, dense, batches], settings)

    results: list[RefinedBlock] = []
    with _progress.counted("refining", len(student.names), show=progress) as advance:
        for k, name in enumerate(student.names):
            student.enter(k)
            guide.enter(k)
            old = student.weights(k)
            targets = guide.leave(k, guide.weights(k))
            _check_targets(name, student, k, targets, origin)
            found = saved.read(k, old)
            if found is not None:
                new, result = found
                student.leave(k, new)
            else:
                kept = [own_masks[w.leaf] for w in student.blocked[0].blocks[k].weights]
                new, before, skipped = _tuned(student, k, kept, targets, steps, optimizer, loss)
                here = list(student.values)
                after = _mean_loss(loss, student.leave(k, new), targets)
                if not after < before:
                    student.values, new, after = here, old, before
                    student.leave(k, old)
                del here
                result = RefinedBlock(name, before, after, skipped)
                saved.write(k, new, result)
            del targets
            student.put(k, new)
            results.append(result)
            advance(f"{name} {result.before:.3g} -> {result.after:.3g}")
    left_out = [f"{b.name} ({b.skipped} of {steps})" for b in results if b.skipped]
    if left_out:
        warn(
            f"refine: steps that were not finite were left out: {', '.join(left_out)}. Pass an optimizer with a lower "
            f"learning rate, or calibrate in a wider dtype."
        )
    return Refined(student.tree(), tuple(results))


@functools.lru_cache(maxsize=8)
def _adam(steps: int) -> optax.GradientTransformation:
    """One object for each number of steps, so that nothing is compiled twice."""
    return optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(optax.linear_schedule(RATE, 0.0, steps)),
    )


def _text(optimizer: optax.GradientTransformation, loss: Loss) -> str:
    """What optimizer and loss compute, so that a checkpoint tells one from another: their jaxprs for a small weight."""

    def steps(x: jax.Array) -> Any:
        return optimizer.update([x], optimizer.init([x]), [x])

    small = jnp.ones((2, 2, 2), jnp.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = [str(jax.make_jaxpr(steps)(small))]
        try:
            found.append(str(jax.make_jaxpr(loss)(small, small)))
        except Exception:  # a loss of outputs of one shape
            found.append(getattr(loss, "__qualname__", ""))
    return re.sub("0x[0-9a-f]+", "", "".join(found))  # addresses differ from run to run


def _compared(loss: Loss, outputs: Sequence[jax.Array], targets: Sequence[jax.Array]) -> Any:
    losses = [loss(o, t) for o, t in zip(outputs, targets, strict=True)]
    return sum(losses) / len(losses)


def _loss(how: How, loss: Loss, weights: Any, targets: Sequence[jax.Array], *rest: Any) -> Any:
    return _compared(loss, outputs_of(how, weights, *rest)[: how.targets], targets)


_compare = functools.partial(jax.jit, static_argnums=0)(_compared)
_measure = functools.partial(jax.jit, static_argnums=(0, 1))(_loss)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4, 5))
def _step(
    how: How,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    weights: list[jax.Array],
    state: Any,
    skipped: jax.Array,
    masks: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    *rest: Any,
) -> tuple[list[jax.Array], Any, jax.Array]:
    """One step of gradient descent, or none where anything would not be finite."""

    def masked(xs: Any) -> list[jax.Array]:
        return [jnp.where(m, x, jnp.zeros_like(x)) for x, m in zip(xs, masks, strict=True)]

    objective = functools.partial(_loss, how, loss)
    value, grads = jax.value_and_grad(objective)(weights, targets, *rest)
    grads = masked(grads)
    with jax.numpy_dtype_promotion("standard"):  # which optax's Adam needs
        updates, after = optimizer.update(grads, state, weights)
    new = masked(optax.apply_updates(weights, updates))
    fine = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in (value, *grads, *new)]))
    choose = functools.partial(jax.tree.map, lambda a, b: jnp.where(fine, a, b))
    return choose(new, weights), choose(after, state), skipped + (~fine).astype(jnp.int32)


def _tuned(
    student: Network,
    k: int,
    masks: Sequence[Any],
    targets: Sequence[Sequence[jax.Array]],
    steps: int,
    optimizer: optax.GradientTransformation,
    loss: Loss,
) -> tuple[list[jax.Array], float, int]:
    """New weights of a block whose inputs the network is at, the loss before, and how many steps were skipped."""
    old = student.weights(k)
    rows = [w.row for w in student.blocked[0].blocks[k].weights]
    masks = [m[row] if np.ndim(m) else m for m, row in zip(masks, rows, strict=True)]
    parts = [student.block(n, k) for n in range(len(student.batches))]
    wide = [x.astype(trees.wide_dtype(x.dtype)) for x in old]

    losses = [
        _measure(how, loss, old, wanted, *rest)
        for (how, rest), wanted in zip(parts, targets, strict=True)
    ]
    before = float(np.mean(jax.device_get(losses)))
    if not np.isfinite(before):
        raise ValueError(
            f"refine: the loss of block {student.names[k]!r} is not finite before its first step. Look for NaN or "
            f"infinity in the params, or calibrate in a wider dtype."
        )
    weights, state = list(map(jnp.copy, wide)), optimizer.init(wide)
    skipped = jnp.zeros((), jnp.int32)
    for i in range(steps):
        n = i % len(parts)
        how, rest = parts[n]
        weights, state, skipped = _step(
            how, loss, optimizer, weights, state, skipped, masks, targets[n], *rest
        )
    new = [x.astype(y.dtype) for x, y in zip(weights, old, strict=True)]
    return new, before, int(skipped)


def _mean_loss(
    loss: Loss, made: Sequence[Sequence[jax.Array]], targets: Sequence[Sequence[jax.Array]]
) -> float:
    pairs = zip(made, targets, strict=True)
    return float(np.mean(jax.device_get([_compare(loss, a, b) for a, b in pairs])))


def _in_parts(
    fn: Function, params: PyTree, batches: Sequence[Any], size: int | None
) -> tuple[list[Any], list[int]]:
    """Batches cut into equal parts along their first axis, and the number of the batch that each is of."""
    whole = list(batches), list(range(len(batches)))
    shapes = [[x.shape for x in jax.tree.leaves(batch)] for batch in batches]
    if any(not own or () in own or len({shape[0] for shape in own}) > 1 for own in shapes):
        return whole
    lengths = [own[0][0] for own in shapes]
    wanted = size or max(1, sum(lengths) // PARTS)
    parts, origin = list[Any](), list[int]()
    for n, (batch, length) in enumerate(zip(batches, lengths, strict=True)):
        step = next((d for d in range(min(wanted, length), 0, -1) if length % d == 0), length)
        for start in range(0, length, max(step, 1)):
            part = slice(start, start + step)
            parts.append(jax.tree.map(lambda x, part=part: x[part], batch))
            origin.append(n)
    if size is None and len(parts) > len(batches):
        try:
            programs.traced(fn, params, (parts[0],))
        except Exception:  # a function of batches of one length
            return whole
    return parts, origin


def _teacher(
    fn: Function, params: PyTree, masks: PyTree | None, teacher: Any
) -> tuple[Function, PyTree]:
    """The dense function and its params."""
    if teacher is not None:
        pair = isinstance(teacher, tuple) and len(teacher) == 2 and callable(teacher[0])
        return teacher if pair else (fn, teacher)
    if masks is None:
        raise ValueError(
            "refine: without masks there is no dense network to come near to. Pass teacher=(fn, params)."
        )
    leaves = zip(jax.tree.leaves(params), trees.check_masks("refine", params, masks), strict=True)
    pruned = [(x, m) for x, m in leaves if trees.is_prunable(m, x)]
    if not any(bool(jnp.any(jnp.where(m, 0, x))) for x, m in pruned):
        raise ValueError(
            "refine: every weight that the masks prune is 0 already, so that the params are their own dense network. "
            "Pass the dense params too: teacher=params."
        )
    return fn, params


def _globs(blocks: Any) -> tuple[Globs, Globs]:
    """The blocks' names in the network, and in its teacher."""
    if isinstance(blocks, str):
        return blocks, blocks
    if isinstance(blocks, Mapping):
        return tuple(blocks), tuple(blocks.values())
    return tuple(blocks), tuple(blocks)


def _check_order(blocks: Any, student: Network, guide: Network) -> None:
    pairs = blocks if isinstance(blocks, Mapping) else {}
    wanted = [pairs.get(name, name) for name in student.names]
    if wanted != guide.names:
        raise ValueError(
            f"refine: the blocks are {', '.join(student.names)}, and the teacher's {', '.join(guide.names)}. Say which "
            f"belong together, in order: blocks={{'layers/0': 'layers/0', 'layers/1': 'layers/2'}}."
        )


def _check_targets(
    name: str,
    student: Network,
    k: int,
    targets: Sequence[Sequence[jax.Array]],
    origin: Sequence[int],
) -> None:
    for n, made in enumerate(targets):
        inside, program = student.blocked[n].blocks[k], student.blocked[n].program
        own = [program.shapes[i].shape for i in inside.inside.outputs[: inside.targets]]
        theirs = [x.shape for x in made]
        if own != theirs:
            raise ValueError(
                f"refine: block {name!r} gives {own}, the teacher's {theirs}. Blocks can be refined whose outputs "
                f"have the dense shape; a network with a narrower stream is distilled (penalties.distillation)."
            )
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in made):
            raise ValueError(
                f"refine: what the dense block {name!r} makes of batch {origin[n]} is not finite. Look for NaN or "
                f"infinity in the batch, or calibrate in a wider dtype."
            )


def _array_masks(params: PyTree, masks: PyTree | None) -> list[Any]:
    """The mask of each array leaf."""
    leaves = jax.tree.leaves(params)
    own = [True] * len(leaves) if masks is None else trees.check_masks("refine", params, masks)
    return [m for m, x in zip(own, leaves, strict=True) if trees.is_array(x)]
