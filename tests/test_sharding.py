"""Masks and training of sharded params: the same bits as on one device, and sharded like the params."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from processes import run_two

import prunax
from prunax import allocation, patterns, schedules

KINDS = [AxisType.Explicit, AxisType.Auto]
SPECS = [PartitionSpec("x", "y"), PartitionSpec(None, "x"), PartitionSpec(("x", "y"), None)]
VALUES = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)


def make(kind, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    kernel = jax.device_put(VALUES, NamedSharding(mesh, spec))
    return mesh, {"kernel": kernel, "bias": jnp.ones(32)}


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "pattern",
    [
        patterns.Unstructured(),
        patterns.NM(2, 4),
        patterns.ConstantFanIn(),
        patterns.Block((4, 4)),
        patterns.Channel(),
    ],
    ids=str,
)
def test_every_pattern_keeps_bits_and_sharding(pattern, kind, spec):
    mesh, params = make(kind, spec)
    expected = prunax.compute_masks({"kernel": VALUES}, 0.5, pattern=pattern)["kernel"]
    with jax.set_mesh(mesh):
        mask = prunax.compute_masks(params, 0.5, pattern=pattern)["kernel"]
    assert mask.sharding.is_equivalent_to(params["kernel"].sharding, 2)
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(
    ("pattern", "spec", "axis"),
    [
        pytest.param(
            *(patterns.NM(8, 32), PartitionSpec("x", "y"), 0),
            marks=pytest.mark.xfail(
                jax.__version_info__ < (0, 10), reason="older JAX cannot name a sharding in it"
            ),
        ),
        (patterns.NM(4, 32, axis=-1), PartitionSpec("x", "y"), 1),
        (patterns.Block((4, 24)), PartitionSpec("x", "y"), 1),
        (patterns.Block((16, 4)), PartitionSpec(("x", "y"), None), 0),
    ],
    ids=str,
)
def test_units_that_straddle_shards_are_refused_or_moved(pattern, spec, axis):
    mesh, params = make(AxisType.Explicit, spec)
    with jax.set_mesh(mesh):
        with pytest.raises(
            ValueError, match=f"along axis {axis} .*'kernel'.*Do not shard axis {axis}"
        ):
            prunax.compute_masks(params, 0.5, pattern=pattern)
        tx = prunax.prune(optax.sgd(0.1), 0.5, pattern=pattern)
        with pytest.raises(ValueError, match=f"prune: .*Do not shard axis {axis}"):
            jax.jit(tx.update)(params, tx.init(params), params)
    mesh, params = make(AxisType.Auto, spec)
    with jax.set_mesh(mesh):
        mask = prunax.compute_masks(params, 0.5, pattern=pattern)["kernel"]
    expected = prunax.compute_masks({"kernel": VALUES}, 0.5, pattern=pattern)["kernel"]
    assert np.array_equal(mask, expected)


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sharded_training_is_that_of_one_device(kind, packed):
    def train(params):
        tx = prunax.prune(
            optax.adam(0.1),
            schedules.polynomial(0.9, 0, 4, every=2),
            allocation=allocation.global_ranking,
            packed=packed,
        )
        state = tx.init(params)
        for _ in range(6):
            grads = jax.tree.map(lambda p: 0.1 * p, params)
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    mesh, params = make(kind, PartitionSpec("x", "y"))
    alone, _ = train({"kernel": jnp.asarray(VALUES), "bias": jnp.ones(32)})
    with jax.set_mesh(mesh):
        together, state = train(params)
    assert state.masks["kernel"].sharding.is_equivalent_to(params["kernel"].sharding, 2)
    assert int((together["kernel"] == 0).sum()) == round(0.9 * VALUES.size)
    assert np.array_equal(together["kernel"] == 0, alone["kernel"] == 0)
    np.testing.assert_allclose(together["kernel"], alone["kernel"], rtol=1e-6)


WORKER = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp, numpy as np, prunax
from jax.sharding import NamedSharding, PartitionSpec
assert jax.process_count() == 2 and len(jax.devices()) == 4
mesh = jax.make_mesh((4,), ("x",))
values = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
params = {}
for name, spec in (("first", PartitionSpec("x")), ("second", PartitionSpec(None, "x"))):
    sharding = NamedSharding(mesh, spec)
    params[name] = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
with jax.set_mesh(mesh):
    masks = prunax.compute_masks(params, 0.9, allocation=prunax.allocation.global_ranking)
for name, mask in masks.items():
    assert mask.sharding.is_equivalent_to(params[name].sharding, 2)
    for shard in mask.addressable_shards:
        start = [s.start or 0 for s in shard.index]
        np.save(f"{sys.argv[3]}/{name}-{start[0]}-{start[1]}.npy", np.asarray(shard.data))
"""


def test_two_processes_choose_what_one_does(tmp_path):
    run_two(WORKER, tmp_path)
    expected = prunax.compute_masks(
        {"first": VALUES, "second": VALUES}, 0.9, allocation=allocation.global_ranking
    )
    files = list(tmp_path.glob("*.npy"))
    assert len(files) == 8
    for file in files:
        name, row, column = file.stem.split("-")
        part = np.load(file)
        whole = np.asarray(expected[name])
        r, c = int(row), int(column)
        assert np.array_equal(part, whole[r : r + part.shape[0], c : c + part.shape[1]])
