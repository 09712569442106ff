"""Block refinement: against values by hand, unrolled and scanned, smaller networks, kills, NaN."""

import os
import re
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunax import calibration, structured


def layer(p, x):
    normed = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"]
    return x + jax.nn.relu(normed @ p["up"]) @ p["down"]


def unrolled(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = layer(p, x)
    return x @ params["out"]


def scanned(params, tokens):
    x = params["embed"][tokens]
    # Of stacks as they are, and of converted ones.
    stacks = params["layers"] | {"up": params["layers"]["up"].astype(jnp.float32)}
    x, _ = jax.lax.scan(lambda x, p: (layer(p, x), None), x, stacks)
    return x @ params["out"]


@pytest.fixture(scope="module")
def dense():
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def one():
        up, down = (jax.random.normal(next(keys), s) / 3 for s in ((8, 16), (16, 8)))
        return {"scale": jnp.ones((1, 1, 8)), "up": up, "down": down}

    embed, out = (jax.random.normal(next(keys), s) for s in ((20, 8), (8, 20)))
    return {"embed": embed, "layers": [one() for _ in range(3)], "out": out}


@pytest.fixture(scope="module")
def batches():
    return [jax.random.randint(jax.random.key(n), (4, 8), 0, 20) for n in range(2)]


@pytest.fixture(scope="module")
def pruned(dense, batches):
    return calibration.wanda(unrolled, dense, batches, 0.5)


def stacked(tree):
    return tree | {
        "layers": jax.tree.map(lambda *x: jnp.stack(x) if x[0].ndim else x[0], *tree["layers"])
    }


def assert_equal(a, b):
    chex.assert_trees_all_equal(a, b)


def test_one_step_by_hand():
    # One weight w, kept, towards the dense 3 on the input 2: the loss (2w - 6)^2, its derivative 4 (2w - 6) = -16 at 1.
    params = {"layers": [jnp.array([[1.0], [5.0]])]}
    masks = {"layers": [jnp.array([[True], [False]])]}
    dense = {"layers": [jnp.array([[3.0], [0.0]])]}
    refined = calibration.refine(
        lambda p, x: x @ p["layers"][0],
        params,
        masks,
        [jnp.array([[2.0, 7.0]])],
        blocks="layers/*",
        teacher=dense,
        steps=1,
        optimizer=optax.sgd(0.1),
        loss=lambda outputs, targets: jnp.sum((outputs - targets) ** 2),
    )
    np.testing.assert_allclose(refined.params["layers"][0], [[2.6], [0.0]], rtol=1e-6)
    (block,) = refined.blocks
    np.testing.assert_allclose([block.before, block.after], [16.0, 0.64], rtol=1e-5)


def test_each_block_comes_nearer_and_zeros_stay(dense, batches, pruned):
    options = {"blocks": "layers/*", "teacher": dense, "steps": 12}
    refined = calibration.refine(unrolled, *pruned, batches, **options)
    assert [b.name for b in refined.blocks] == ["layers/0", "layers/1", "layers/2"]
    assert all(b.after < 0.9 * b.before and not b.skipped for b in refined.blocks)
    held = zip(*map(jax.tree.leaves, (refined.params, pruned.masks)), strict=True)
    assert all(bool(jnp.all(jnp.where(m, True, x == 0))) for x, m in held)
    # What lies in no block stays.
    assert_equal(refined.params["out"], pruned.params["out"])
    outputs = [unrolled(p, batches[0]) for p in (dense, pruned.params, refined.params)]
    assert jnp.sum((outputs[2] - outputs[0]) ** 2) < 0.8 * jnp.sum((outputs[1] - outputs[0]) ** 2)
    again = calibration.refine(unrolled, *pruned, batches, **options)
    assert_equal(again, refined)


@pytest.mark.parametrize("blocks", ["layers/*", [f"layers/{i}" for i in range(3)]])
def test_stacks_as_layers_one_by_one(dense, batches, pruned, blocks):
    plain = calibration.refine(unrolled, *pruned, batches, blocks=blocks, teacher=dense, steps=4)
    params, masks = map(stacked, pruned)
    rows = calibration.refine(
        scanned, params, masks, batches, blocks=blocks, teacher=stacked(dense), steps=4
    )
    assert rows.blocks == plain.blocks
    assert_equal(rows.params, stacked(plain.params))


def test_names_of_a_checkpoint(dense, batches):
    flat = {f"model.layers.{i}.{n}": x for i, p in enumerate(dense["layers"]) for n, x in p.items()}
    flat |= {name: dense[name] for name in ("embed", "out")}

    def fn(params, tokens):
        layers = [
            {n: params[f"model.layers.{i}.{n}"] for n in ("scale", "up", "down")} for i in range(3)
        ]
        return unrolled(params | {"layers": layers}, tokens)

    pruned = calibration.wanda(fn, flat, batches, 0.5)
    refined = calibration.refine(
        fn, *pruned, batches, blocks="model.layers.*", teacher=flat, steps=4
    )
    assert [b.name for b in refined.blocks] == [f"model/layers/{i}" for i in range(3)]
    assert all(b.after < b.before for b in refined.blocks)


def test_from_dense_params_and_masks_and_in_low_precision(dense, batches, pruned):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dense)
    refined = calibration.refine(unrolled, low, pruned.masks, batches, blocks="layers/*")
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(refined.params))
    assert all(b.after < b.before for b in refined.blocks)


