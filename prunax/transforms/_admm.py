"""Training towards a sparse set with the alternating direction method of multipliers (ADMM)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prunax import _masks as mask_functions
from prunax import allocation as allocations
from prunax import patterns, schedules, trees
from prunax import scores as score_functions
from prunax.transforms import _inner
from prunax.transforms._pruning import pruned

__all__ = ["AdmmState", "admm"]

PyTree = Any


class AdmmState(NamedTuple):
    """State of the augmentation that `admm` puts before the inner optimizer.

    Attributes:
        count: int32 scalar, number of updates so far.
        sparse: z, the nearest sparse weights: one array a prunable leaf, a scalar for others.
        dual: u, the scaled dual variable: likewise.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] - as in optax's states
    sparse: PyTree
    dual: PyTree


def admm(
    inner: optax.GradientTransformation,
    sparsity: float | None,
    *,
    penalty: float | Callable[[jax.Array], Any],
    end_step: int,
    every: int = 32,
    score: score_functions.Score = score_functions.magnitude,
    allocation: allocations.Allocation = allocations.global_ranking,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: trees.Where = trees.is_kernel,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Train dense weights x that are drawn to the nearest sparse ones z, then prune them.

    The task is to minimise the loss subject to x = z, z sparse. To each gradient is added the pull of the augmented
    Lagrangian, and every `every` steps z and the dual variable u follow:

    .. math::
        g \leftarrow g + \lambda (x - z + u), \qquad
        z \leftarrow \Pi(x + u), \qquad
        u \leftarrow u + x - z

    where the projection keeps the weights with the highest scores. At `end_step` the weights are pruned for good, and
    train on under fixed masks. Little is lost then, since x has come near z.

    Args:
        inner: Any optax transformation.
        sparsity: Fraction of weights to prune, in [0, 1]; None for what the pattern fixes.
        penalty: The strength lambda, or a function of the step, an optax schedule (rising ones help).
        end_step: The step at which masks are computed and fixed.
        every: Steps from one update of z and u to the next.
        score: ``score(params, grads)`` that ranks x + u in the projection, and x at the end.
        allocation: How the sparsity is shared out among leaves.
        pattern: Which weights go together or compete.
        where: ``where(path, leaf) -> bool`` chooses the prunable leaves.
        packed: As in `prune`.

    Returns:
        A `optax.GradientTransformationExtraArgs` whose state is a `PruneState`. It holds z and u, which take twice the
        memory of the prunable weights.

    Raises:
        ValueError: If the sparsity is outside [0, 1] or a step is not positive; from `update` as `prune`.

    Examples:
        >>> import optax, prunax
        >>> tx = prunax.transforms.admm(optax.adam(1e-3), 0.95, penalty=1e-3, end_step=5000)

    References:
        Lee et al., The Unseen Frontier: Pushing the Limits of LLM Sparsity with Surrogate-Free ADMM (ELSA), 2025,
        arXiv:2510.01650; Boyd et al., Distributed Optimization and Statistical Learning via ADMM, 2011, section 9.1.
    """
    target: Any = pattern.implied_sparsity if sparsity is None else sparsity
    schedule = schedules.one_shot(target, end_step)
    schedules.check_steps("admm", every=every)

    def init(params: PyTree) -> AdmmState:
        chosen = trees.select(params, where)
        if chosen.indices:  # what never moves goes nowhere
            update = optax.with_extra_args_support(inner).update
            at_rest = _inner.frozen(update, inner.init(params), params)
            chosen = chosen.only([n for n, path in enumerate(chosen.paths) if path not in at_rest])

        def zeros() -> PyTree:
            whole = jax.tree.map(lambda _: jnp.zeros(()), params)
            return chosen.put([jnp.zeros_like(leaf) for leaf in chosen.leaves], whole)

        return AdmmState(jnp.zeros((), jnp.int32), sparse=zeros(), dual=zeros())

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, AdmmState]:
        del extra_args
        if params is None:
            raise ValueError(
                "admm: needs the current parameters. Call tx.update(grads, state, params)."
            )
        chosen = trees.select(params, where)
        stored = chosen.take("admm", "sparse weights in the state", state.sparse)
        chosen = chosen.only([n for n, z in enumerate(stored) if z.shape == chosen.leaves[n].shape])
        weights = chosen.leaves

        def project(sparse: list[jax.Array], dual: list[jax.Array]) -> tuple[Any, Any]:
            del sparse
            target = [w + u for w, u in zip(weights, dual, strict=True)]
            tree = score(chosen.put(target, params), updates)
            ranked, scores = mask_functions.scored("admm", "scores", tree, chosen)
            plan = mask_functions.plan(
                ranked.shapes, schedule.target, allocation=allocation, pattern=pattern
            )
            masks = mask_functions.select_masks(
                scores, plan.budgets, pattern=pattern, structure=plan.structure
            )
            everything = [jnp.ones((), jnp.bool_) for _ in target]
            masks = chosen.merge(ranked, masks, everything)
            z = [jnp.where(m, t, 0) for m, t in zip(masks, target, strict=True)]
            return z, [t - s for t, s in zip(target, z, strict=True)]

        drawn = state.count < end_step
        sparse, dual = jax.lax.cond(
            drawn & (state.count % every == 0),
            project,
            lambda z, u: (z, u),
            chosen.take("admm", "sparse weights in the state", state.sparse),
            chosen.take("admm", "dual variables in the state", state.dual),
        )
        strength = penalty(state.count) if callable(penalty) else penalty
        strength = jnp.where(drawn, jnp.asarray(strength, jnp.float32), 0)
        grads = chosen.take("admm", "updates", updates)
        pulled = [
            g + (strength.astype(w.dtype) * (w - z + u)).astype(g.dtype)
            for g, w, z, u in zip(grads, weights, sparse, dual, strict=True)
        ]
        return chosen.put(pulled, updates), AdmmState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            sparse=chosen.put(sparse, state.sparse),
            dual=chosen.put(dual, state.dual),
        )

    augmentation = optax.GradientTransformationExtraArgs(init, update)
    return pruned(
        "admm",
        optax.chain(augmentation, inner),
        schedule,
        score=score,
        allocation=allocation,
        pattern=pattern,
        where=where,
        packed=packed,
    )
