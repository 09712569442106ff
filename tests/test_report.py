"""Summaries: counts by hand, JSON, the table."""

import json

import jax.numpy as jnp
import pytest

import prunax

PARAMS = {"dense": {"kernel": jnp.ones((4, 5)), "bias": jnp.zeros(5)}, "temperature": jnp.ones(())}
MASKS = prunax.compute_masks(PARAMS, 0.7)


def test_counts():
    summary = prunax.summarize(PARAMS, MASKS)
    assert (summary.weights, summary.kept) == (20, 6)
    assert (summary.parameters, summary.parameters_kept) == (26, 12)
    assert summary.sparsity == 0.7
    assert [(leaf.path, leaf.weights, leaf.kept, leaf.prunable) for leaf in summary.leaves] == [
        ("dense/bias", 5, 5, False),
        ("dense/kernel", 20, 6, True),
        ("temperature", 1, 1, False),
    ]


def test_without_masks_zeros_of_kernels_count_as_pruned():
    summary = prunax.summarize(prunax.apply_masks(PARAMS, MASKS))
    assert (summary.weights, summary.kept, summary.parameters_kept) == (20, 6, 12)


def test_scalar_masks():
    summary = prunax.summarize(
        PARAMS, {"dense": {"kernel": True, "bias": True}, "temperature": False}
    )
    assert (summary.weights, summary.kept, summary.sparsity) == (1, 0, 1.0)


def test_dict_is_json():
    content = prunax.summarize(PARAMS, MASKS).to_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["leaves"][1] == {
        "path": "dense/kernel",
        "shape": [4, 5],
        "dtype": "float32",
        "weights": 20,
        "kept": 6,
        "prunable": True,
        "sparsity": 0.7,
    }
    assert content["prunable"] == {"weights": 20, "kept": 6, "sparsity": 0.7}
    assert content["total"]["weights"] == 26 and content["total"]["sparsity"] == pytest.approx(
        14 / 26
    )


def test_brackets_in_a_table_are_no_markup():
    table = prunax.reports.Table(("a[b]", "c"), [("E[g]", "[bold]x[/bold]")], title="T[x]")
    lines = str(table).splitlines()
    assert lines[0].strip() == "T[x]"
    assert "a[b]" in lines[2]
    assert "E[g]" in lines[4] and "[bold]x[/bold]" in lines[4]


