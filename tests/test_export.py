"""Files of masks and params: what comes back is what went in, in every dtype and tree."""

import json
import os
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import prunax
from prunax import export
from prunax.export import _container, _encoding, _store
from prunax.patterns import NM, Block, Channel, ConstantFanIn, Unstructured

DTYPES = sorted(_encoding.DTYPES)


def random_bits(shape, dtype, seed=0, zeros=0.0):
    """An array of random bits, a part of its elements zero."""
    rng = np.random.default_rng(seed)
    high = 2 if dtype == np.bool_ else 256
    data = rng.integers(0, high, (int(np.prod(shape)), dtype.itemsize)).astype(np.uint8)
    data[rng.random(len(data)) < zeros] = 0
    return data.reshape(-1).view(dtype).reshape(shape)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- encoding -------------------------------------------------------------------------------------------------------


def test_encoding_by_hand():
    w = np.array([0, 0, 5, 0, 0, 0, 0, 0, -1], np.int16)
    assert np.concatenate(_encoding.encode(w)).tolist() == [4, 1] + 6 * [0] + [
        5,
        0,
        255,
        255,
    ] + 4 * [0]
    # 9 bits in 2 bytes, 2 elements in 4, each filled up to 8.
    assert _encoding.encoded_size(w) == 16


@given(
    name=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_encoding_round_trip(name, shape, zeros, seed):
    array = random_bits(shape, _encoding.DTYPES[name], seed, zeros)
    data = np.concatenate(_encoding.encode(array))
    assert data.size == _encoding.encoded_size(array) and data.size % 8 == 0
    decoded = _encoding.decode(data, array.shape, array.dtype)
    assert decoded.tobytes() == array.tobytes() and decoded.shape == shape


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([4, 1, 0, 0, 0, 0, 0, 0, 5, 0, 255, 255], "12 bytes"),
        ([4], "the bits alone take 2"),
        ([4, 3] + 6 * [0] + [5, 0, 255, 255] + 4 * [0], "behind the last"),
        ([4, 0] + 6 * [0] + [5, 0, 255, 255] + 4 * [0], "filling is not zero"),
        ([4, 1] + 6 * [0] + [5, 0, 0, 0] + 4 * [0], "kept is zero"),
        ([4, 1, 1, 0, 0, 0, 0, 0, 5, 0, 255, 255] + 4 * [0], "filling is not zero"),
    ],
)
def test_decoding_refuses(data, problem):
    with pytest.raises(ValueError, match=problem):
        _encoding.decode(np.array(data, np.uint8), (9,), np.dtype(np.int16))


# --- params ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_params_of_every_dtype(tmp_path, zeros):
    params = {
        name: [random_bits(shape, dtype, i, zeros) for i, shape in enumerate([(7, 5), (), (0, 3)])]
        for name, dtype in _encoding.DTYPES.items()
    }
    export.save_params(tmp_path / "x", params)
    assert_same(export.load_params(tmp_path / "x", params), params)
    flat = export.load_params(tmp_path / "x")
    assert list(flat) == prunax.trees.paths(params)
    assert flat["bfloat16/0"].tobytes() == params["bfloat16"][0].tobytes()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_zeros_and_nans_of_every_kind_on_devices(tmp_path, name):
    dtype = _encoding.DTYPES[name]
    bits = np.dtype(f"u{dtype.itemsize}")
    every = np.arange(2 ** min(16, 8 * dtype.itemsize), dtype=np.uint32)
    every = (every << (16 if dtype.itemsize == 4 else 0)).astype(bits).view(dtype)
    params = {"w": jnp.asarray(np.concatenate([np.zeros(10 * every.size, dtype), every]))}
    export.save_params(tmp_path / "x", params)
    assert os.path.getsize(tmp_path / "x") < 0.5 * params["w"].nbytes
    loaded = export.load_params(tmp_path / "x", jax.eval_shape(lambda: params))
    assert isinstance(loaded["w"], jax.Array)
    assert_same(loaded, params)


@pytest.mark.parametrize(("sparsity", "ratio"), [(0.5, 0.60), (0.9, 0.16)])
def test_size(tmp_path, sparsity, ratio):
    params = {"kernel": jax.random.normal(jax.random.key(0), (256, 256))}
    pruned = prunax.apply_masks(params, prunax.compute_masks(params, sparsity))
    export.save_params(tmp_path / "x", pruned)
    safetensors.numpy.save_file({"kernel": np.asarray(pruned["kernel"])}, tmp_path / "plain")
    assert os.path.getsize(tmp_path / "x") <= ratio * os.path.getsize(tmp_path / "plain")


