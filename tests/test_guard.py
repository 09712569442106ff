"""Screening finds what was put there, and nothing else."""

import jax
import jax.numpy as jnp
import pytest

import prunax
from prunax import reports

KERNEL = jax.random.normal(jax.random.key(0), (32, 16))


def kinds(findings):
    return [(f.path, f.kind, f.number) for f in findings]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_good_batches_and_params_are_quiet(dtype):
    batch = {
        "image": jnp.linspace(0, 1, 12).astype(dtype).reshape(3, 4),
        "label": jnp.zeros(3, jnp.int32),
    }
    assert reports.screen_batch(batch, low=0.0, high=1.0) == ()
    params = {"kernel": KERNEL.astype(dtype), "bias": jnp.zeros(16, dtype)}
    assert reports.screen_params(params) == ()
    assert reports.screen_params(params, prunax.compute_masks(params, 0.5)) == ()


def test_batches():
    batch = {
        "broken": jnp.array([1.0, jnp.inf, jnp.nan, 0.5]),
        "constant": jnp.full((2, 3), 0.25),
        "raw": jnp.array([0.0, 255.0, 128.0]),
        "one": jnp.array([0.5]),
    }
    findings = reports.screen_batch(batch, low=0.0, high=1.0)
    assert kinds(findings) == [
        ("broken", "not finite", 2),
        ("constant", "constant", 6),
        ("raw", "out of range", 2),
    ]
    assert "from 0 to 255" in findings[2].detail


def test_batches_are_compared_with_a_good_one():
    key = jax.random.split(jax.random.key(1), 4)
    good = {
        "image": jax.random.uniform(key[0], (500, 6, 6)),
        "label": jax.random.randint(key[1], (500,), 0, 10),
    }
    batch = {
        "image": jax.random.uniform(key[2], (64, 6, 6)),
        "label": jax.random.randint(key[3], (64,), 0, 10),
    }
    assert reports.screen_batch(batch, like=good) == ()

    def found(**changed):
        return kinds(reports.screen_batch({**batch, **changed}, low=0.0, high=1.0, like=good))

    image, label = batch["image"], batch["label"]
    assert found(image=image / 255)[0] == ("image", "shifted", 64)
    assert found(image=image.at[3].set(image[3] ** 9).at[5].multiply(-3))[-1] == (
        "image",
        "unlike the others",
        1,
    )
    assert ("image", "repeated", 64) in found(image=jnp.broadcast_to(image[:1], image.shape))
    assert found(label=label // 5) == [("label", "shifted", 64)]
    assert found(label=(label + 1) % 10) == []  # as often as before: nothing tells
    with pytest.raises(ValueError, match=r"screen_batch: .*'label'"):
        reports.screen_batch(batch, like={"image": image})


def test_params():
    masks = {
        "broken": jnp.ones((32, 16), bool),
        "empty": jnp.zeros((32, 16), bool),
        "idle": jnp.ones((32, 16), bool).at[:, 3].set(False),
        "loud": jnp.ones((32, 16), bool),
        "pruned loud": jnp.ones((32, 16), bool).at[0, 0].set(False),
        "bias": jnp.ones((), bool),
    }
    params = dict.fromkeys(masks, KERNEL)
    params["broken"] = KERNEL.at[1, 2].set(jnp.nan)
    params["loud"] = KERNEL.at[0, 0].set(1e4)
    params["pruned loud"] = params["loud"]
    params["bias"] = jnp.zeros(16)
    findings = reports.screen_params(params, masks, outlier=20)
    assert kinds(findings) == [
        ("broken", "not finite", 1),
        ("empty", "empty", 512),
        ("idle", "units without weights", 1),
        ("loud", "outliers", 1),
    ]
    text = reports.findings_table(findings).markdown()
    assert "| empty | empty | Every weight is pruned" in text


@pytest.mark.parametrize("value", [50.0, 1e38])
def test_an_outlier_hides_neither_itself_nor_in_a_small_layer(value):
    params = {"kernel": KERNEL[:6, :6].at[2, 3].set(value)}
    assert kinds(reports.screen_params(params)) == [("kernel", "outliers", 1)]


def test_zeros_count_as_pruned_without_masks():
    params = {"kernel": KERNEL.at[:, :2].set(0.0), "bias": jnp.zeros(16)}
    assert kinds(reports.screen_params(params)) == [("kernel", "units without weights", 2)]


def test_masks_of_another_tree_are_named():
    with pytest.raises(ValueError, match=r"screen_params: .*'kernel'"):
        reports.screen_params({"kernel": KERNEL}, {"other": True})


def test_page_shows_findings():
    params = {"kernel": KERNEL}
    page = prunax.reports.report_page(params, {"kernel": jnp.zeros((32, 16), bool)})
    assert "nothing passes through the layer" in page
    page = prunax.reports.report_page(params, prunax.compute_masks(params, 0.5))
    assert "Nothing unusual" in page