def test_smaller_networks(dense, batches):
    shallow = structured.prune_depth(unrolled, dense, batches[0], remove=["layers/1"])
    options = {"teacher": (unrolled, dense), "steps": 8}
    refined = calibration.refine(
        shallow.fn,
        shallow.params,
        None,
        batches,
        blocks={"layers/0": "layers/1", "layers/1": "layers/2"},  # the first does the work of two
        **options,
    )
    assert all(b.after < b.before for b in refined.blocks)
    with pytest.raises(ValueError, match="Say which belong together"):
        calibration.refine(shallow.fn, shallow.params, None, batches, blocks="layers/*", **options)
    thin = dense | {
        "layers": [p | {"up": p["up"][:, :8], "down": p["down"][:8]} for p in dense["layers"]]
    }
    refined = calibration.refine(unrolled, thin, None, batches, blocks="layers/*", **options)
    assert all(b.after < b.before for b in refined.blocks)


def test_derivatives_that_a_function_brings_along_are_used(batches):
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))
    params = {"layers": [jnp.full((4, 4), 0.4)], "head": jnp.eye(4)}
    teacher = {"layers": [jnp.full((4, 4), 2.0)], "head": jnp.eye(4)}
    refined = calibration.refine(
        lambda p, x: rounded(x @ p["layers"][0]) @ p["head"],
        params,
        None,
        [jnp.ones((2, 4))],
        blocks="layers/*",
        teacher=teacher,
        steps=30,
        optimizer=optax.adam(0.1),
    )
    assert refined.blocks[0].after < 0.1 * refined.blocks[0].before


KILLED = """
    import os, sys, jax
    from prunax import calibration
    from tests.test_calibration_refine import *

    make = dense.__wrapped__(), batches.__wrapped__()
    pruned = calibration.wanda(unrolled, *make, 0.5)
    saved = calibration._saved_blocks.Saved.write
    def write(self, k, *rest):
        saved(self, k, *rest)
        if k == 1:
            os.kill(os.getpid(), 9)
    calibration._saved_blocks.Saved.write = write
    calibration.refine(unrolled, *pruned, make[1], blocks="layers/*", teacher=make[0], checkpoint=sys.argv[1])
"""


def test_goes_on_after_a_kill(dense, batches, pruned, tmp_path):
    folder = tmp_path / "blocks"
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder)]
    assert subprocess.run(script, env=os.environ | {"PYTHONPATH": "."}).returncode == -9
    assert sorted(os.listdir(folder)) == ["00000.npz", "00001.npz"]
    options = {"blocks": "layers/*", "teacher": dense}
    whole = calibration.refine(unrolled, *pruned, batches, **options)
    stamps = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    resumed = calibration.refine(unrolled, *pruned, batches, **options, checkpoint=folder)
    assert all(f.stat().st_mtime_ns == stamp for f, stamp in stamps.items())
    assert_equal(resumed, whole)
    with pytest.raises(ValueError, match="is of another run"):
        calibration.refine(unrolled, *pruned, batches[:1], **options, checkpoint=folder)
    other = (
        {"optimizer": optax.sgd(0.1)},
        {"loss": lambda made, wanted: jnp.max(abs(made - wanted))},
    )
    for choice in other:
        with pytest.raises(ValueError, match="is of another run"):
            calibration.refine(unrolled, *pruned, batches, **options, **choice, checkpoint=folder)