def test_what_does_not_pay_is_stored_plain(tmp_path):
    dense = np.ones((8, 8), np.float32)
    export.save_params(
        tmp_path / "x", {"dense": dense, "sparse": dense * np.eye(8, dtype=np.float32)}
    )
    with _store.ArrayReader(tmp_path / "x") as reader:
        assert {n: s.encoding for n, s in reader.leaves.items()} == {
            "dense": "plain",
            "sparse": "bits",
        }
    # Any library can open the file, and read what is plain.
    with safetensors.safe_open(tmp_path / "x", "np") as file:
        assert sorted(file.keys()) == ["dense", "sparse"]
        np.testing.assert_array_equal(file.get_tensor("dense"), dense)


class Point(NamedTuple):
    x: Any
    y: Any


def trees():
    key = jax.random.key(0)
    linen = nn.Dense(3).init(key, jnp.ones((1, 4)))
    return {
        "linen": linen,
        "nnx": nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0))),
        "equinox": eqx.nn.MLP(4, 3, 5, 1, key=key),
        "named tuple": Point([jnp.ones(3), None], {"a": (jnp.zeros((2, 2)),)}),
        "bare": jnp.ones((3, 3)),
        "empty": {},
        "optimizer": optax.adam(1e-3).init(linen),
    }


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("kind", trees())
def test_any_tree(tmp_path, kind):
    tree = trees()[kind]
    export.save_params(tmp_path / "x", tree)
    assert_same(
        jax.tree.map(
            jnp.asarray, eqx.filter(export.load_params(tmp_path / "x", tree), eqx.is_array)
        ),
        eqx.filter(tree, eqx.is_array),
    )


def test_numbers_are_stored_and_other_leaves_are_taken_from_like(tmp_path):
    export.save_params(
        tmp_path / "x", {"scale": 0.1, "steps": 2**40, "on": True, "f": jnp.tanh, "n": "text"}
    )
    like = {"scale": 0.0, "steps": 0, "on": False, "f": jnp.sin, "n": "other"}
    loaded = export.load_params(tmp_path / "x", like)
    assert loaded == {"scale": 0.1, "steps": 2**40, "on": True, "f": jnp.sin, "n": "other"}


def test_big_endian_arrays_keep_their_values(tmp_path):
    export.save_params(tmp_path / "x", {"w": np.array([1.5, 0.0, 2.5] * 9, ">f4")})
    loaded = export.load_params(tmp_path / "x")["w"]
    assert loaded.dtype == np.float32 and loaded.tolist() == [1.5, 0.0, 2.5] * 9


def test_arrays_in_any_memory_order(tmp_path):
    w = np.arange(24.0).reshape(2, 3, 4)
    params = {
        "fortran": np.asfortranarray(w),
        "transposed": w.T,
        "every other": w[:, ::2],
        "broadcast": np.broadcast_to(w[0], w.shape),
    }
    export.save_params(tmp_path / "x", params)
    for name, array in export.load_params(tmp_path / "x").items():
        np.testing.assert_array_equal(array, params[name])


def test_wide_dtypes_are_not_narrowed(tmp_path):
    params = {"w": np.array([1 / 3])}
    export.save_params(tmp_path / "x", params)
    assert export.load_params(tmp_path / "x", params)["w"] == 1 / 3
    with pytest.raises(
        ValueError, match=r"'w' is float64, which JAX would narrow. Enable jax_enable_x64"
    ):
        export.load_params(tmp_path / "x", {"w": jax.ShapeDtypeStruct((1,), np.float64)})


def test_sharding_follows_like(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    params = {"kernel": jax.device_put(jnp.arange(32.0).reshape(8, 4), sharding)}
    export.save_params(tmp_path / "x", params)
    export.save_masks(tmp_path / "m", prunax.compute_masks(params, 0.5))
    assert export.load_params(tmp_path / "x", params)["kernel"].sharding == sharding
    assert export.load_masks(tmp_path / "m", params)["kernel"].sharding == sharding


@pytest.mark.parametrize(
    ("tree", "error", "match"),
    [
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, ValueError, "two leaves have the path 'a/b'"),
        ({"__metadata__": np.ones(1)}, ValueError, "Rename the leaf"),
        ({"\ud800": np.ones(1)}, ValueError, "no valid text"),
        ({"rng": jax.random.key(0)}, TypeError, "'rng' is a typed random key"),
        ({"x": np.array([{}, "text"])}, TypeError, "'x' is object, which is no dtype of numbers"),
        ({"x": np.array(["text"])}, TypeError, "'x' is <U4"),
        ({"x": 2**100}, TypeError, "'x' is object"),
        ({"x": np.zeros(2, [("a", "f4")])}, TypeError, "no dtype of numbers"),
    ],
)
def test_save_params_refuses(tmp_path, tree, error, match):
    with pytest.raises(error, match=match):
        export.save_params(tmp_path / "x", tree)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("like", "match"),
    [
        ({"a": np.ones((2, 3), np.float32)}, "holds 'b/0', which `like` lacks"),
        ({"a": np.ones((2, 3), np.float32), "c": 1.0}, "'c' is not in"),
        (
            {"a": np.ones((3, 2), np.float32), "b": [1]},
            r"'a' in .* is float32 \(2, 3\), the leaf of `like`",
        ),
        ({"a": np.ones((2, 3), np.float16), "b": [1]}, "the leaf of `like` is float16"),
        ({"a": np.ones((2, 3), np.float32), "b": [1.0]}, "'b/0' in .* is int64"),
    ],
)
def test_load_params_refuses_other_trees(tmp_path, like, match):
    export.save_params(tmp_path / "x", {"a": np.ones((2, 3), np.float32), "b": [1]})
    with pytest.raises(ValueError, match=match):
        export.load_params(tmp_path / "x", like)


