"""Pictures of pruning, each a matplotlib `Figure` to show in a notebook or to save.

Needs matplotlib: ``pip install 'prunax[plots]'``. Figures are made without pyplot, so that nothing global changes and
no window opens: ``figure.savefig("layers.png")``, or leave it as the last line of a notebook cell.
"""

import functools
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from prunax import schedules, trees
from prunax.reports._summary import summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["fronts", "groups", "heat_map", "layers", "masks", "schedule", "weights"]

PyTree = Any
_BINS = 101


def layers(params: PyTree, masks: PyTree | None = None, *, title: str = "") -> "Figure":
    """Draw the sparsity of each prunable leaf, and how many weights it keeps of how many.

    Args:
        params: Pytree of arrays.
        masks: Mask tree, True = kept; without it zeros of kernels count as pruned, as in `prunax.summarize`.
        title: Above the picture.

    Returns:
        The figure, with a bar for each prunable leaf and a dashed line at the sparsity of all together.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the structures differ, or no leaf is prunable.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.ones((8, 8))}
        >>> figure = prunax.reports.plots.layers(params, prunax.compute_masks(params, 0.75))
        >>> len(figure.axes)
        2
    """
    summary = summarize(params, masks)
    rows = [leaf for leaf in summary.leaves if leaf.prunable]
    if not rows:
        raise ValueError(
            "plots.layers: no leaf is prunable. Pass the masks, or params with kernels."
        )
    figure = _figure(9, 1.6 + 0.32 * len(rows), title)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    positions = range(len(rows))
    left.barh(positions, [100 * leaf.sparsity for leaf in rows], color="C0")
    left.axvline(100 * summary.sparsity, color="0.3", linestyle="--", linewidth=1)
    left.set(xlim=(0, 100), xlabel=f"sparsity, % (all: {summary.sparsity:.1%})")
    right.barh(positions, [leaf.weights for leaf in rows], color="0.85", label="weights")
    right.barh(positions, [leaf.kept for leaf in rows], color="C0", label="kept")
    right.set_xscale("symlog")
    right.set(xlabel="number (log)")
    largest = max(leaf.weights for leaf in rows)
    # Every second power: beside long names the panel is narrow.
    right.set_xticks([10**n for n in range(0, 20, 2) if 10**n <= largest])
    _legend(figure, right)
    left.set_yticks(positions, [leaf.path for leaf in rows])
    left.invert_yaxis()
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    return figure