def test_table():
    text = str(prunax.summarize(PARAMS, MASKS))
    rows = {line.split()[1]: line for line in text.splitlines() if "│" in line}
    assert "4 x 5" in rows["dense/kernel"] and "70.00%" in rows["dense/kernel"]
    assert "70.00%" in rows["prunable"]
    assert "53.85%" in rows["total"]
    assert "%" not in rows["dense/bias"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
def test_dtypes_and_empty_leaves(dtype):
    params = {"kernel": jnp.ones((3, 4), dtype), "empty": jnp.ones((0, 4), dtype)}
    masks = {"kernel": jnp.eye(3, 4, dtype=jnp.bool_), "empty": jnp.ones((0, 4), jnp.bool_)}
    summary = prunax.summarize(params, masks)
    assert (summary.weights, summary.kept, summary.leaves[1].dtype) == (
        12,
        3,
        jnp.dtype(dtype).name,
    )
    assert summary.leaves[0].sparsity == 0.0


def test_nothing_to_count():
    summary = prunax.summarize({"name": "x"})
    assert (summary.weights, summary.sparsity, summary.leaves) == (0, 0.0, ())
    assert str(summary)


def test_masks_of_another_shape_are_named():
    with pytest.raises(
        ValueError,
        match=r"summarize: the mask of 'kernel' has shape \(1, 4\), the leaf has \(3, 4\)",
    ):
        prunax.summarize({"kernel": jnp.ones((3, 4))}, {"kernel": jnp.ones((1, 4), jnp.bool_)})


def test_masks_of_another_tree_are_named():
    with pytest.raises(
        ValueError, match=r"summarize: the masks must have .*'dense/bias' is missing"
    ):
        prunax.summarize(PARAMS, {"dense": {"kernel": True}, "temperature": True})


def test_packed_masks_of_the_shape_of_the_leaf_are_not_counted_as_bool():
    # One row packs into one row of bytes: only the dtype tells.
    with pytest.raises(
        TypeError, match=r"summarize: the mask of 'kernel' must be bool, got uint8.*get_masks"
    ):
        prunax.summarize({"kernel": jnp.ones((1, 4))}, {"kernel": jnp.ones((1, 4), jnp.uint8)})


def test_markdown_and_html():
    summary = prunax.summarize(PARAMS, MASKS)
    lines = summary.to_markdown().splitlines()
    assert lines[0] == "| leaf | shape | dtype | weights | kept | sparsity |"
    assert lines[1] == "| --- | --- | --- | ---: | ---: | ---: |"
    assert lines[3] == "| dense/kernel | 4 x 5 | float32 | 20 | 6 | 70.00% |"
    assert lines[-1].startswith("| **total** |")
    page = summary._repr_html_()
    assert page.count("<tr>") == 1 + 3 + 2 and ">dense/kernel</td>" in page


def test_html_escapes_what_paths_hold():
    page = prunax.summarize({"<script>alert(1)</script>": jnp.ones(3)})._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_comparison_counts_what_moved():
    before = {"a": jnp.array([True, True, False, False]), "b": jnp.ones((), bool)}
    after = {"a": jnp.array([True, False, True, False]), "b": jnp.ones((), bool)}
    comparison = prunax.compare_masks(before, after)
    (leaf,) = comparison.leaves
    assert (leaf.path, leaf.weights, leaf.both, leaf.removed, leaf.added) == ("a", 4, 1, 1, 1)
    assert leaf.overlap == pytest.approx(1 / 3)
    assert prunax.compare_masks(before, before).total.overlap == 1.0
    assert json.loads(json.dumps(comparison.to_dict())) == comparison.to_dict()
    assert "33.33%" in str(comparison) and "33.33%" in comparison.to_markdown()
    whole = prunax.compare_masks({"a": True, "b": True}, before)  # scalars stand for all weights
    assert (whole.total.both, whole.total.removed) == (2, 2)


def test_comparison_names_what_does_not_fit():
    a = {"kernel": jnp.ones((2, 3), bool)}
    with pytest.raises(ValueError, match=r"'kernel' have shapes \(2, 3\) and \(3, 2\)"):
        prunax.compare_masks(a, {"kernel": jnp.ones((3, 2), bool)})
    with pytest.raises(TypeError, match=r"'kernel' must be bool, got uint8.*get_masks"):
        prunax.compare_masks(a, {"kernel": jnp.ones((2, 3), jnp.uint8)})
    with pytest.raises(ValueError, match=r"compare_masks: .*'kernel'"):
        prunax.compare_masks(a, {"other": jnp.ones((2, 3), bool)})


def test_starved_leaves_are_named_where_the_network_keeps_more():
    params = {"first": jnp.ones((10, 10)), "second": jnp.ones((30, 30)), "third": jnp.ones((5, 4))}
    kept = {"first": 4, "second": 100, "third": 1}
    masks = {p: jnp.arange(x.size).reshape(x.shape) < kept[p] for p, x in params.items()}
    summary = prunax.summarize(params, masks)
    assert summary.starved == ("first",)  # 4%; the third keeps 5%, and all keep 10%
    assert summary.to_dict()["starved"] == ["first"]
    for text in (str(summary), summary.table().html()):
        assert "first: fewer than 5% of the weights are left" in text.replace("\n", " ")
    few = prunax.summarize(params, masks | {"second": jnp.zeros((30, 30), bool)})
    assert few.starved == () and "fewer than" not in str(few)