# --- masks ----------------------------------------------------------------------------------------------------------


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_masks_round_trip(tmp_path_factory, shapes, seed):
    rng = np.random.default_rng(seed)
    masks = [jnp.asarray(rng.random(shape) < 0.5) for shape in shapes]
    file = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    export.save_masks(file, masks)
    assert_same(export.load_masks(file, masks), masks)
    with _store.ArrayReader(file) as reader:
        for i, shape in enumerate(shapes):
            assert reader.reader.entries[str(i)].nbytes == -(-int(np.prod(shape)) // 8)


def test_masks_of_a_model_and_metadata(tmp_path):
    params = nn.Dense(8).init(jax.random.key(0), jnp.ones((1, 16)))
    masks = prunax.compute_masks(params, pattern=NM(2, 4))
    export.save_masks(tmp_path / "m", masks, pattern=NM(2, 4), sparsity=0.5)
    assert_same(export.load_masks(tmp_path / "m", jax.eval_shape(lambda: params)), masks)
    metadata = export.read_metadata(tmp_path / "m")
    assert metadata == {
        "prunax.format": "1",
        "prunax.kind": "masks",
        "prunax.version": prunax.__version__,
        "prunax.pattern": "NM(n=2, m=4, axis=-2)",
        "prunax.sparsity": "0.5",
    }


def test_save_masks_checks_the_pattern(tmp_path):
    with pytest.raises(ValueError, match="'kernel' does not follow NM"):
        export.save_masks(tmp_path / "m", {"kernel": jnp.ones((4, 4), bool)}, pattern=NM(2, 4))
    with pytest.raises(TypeError, match="'kernel' must be bool"):
        export.save_masks(tmp_path / "m", {"kernel": jnp.ones((4, 4))})
    assert not list(tmp_path.iterdir())


def test_load_masks_refuses_other_trees(tmp_path):
    export.save_masks(tmp_path / "m", {"kernel": jnp.ones((4, 4), bool), "bias": jnp.array(True)})
    with pytest.raises(
        ValueError, match=r"'kernel' in .* has shape \(4, 4\), the leaf has \(2, 8\)"
    ):
        export.load_masks(tmp_path / "m", {"kernel": jnp.ones((2, 8)), "bias": jnp.ones(4)})
    with pytest.raises(ValueError, match="'other' is not in"):
        export.load_masks(tmp_path / "m", {"other": jnp.ones((4, 4))})
    with pytest.raises(
        export.FormatError, match=r"holds masks. Read it with prunax.export.load_masks"
    ):
        export.load_params(tmp_path / "m")


# --- files ----------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(tmp_path):
    file = tmp_path / "x"
    export.save_params(file, {"w": np.ones(2)})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.save_params(file, {"w": np.zeros(2)})
    assert export.load_params(file)["w"].sum() == 2
    export.save_params(file, {"w": np.zeros(2)}, overwrite=True)
    assert export.load_params(file)["w"].sum() == 0
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    export.save_params(tmp_path / "x", {"w": np.ones(2)})
    leaves = {"a": ((2,), "float32"), "b": ((2,), "float32")}

    def fail_midway() -> None:
        with _store.ArrayWriter(
            tmp_path / "x", leaves, kind="params", metadata={}, overwrite=True
        ) as writer:
            writer.add("a", np.ones(2, np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_midway()
    assert os.listdir(tmp_path) == ["x"] and export.load_params(tmp_path / "x")["w"].sum() == 2


def test_a_file_that_comes_meanwhile_is_kept(tmp_path):
    def race() -> None:
        with _container.Writer(tmp_path / "x", room=100, digest=False) as writer:
            (tmp_path / "x").write_text("mine")
            writer.finish({})

    with pytest.raises(FileExistsError):
        race()
    assert (tmp_path / "x").read_text() == "mine" and os.listdir(tmp_path) == ["x"]


def test_a_plain_file_of_another_program_is_refused_with_advice(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "x")
    with pytest.raises(export.FormatError, match="Read it with the safetensors package"):
        export.load_params(tmp_path / "x")


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_store, "FORMAT", "2")
    export.save_params(tmp_path / "x", {"w": np.ones(3)})
    monkeypatch.undo()
    with pytest.raises(export.FormatError, match="its format is '2', this prunax reads '1'"):
        export.load_params(tmp_path / "x")


def test_header_is_readable_text(tmp_path):
    export.save_masks(tmp_path / "m", {"größe": jnp.ones((3, 3), bool)})
    raw = (tmp_path / "m").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert json.loads(header["__metadata__"]["prunax.leaves"]) == {
        "größe": ["mask", "bool", [3, 3]]
    }
    assert length % 8 == 0 and len(raw) == 8 + length + 2


# --- patterns and BCOO ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured(),
        NM(2, 4),
        NM(1, 4, axis=-1),
        NM(0, 2),
        ConstantFanIn(),
        ConstantFanIn(axis=(0, 1)),
        Block((3, 2)),
        Block((5, 5)),
        Channel(),
        Channel(0),
    ],
    ids=str,
)
def test_masks_of_a_pattern_follow_it(pattern):
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 12)), "bias": jnp.ones(12)}
    sparsity = None if isinstance(pattern, NM) else 0.4
    masks = prunax.compute_masks(params, sparsity, pattern=pattern)
    report = export.verify_pattern(masks, pattern)
    assert report.paths == ("kernel",) and report.weights == 96
    assert report.kept == int(masks["kernel"].sum())


