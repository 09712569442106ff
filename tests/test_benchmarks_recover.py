"""The rows of `benchmarks.recover` on a small Llama: what each step starts from, and that it brings something back."""

import argparse

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prunax
from benchmarks import recover, smollm, texts

CONFIG = smollm.Config(
    layers=3, width=24, hidden=48, heads=6, kv_heads=3, head_width=4, vocabulary=50
)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    calibration = [jnp.asarray(rng.integers(0, 50, (4, 16)), jnp.int32) for _ in range(2)]
    training = rng.integers(0, 50, (32, 16)).astype(np.int32)
    return recover.Data(calibration, training, {"16 noise": training[:8]})


@pytest.fixture(scope="module")
def dense(data):
    params = smollm.Llama(CONFIG).init(jax.random.key(0), data.calibration[0])["params"]
    return recover.Network(params, None, CONFIG, (0, 1, 2))


@pytest.mark.relaxed_promotion
def test_a_row_step_by_step(dense, data, tmp_path):
    row = "60% both refined distilled"
    args = argparse.Namespace(work=tmp_path, minutes=9, rate=1e-3)
    known = {"dense": dense}
    errors = {}
    for step in recover.needed(row):
        known[step], curve = recover.make(step, known, data, args)
        logits = [n.apply(n.params, data.calibration[0]) for n in (dense, known[step])]
        errors[step] = float(jnp.mean(jnp.square(logits[0] - logits[1])))
    first, refined, _ = list(errors.values())[-3:]
    assert refined < first
    assert curve[-1]["tokens"] == data.training.size
    network = known[row]
    sizes = [sum(x.size for x in jax.tree.leaves(n.params)) for n in (dense, network)]
    assert abs(sizes[1] / sizes[0] - 0.6) < 0.05
    assert network.config.layers == len(network.layers) == 2
    record = recover.measured(row, network, data, tmp_path / "row.safetensors")
    read = recover.read(tmp_path / "row.safetensors", record, dense)
    jax.tree.map(np.testing.assert_array_equal, read.params, network.params)
    assert read.masks is None and read.config == network.config
    record |= {"seconds": 1.0, "memory": None, "curve": curve}
    tables = recover.tables({"records": [record | {"row": "dense"}, record]})
    assert len(tables["recover"].rows) == 2


@pytest.mark.relaxed_promotion
def test_calibrated_distils_once_through_the_windows_of_calibration(dense, data, tmp_path):
    row = "50% SparseGPT refined-once calibrated"
    sparse = recover.sparse(dense, "50%", "SparseGPT", data, correction=0.0)
    args = argparse.Namespace(work=tmp_path, minutes=9, rate=1e-3)
    tuned, curve = recover.make(row, {"dense": dense, row.rpartition(" ")[0]: sparse}, data, args)
    assert curve[-1]["tokens"] == sum(b.size for b in data.calibration)
    moved = [
        bool((a != b).any())
        for a, b in zip(*map(jax.tree.leaves, (tuned.params, sparse.params)), strict=True)
    ]
    assert all(moved)
    chex.assert_tree_all_finite(tuned.params)
    chex.assert_trees_all_equal(tuned.params, prunax.apply_masks(tuned.params, sparse.masks))


def test_some_tokens_are_replaced_by_random_ones(data):
    rows = np.concatenate(data.calibration)
    noisy = recover.noisy(data, vocabulary=50)
    assert noisy.shape == rows.shape and noisy.dtype == rows.dtype
    assert noisy.min() >= 0 and noisy.max() < 50
    assert 0 < (noisy != rows).mean() < 0.3
    assert np.array_equal(noisy, recover.noisy(data, vocabulary=50))


def test_texts_are_cut_into_parts_that_share_nothing():
    own, held_out = texts.parts({"a": "0123456789"})
    assert (own["a"], held_out["a"]) == ("0123456", "789")