def test_steps_that_are_not_finite_are_left_out(dense, batches, pruned):
    options = {"blocks": "layers/*", "teacher": dense, "steps": 4}

    def steep(outputs, targets):
        # The loss is finite, and its gradient is not: that of a root at 0.
        root = jnp.sqrt(jnp.square(outputs[0, 0, 0] - jax.lax.stop_gradient(outputs[0, 0, 0])))
        return jnp.mean((outputs - targets) ** 2) + root

    with pytest.warns(UserWarning, match=r"left out: layers/0 \(4 of 4\), layers/1 \(4 of 4\)"):
        refined = calibration.refine(unrolled, *pruned, batches, **options, loss=steep)
    assert [b.skipped for b in refined.blocks] == [4, 4, 4]
    assert_equal(refined.params, pruned.params)


def test_nan_in_one_block_is_said_with_its_batch(dense, batches, pruned, tmp_path):
    def fn(params, batch):
        tokens, poison = batch
        x = params["embed"][tokens]
        for i, p in enumerate(params["layers"]):
            x = layer(p, x)
            x = x + poison if i == 1 else x
        return x @ params["out"]

    two = [(batches[0], jnp.zeros(())), (batches[1], jnp.array(jnp.nan))]
    options = {"blocks": "layers/*", "teacher": dense, "checkpoint": tmp_path / "blocks"}
    with pytest.raises(ValueError, match=r"'layers/1' makes of batch 1 is not finite"):
        calibration.refine(fn, *pruned, two, **options)
    assert os.listdir(tmp_path / "blocks") == ["00000.npz"]  # what was done is not lost


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("nope/*", "matches no weight that meets an activation. They are: embed, layers/0/"),
        (["layers/0", "nope"], "blocks='nope' matches no weight"),
        (["layers/*/up", "layers/*/down"], "are not one after the other"),
        (["layers/0", "layers/*"], "lies in two blocks"),
    ],
)
def test_blocks_that_are_none(dense, batches, pruned, blocks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        calibration.refine(unrolled, *pruned, batches, blocks=blocks, teacher=dense)


def test_batches_are_cut_into_parts(dense, batches, pruned):
    options = {"blocks": "layers/*", "teacher": dense, "steps": 4}
    one = calibration.refine(unrolled, *pruned, [jnp.concatenate(batches)], size=2, **options)
    rows = [row[None] for batch in batches for row in batch]
    two = [jnp.concatenate(rows[i : i + 2]) for i in range(0, 8, 2)]
    assert_equal(one, calibration.refine(unrolled, *pruned, two, size=2, **options))
    # A function that knows the length of its batches gets them whole.
    stubborn = lambda params, tokens: unrolled(params, tokens.reshape(4, 8))  # noqa: E731
    whole = calibration.refine(stubborn, *pruned, batches, **options)
    assert_equal(whole, calibration.refine(unrolled, *pruned, batches, size=4, **options))


def test_what_does_not_fit(dense, batches, pruned):
    options = {"blocks": "layers/*"}
    with pytest.raises(ValueError, match="needs at least one batch"):
        calibration.refine(unrolled, *pruned, [], **options, teacher=dense)
    with pytest.raises(ValueError, match="Pass the dense params too"):
        calibration.refine(unrolled, *pruned, batches, **options)
    with pytest.raises(ValueError, match="no dense network"):
        calibration.refine(unrolled, dense, None, batches, **options)
    wrong = pruned.masks | {"out": jnp.ones((2, 2), bool)}
    with pytest.raises(ValueError, match="the mask of 'out' has shape"):
        calibration.refine(unrolled, pruned.params, wrong, batches, **options, teacher=dense)