@pytest.mark.parametrize(
    ("pattern", "flip", "match"),
    [
        (
            NM(2, 4),
            (5, 2),
            r"'b/kernel' .* unit \(1, 2\) keeps 3 of its 4 weights, and 2 are allowed",
        ),
        (ConstantFanIn(), (0, 2), r"unit \(2,\) keeps 3 of its 8 weights, and the first keeps 4"),
        (Block((4, 2)), (5, 2), r"unit \(1, 1\) is removed in part"),
        (Channel(), (5, 2), r"unit \(2,\) is removed in part"),
    ],
    ids=str,
)
def test_the_first_violation_is_named(pattern, flip, match):
    mask = np.zeros((8, 4), bool)
    mask[[0, 1, 4, 6]] = True  # four of a column, two of each group of four
    if not isinstance(pattern, NM | ConstantFanIn):
        mask[:] = True
    broken = mask.copy()
    broken[flip] ^= True
    masks = {"a": {"kernel": mask, "bias": True}, "b": {"kernel": broken}}
    with pytest.raises(ValueError, match=match):
        export.verify_pattern(jax.tree.map(jnp.asarray, masks), pattern)
    export.verify_pattern(jax.tree.map(jnp.asarray, masks["a"]), pattern)


def test_verify_pattern_names_a_leaf_that_does_not_fit():
    with pytest.raises(ValueError, match="does not fit 'kernel' of shape"):
        export.verify_pattern({"kernel": jnp.ones((6, 4), bool)}, NM(2, 4))


def test_bcoo_multiplies_like_the_masked_matrix():
    params = {"kernel": jax.random.normal(jax.random.key(0), (32, 24)), "bias": jnp.ones(24)}
    masks = prunax.compute_masks(params, 0.8)
    converted = export.to_bcoo(params, masks)
    x = jax.random.normal(jax.random.key(1), (5, 32))
    dense = prunax.apply_masks(params, masks)["kernel"]
    np.testing.assert_allclose(x @ converted["kernel"], x @ dense, atol=1e-5)
    assert converted["kernel"].nse == int(masks["kernel"].sum())
    assert jnp.array_equal(converted["kernel"].todense(), dense)
    assert converted["bias"] is params["bias"] or jnp.array_equal(converted["bias"], params["bias"])


# --- Orbax ----------------------------------------------------------------------------------------------------------


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("packed", [False, True])
def test_orbax_restores_params_and_pruning_state(tmp_path, packed):
    import orbax.checkpoint as ocp

    model = nn.Dense(6)
    x = jax.random.normal(jax.random.key(1), (16, 8))
    params = model.init(jax.random.key(0), x)
    schedule = prunax.schedules.polynomial(0.75, 0, 8, every=2)
    tx = prunax.prune(optax.adam(1e-2), schedule, packed=packed)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean(model.apply(p, x) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    saved = {"params": params, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", jax.eval_shape(lambda: saved))
    assert_same(restored, saved)
    on, off = (params, state), (restored["params"], restored["state"])
    for _ in range(5):
        on, off = step(*on), step(*off)
    assert_same(off, on)
