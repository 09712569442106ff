"""Pictures draw the numbers they are given; pages hold everything in one file."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prunax
from prunax import patterns, reports, schedules
from prunax.reports import plots

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's own

KEY = jax.random.key(0)
PARAMS = {
    "conv": {"kernel": jax.random.normal(KEY, (3, 3, 4, 8))},
    "dense": {"kernel": jax.random.normal(KEY, (16, 10)), "bias": jnp.zeros(10)},
}
MASKS = prunax.compute_masks(PARAMS, 0.75)


def widths(axes):
    return [patch.get_width() for patch in axes.patches]


def test_layers_are_bars_of_sparsity():
    figure = plots.layers(PARAMS, MASKS)
    left, right = figure.axes
    assert widths(left) == pytest.approx([75.0, 75.0])
    assert widths(right) == [288, 160, 72, 40]  # all weights, then those kept
    assert [t.get_text() for t in left.get_yticklabels()] == ["conv/kernel", "dense/kernel"]


@pytest.mark.parametrize("params", [PARAMS, prunax.apply_masks(PARAMS, MASKS)])
def test_weights_that_are_kept_are_drawn_and_the_others_counted(params):
    panel = plots.weights(params, MASKS).axes[1]
    assert panel.get_title() == "dense/kernel\n120 of 160 pruned (75.0%)"
    low, high = sorted(line.get_xdata()[0] for line in panel.get_lines())
    kernel = np.abs(np.asarray(PARAMS["dense"]["kernel"], np.float64))
    assert high == -low == kernel[np.asarray(MASKS["dense"]["kernel"])].min()
    assert sum(p.get_height() for p in panel.patches) == 40


def test_without_masks_weights_that_are_zero_are_the_pruned_ones():
    panel = plots.weights(prunax.apply_masks(PARAMS, MASKS)).axes[1]
    assert panel.get_title() == "dense/kernel\n120 of 160 pruned (75.0%)"


def test_schedule_shows_masks_lag_behind():
    figure = plots.schedule(schedules.polynomial(0.9, 10, 90, every=20), 120)
    curve, steps, dots = figure.axes[0].get_lines()
    assert curve.get_ydata()[-1] == steps.get_ydata()[-1] == pytest.approx(90)
    assert steps.get_ydata()[29] == pytest.approx(0) and curve.get_ydata()[29] > 10
    assert list(dots.get_xdata()) == [10, 30, 50, 70, 90]


def test_heat_map_leaves_out_what_is_not_finite():
    figure = plots.heat_map(["a", "b"], [0.5, 0.9], [[1.0, np.inf], [2.0, 3.0]])
    data = figure.axes[0].images[0].get_array()
    assert data.mask.tolist() == [[False, True], [False, False]]


def test_masks_keep_their_pattern_and_shape():
    masks = prunax.compute_masks(PARAMS, 0.5, pattern=patterns.Channel())
    conv, dense = plots.masks(masks).axes[:2]
    picture = conv.images[0].get_array()
    assert picture.shape == (36, 8)
    assert set(picture.sum(0).tolist()) == {0.0, 36.0}
    assert dense.get_xlabel() == "10 outputs"


def test_large_masks_are_averaged():
    mask = jnp.arange(1001 * 3).reshape(1001, 3) % 2 == 0
    picture = plots.masks({"kernel": mask}).axes[0].images[0].get_array()
    assert picture.shape == (334, 3)
    assert float(picture.mean()) == pytest.approx(0.5, abs=0.01)


def test_fronts_sort_their_points():
    figure = plots.fronts({"m": [(0.9, 1.0), (0.5, 2.0)]})
    line = figure.axes[0].get_lines()[0]
    assert line.get_xdata().tolist() == pytest.approx([2, 10])
    assert line.get_ydata().tolist() == [2.0, 1.0]


def test_fronts_draw_deviations():
    figure = plots.fronts({"m": [(0.9, 1.0, 0.25), (0.5, 2.0, 0.5)], "without": [(0.5, 1.0)]})
    (band,) = figure.axes[0].collections
    corners = {tuple(np.round(v, 6)) for v in band.get_paths()[0].vertices}
    assert {(2, 1.5), (2, 2.5), (10, 0.75), (10, 1.25)} <= corners


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.layers(PARAMS, MASKS),
        lambda: plots.schedule(0.5, 10),
        lambda: plots.fronts({f"method {i}": [(0.5, 1.0), (0.9, 0.5)] for i in range(9)}),
    ],
)
def test_legends_cover_nothing(figure):
    figure = figure()
    figure.draw_without_rendering()
    (legend,) = figure.legends
    for axes in figure.axes:
        assert not axes.get_legend()
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.layers({"bias": jnp.ones(3)}), "no leaf is prunable"),
        (lambda: plots.weights(PARAMS, MASKS, where=lambda p, x: "bias" in p), "selects no leaf"),
        (lambda: plots.schedule(0.5, 0), "steps must be positive, got 0"),
        (lambda: plots.heat_map(["a"], [0.5], [[1, 2]]), r"shape \(1, 1\).*got \(1, 2\)"),
        (lambda: plots.fronts({"m": [(1.0, 0.5)]}), r"'m' must lie in \[0, 1\)"),
        (lambda: plots.fronts({"m": [(0.5, 1.0), (0.6, 1.0, 0.1)]}), "some points of 'm'"),
        (lambda: plots.masks({"a": True}), "no mask has two axes"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'prunax\[plots\]'"):
        plots.layers(PARAMS, MASKS)


def test_page_is_one_file_that_escapes_and_warns():
    masks = jax.tree.map(jnp.zeros_like, MASKS["conv"]) | {}
    broken = {**PARAMS, "conv": {"kernel": PARAMS["conv"]["kernel"].at[0, 0, 0, 0].set(jnp.nan)}}
    page = reports.report_page(
        broken,
        {**MASKS, "conv": masks},
        title="<b>",
        sections={"Moved": prunax.compare_masks(MASKS, MASKS), "Notes": "a < b"},
    )
    assert "<b>" not in page and "&lt;b&gt;" in page and "a &lt; b" in page
    assert "Every weight is pruned" in page and ">not finite</td>" in page
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "100.00%" in page  # of the comparison


def test_page_names_a_section_of_the_wrong_kind():
    with pytest.raises(TypeError, match="'More' must be text, a matplotlib figure"):
        reports.report_page(PARAMS, MASKS, sections={"More": 3})


def test_a_notebook_shows_the_figure_without_pyplot():
    figure = plots.schedule(0.5, 10)
    assert figure._repr_png_().startswith(b"\x89PNG")