def weights(
    params: PyTree,
    masks: PyTree | None = None,
    *,
    where: trees.Where = trees.is_kernel,
    title: str = "",
) -> "Figure":
    """Draw histograms of the weights that are kept, and the magnitude that divides them from the others.

    Args:
        params: Pytree of arrays, before or after the masks were applied.
        masks: Mask tree of the same structure, True = kept; without it zeros count as pruned.
        where: ``where(path, leaf) -> bool`` chooses the leaves to draw.
        title: Above the picture.

    Returns:
        The figure, a panel a leaf. Its title counts the pruned weights: as a bar at zero they would dwarf the others.
        Dashed lines stand at the smallest magnitude that is kept.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the structures differ, or `where` selects no leaf with a mask of its own.

    Examples:
        >>> import jax, prunax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
        >>> figure = prunax.reports.plots.weights(params, prunax.compute_masks(params, 0.75))
        >>> len(figure.axes)
        1
    """
    chosen = trees.select(params, where)
    leaves = [np.asarray(leaf, np.float64) for leaf in chosen.leaves]
    kept = (
        [leaf != 0 for leaf in leaves]
        if masks is None
        else chosen.take("plots.weights", "masks", masks)
    )
    panels = [
        (path, leaf, np.asarray(mask))
        for path, leaf, mask in zip(chosen.paths, leaves, kept, strict=True)
        if np.shape(mask) == leaf.shape and leaf.size
    ]
    if not panels:
        raise ValueError("plots.weights: `where` selects no leaf that has a mask of its own.")
    columns = min(2 if len(panels) <= 4 else 3, len(panels))  # two are read on a phone
    lines = -(-len(panels) // columns)
    figure = _figure(3.6 * columns, 2.6 * lines, title)
    for axes, (path, leaf, mask) in zip(
        figure.subplots(lines, columns, squeeze=False).flat, panels, strict=False
    ):
        values = leaf[mask & np.isfinite(leaf)]
        edge = np.abs(values).max(initial=0) or 1.0
        axes.hist(values, np.linspace(-edge, edge, _BINS), color="C0")
        removed = mask.size - np.count_nonzero(mask)
        if values.size and removed:
            for sign in (-1, 1):
                axes.axvline(sign * np.abs(values).min(), color="0.2", linestyle="--", linewidth=1)
        said = f"{removed:,} of {mask.size:,} pruned ({removed / mask.size:.1%})"
        axes.set_title(f"{path}\n{said}", fontsize="small")
        axes.tick_params(labelsize="small")
    _hide_rest(figure, len(panels))
    return figure


def schedule(schedule: float | schedules.Schedule, steps: int, *, title: str = "") -> "Figure":
    """Draw a sparsity schedule over the steps, with a dot at each step that updates masks.

    Args:
        schedule: From `prunax.schedules`, or a number.
        steps: How many steps to draw, positive.
        title: Above the picture.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If steps is not positive.

    Examples:
        >>> import prunax
        >>> figure = prunax.reports.plots.schedule(prunax.schedules.polynomial(0.9, 10, 90, every=10), 100)
        >>> figure.axes[0].get_ylabel()
        'sparsity, %'
    """
    from prunax.schedules import as_schedule

    if steps < 1:
        raise ValueError(f"plots.schedule: steps must be positive, got {steps}.")
    plan = as_schedule("plots.schedule", schedule)
    at = jnp.arange(steps)
    values = 100 * np.asarray(jax.vmap(plan)(at))
    updates = np.asarray(jax.vmap(plan.is_update_step)(at))
    # Masks are those of the last update.
    at = np.asarray(at)
    last = np.maximum.accumulate(np.where(updates, at, -1))
    held = np.where(last >= 0, values[last], 0.0)
    figure = _figure(7, 3, title)
    axes = figure.subplots()
    axes.plot(at, values, color="0.7", label="schedule")
    axes.step(at, held, where="post", color="C0", label="masks")
    axes.plot(at[updates], values[updates], ".", color="C0", markersize=4, label="mask update")
    axes.set(xlabel="step", ylabel="sparsity, %", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def heat_map(
    names: Sequence[str],
    sparsities: Sequence[float],
    values: npt.ArrayLike,
    *,
    label: str = "increase of the loss",
    title: str = "",
) -> "Figure":
    """Draw a number for each leaf and sparsity: how the loss grows where one leaf alone is pruned.

    Args:
        names: Of L leaves or groups.
        sparsities: S fractions.
        values: [L, S] numbers. Those that are not finite are left white.
        label: What they are.
        title: Above the picture.

    Returns:
        The figure: names down, sparsities across, colours on a logarithmic scale where all values are positive.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the shape of the values is not [L, S].

    Examples:
        >>> import prunax
        >>> figure = prunax.reports.plots.heat_map(["a", "b"], [0.5, 0.9], [[0.1, 0.5], [0.01, 0.02]])
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['a', 'b']
    """
    from matplotlib.colors import LogNorm

    table = np.asarray(values, np.float64)
    if table.shape != (len(names), len(sparsities)):
        raise ValueError(
            f"plots.heat_map: values must have shape ({len(names)}, {len(sparsities)}), one row a name and one column "
            f"a sparsity, got {table.shape}."
        )
    figure = _figure(2.5 + 0.7 * len(sparsities), 1.6 + 0.3 * len(names), title)
    axes = figure.subplots()
    finite = table[np.isfinite(table)]
    positive = finite.size > 0 and finite.min() > 0 and finite.max() > finite.min()
    image = axes.imshow(
        np.ma.masked_invalid(table),
        aspect="auto",
        cmap="viridis",
        norm=LogNorm(finite.min(), finite.max()) if positive else None,
    )
    axes.set_xticks(range(len(sparsities)), [f"{s:.0%}" for s in sparsities])
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("sparsity of the one leaf")
    figure.colorbar(image, label=label)
    return figure


def fronts(
    curves: Mapping[str, Sequence[tuple[float, float] | tuple[float, float, float]]],
    *,
    dense: float | None = None,
    ylabel: str = "accuracy",
    title: str = "",
) -> "Figure":
    """Draw one number against sparsity, a line for each method.

    Args:
        curves: For each method its points ``(sparsity, value)``, sparsities below 1; or
            ``(sparsity, value, deviation)``, which draws a band of the deviation to either side.
        dense: The value of the dense model, a dashed line.
        ylabel: What the value is.
        title: Above the picture.

    Returns:
        The figure. The horizontal axis is logarithmic in what is kept, so that 90% and 99% lie as far apart as 0 and
        90%.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If a sparsity is outside [0, 1), or only some points of a method have a deviation.

    Examples:
        >>> import prunax
        >>> curves = {"magnitude": [(0.5, 0.98), (0.9, 0.95)], "random": [(0.5, 0.9), (0.9, 0.6)]}
        >>> figure = prunax.reports.plots.fronts(curves, dense=0.98)
        >>> len(figure.axes[0].get_lines())
        3
    """
    figure = _figure(6.5, 4, title)
    axes = figure.subplots()
    if dense is not None:
        axes.axhline(dense, color="0.4", linestyle="--", linewidth=1, label="dense")
    ticks = set()
    for i, (name, points) in enumerate(curves.items()):
        if len({len(point) for point in points}) > 1:
            raise ValueError(
                f"plots.fronts: some points of {name!r} have a deviation and some none. Give one to all of them."
            )
        width = len(points[0]) if points else 2
        sparsity, value, *deviation = np.asarray(sorted(points), np.float64).reshape(-1, width).T
        if sparsity.size and not (sparsity.min() >= 0 and sparsity.max() < 1):
            raise ValueError(f"plots.fronts: the sparsities of {name!r} must lie in [0, 1).")
        (line,) = axes.plot(
            1 / (1 - sparsity), value, marker="osD^vPX"[i % 7], markersize=5, label=name
        )
        for d in deviation:
            axes.fill_between(
                line.get_xdata(),
                value - d,
                value + d,
                color=line.get_color(),
                alpha=0.2,
                linewidth=0,
            )
        ticks |= set(np.round(sparsity, 4).tolist())
    axes.set_xscale("log")
    shown = _spread_out(sorted(ticks))
    labels = [f"{round(100 * s, 1 if s < 0.999 else 3):g}%" for s in shown]
    axes.set_xticks([1 / (1 - s) for s in shown], labels)
    axes.minorticks_off()
    axes.set(xlabel="sparsity", ylabel=ylabel)
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def masks(masks: PyTree, *, most: int = 12, title: str = "") -> "Figure":
    """Draw masks as pictures: dark = kept. Blocks, channels and empty rows are seen at a glance.

    Args:
        masks: Mask tree, True = kept. Leaves with fewer than two axes are left out. Of a convolution's kernel the
            window's axes go with the inputs.
        most: How many leaves to draw at most, the first ones.
        title: Above the picture.

    Returns:
        The figure, a panel a leaf: inputs down, outputs across. Large masks are averaged over tiles, so that grey means
        partly kept.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no mask with two axes.

    Examples:
        >>> import jax, prunax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (32, 32))}
        >>> tree = prunax.compute_masks(params, 0.75, pattern=prunax.patterns.Block((8, 8)))
        >>> prunax.reports.plots.masks(tree).axes[0].get_title()
        'kernel: 75.0% pruned'
    """
    named = zip(trees.paths(masks), jax.tree.leaves(masks), strict=True)
    panels = [(path, np.asarray(mask)) for path, mask in named if np.ndim(mask) >= 2][:most]
    if not panels:
        raise ValueError(
            "plots.masks: no mask has two axes. Scalar masks stand for leaves that are not pruned."
        )
    columns = min(2 if len(panels) <= 4 else 4, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(3.2 * columns, 3.2 * lines, title)
    for axes, (path, mask) in zip(
        figure.subplots(lines, columns, squeeze=False).flat, panels, strict=False
    ):
        matrix = mask.reshape(-1, mask.shape[-1])
        axes.imshow(
            _tiled(matrix), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto"
        )
        axes.set_title(f"{path}: {1 - mask.mean():.1%} pruned", fontsize="small")
        axes.set_xlabel(f"{matrix.shape[1]} outputs", fontsize="small")
        axes.set_ylabel(f"{matrix.shape[0]} inputs", fontsize="small")
        axes.set(xticks=[], yticks=[])
    _hide_rest(figure, len(panels))
    return figure


def groups(groups: Sequence[Any], *, title: str = "") -> "Figure":
    """Draw which axes of which leaves shrink together: leaves down, groups across.

    Args:
        groups: From `prunax.structured.axis_groups`; those that are frozen are pale.
        title: Above the picture.

    Returns:
        The figure. A square's colour is what the leaf does on that axis: produces the units, consumes them, or meets
        them elementwise. Where units do not fill the axis, so that it has squares of several groups, the number in it
        is the index at which the first of them lies.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no groups.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
        >>> found = prunax.structured.axis_groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 4)))
        >>> figure = prunax.reports.plots.groups(found)
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['down[0]', 'down[1]', 'up[0]', 'up[1]']
    """
    if not groups:
        raise ValueError("plots.groups: there are no groups to draw. Pass those of axis_groups.")
    lengths = {leaf.path: leaf.shape for group in groups for leaf in group.leaves}
    order = {path: i for i, path in enumerate(lengths)}
    rows = sorted(
        {(m.path, m.axis) for group in groups for m in group.members},
        key=lambda row: (order[row[0]], row[1]),
    )
    place = {row: i for i, row in enumerate(rows)}
    figure = _figure(4 + 0.34 * len(groups), 2.2 + 0.24 * len(rows), title)
    axes = figure.subplots()
    colours = {"produces": "C0", "elementwise": "0.55", "consumes": "C1"}
    for column, group in enumerate(groups):
        alpha = 0.25 if group.frozen else 1.0
        drawn = set()
        for path, axis, position, role in group.members:
            row = place[path, axis]
            if row in drawn:
                continue
            drawn.add(row)
            axes.barh(row, 0.86, 0.86, column - 0.43, color=colours[role], alpha=alpha)
            if lengths[path][axis] != group.size:
                axes.text(column, row, str(position.offset), ha="center", va="center", fontsize=6)
    axes.set_yticks(range(len(rows)), [f"{path}[{axis}]" for path, axis in rows])
    names = [f"{group.size}{' frozen' if group.frozen else ''}" for group in groups]
    axes.set_xticks(range(len(groups)), names, rotation=90)
    axes.tick_params(labelsize="small", length=0)
    axes.set(
        xlim=(-0.6, len(groups) - 0.4),
        ylim=(len(rows) - 0.4, -0.6),
        xlabel="units of the group",
    )
    axes.set_axisbelow(True)
    axes.grid(alpha=0.2)
    for role, colour in colours.items():
        axes.barh([0], [0], color=colour, label=role)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _tiled(matrix: np.ndarray, side: int = 400) -> np.ndarray:
    """Means over tiles, so that at most `side` rows and columns are left."""
    kept = matrix.astype(np.float64)
    for axis in (0, 1):
        n = kept.shape[axis]
        edges = np.arange(0, n, -(-n // side))
        widths = np.diff(np.append(edges, n))
        kept = np.add.reduceat(kept, edges, axis=axis) / np.expand_dims(widths, 1 - axis)
    return kept


def _figure(width: float, height: float, title: str) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "prunax.reports.plots needs matplotlib: pip install 'prunax[plots]'."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    # Notebooks draw by themselves only what pyplot made.
    setattr(figure, "_repr_png_", functools.partial(_png, figure))  # noqa: B010, pyright knows no such attribute
    if title:
        figure.suptitle(title)
    return figure


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _legend(figure: "Figure", axes: Any) -> None:
    """A legend beside the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")


def _hide_rest(figure: "Figure", used: int) -> None:
    for axes in figure.axes[used:]:
        axes.set_visible(False)


def _spread_out(sparsities: Sequence[float]) -> list[float]:
    """Those far enough apart on the axis that their labels do not run into each other."""
    if not sparsities:
        return []
    # A label takes a sixth of the axis, which is logarithmic in what is kept.
    least = max(1.25, ((1 - sparsities[0]) / (1 - sparsities[-1])) ** 0.17)
    shown: list[float] = []
    for s in reversed(sparsities):
        if not shown or (1 - s) / (1 - shown[-1]) > least:
            shown.append(s)
    return shown[::-1]
