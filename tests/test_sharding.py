"""Masks and training of sharded params: the same bits as on one device, and sharded like the params."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from processes import pruned_in_each_way, run_two

import prunax
from prunax import (
    allocation,
    calibration,
    initialization,
    patterns,
    schedules,
    scores,
    search,
    structured,
    transforms,
)

KINDS = [AxisType.Explicit, AxisType.Auto]
VALUES = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)


EXPLICIT, AUTO = KINDS
HOST = {
    "first": {"kernel": VALUES[:16], "bias": np.ones(32, np.float32)},
    "last": {"kernel": 3 * VALUES.T[:, :16], "bias": np.ones(16, np.float32)},
}


def make(kind, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    kernel = jax.device_put(VALUES, NamedSharding(mesh, spec))
    return mesh, {"kernel": kernel, "bias": jnp.ones(32)}


def lay(first, last):
    """The params of HOST; of each layer the mesh's shape, axis names and kinds, devices, and the kernel's spec."""

    def put(layer, shape, names, kinds, spec, devices=None):
        mesh = jax.make_mesh(shape, names, axis_types=kinds, devices=devices)
        specs = {"kernel": PartitionSpec(*spec), "bias": PartitionSpec()}
        return {n: jax.device_put(layer[n], NamedSharding(mesh, specs[n])) for n in layer}

    return {"first": put(HOST["first"], *first), "last": put(HOST["last"], *last)}


def layouts():
    both = [(4, 2), ("x", "y")]
    flat = [(8,), ("z",)]
    half = [(4,), ("z",)]
    three = [(2, 2, 2), ("x", "y", "z"), (EXPLICIT,) * 3]
    explicit, auto = [*both, (EXPLICIT,) * 2], [*both, (AUTO,) * 2]
    partly = [*both, (AUTO, EXPLICIT)]
    one, other = jax.devices()[:4], jax.devices()[4:]
    return {
        "explicit": lay([*explicit, ("x", "y")], [*explicit, (None, "y")]),
        "auto": lay([*auto, ("x", "y")], [*auto, (None, "y")]),
        "three axes": lay([*three, (("x", "y"),)], [*three, ("z",)]),
        "partly auto": lay([*partly, ("x", "y")], [*partly, ("y", "x")]),
        "replicated": lay([*explicit, ()], [*explicit, ("y", None)]),
        "two meshes": lay([*explicit, ("x", "y")], [*flat, (EXPLICIT,), ("z",)]),
        "two kinds": lay([*explicit, ("x", "y")], [*flat, (AUTO,), ("z",)]),
        "apart": lay([*half, (EXPLICIT,), ("z",), one], [*half, (AUTO,), (None, "z"), other]),
    }


LAYOUTS = layouts()
CONTEXTS = [(name, False) for name in LAYOUTS] + [("explicit", True), ("auto", True)]
CHOICES = {
    "uniform": {},
    "global": {"allocation": allocation.global_ranking},
    "lamp": {"allocation": allocation.lamp},
    "fan-in": {"pattern": patterns.ConstantFanIn()},
    "N:M": {"pattern": patterns.NM(2, 4)},
    "block": {"pattern": patterns.Block((4, 2)), "allocation": allocation.global_ranking},
    "channel": {"pattern": patterns.Channel()},
    "threshold": {"sparsity": None, "threshold": 0.5},
}


def choose(params, options):
    return prunax.compute_masks(params, **({"sparsity": 0.5} | options))


def entered(params, inside):
    """The context of the mesh of the params, or none."""
    mesh = params["first"]["kernel"].sharding.mesh
    return jax.set_mesh(mesh) if inside else contextlib.nullcontext()


def same(got, expected):
    return all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(expected)))


@pytest.fixture(scope="module")
def alone():
    """The masks of one device."""
    return {name: choose(HOST, options) for name, options in CHOICES.items()}


@pytest.mark.parametrize(("layout", "inside"), CONTEXTS, ids=str)
def test_every_choice_keeps_bits_and_sharding(layout, inside, alone):
    params = LAYOUTS[layout]
    with entered(params, inside):
        for name, options in CHOICES.items():
            masks = choose(params, options)
            assert same(masks, alone[name]), name
            for layer in params:
                kernel, mask = params[layer]["kernel"], masks[layer]["kernel"]
                assert mask.sharding.is_equivalent_to(kernel.sharding, 2), name


@pytest.mark.parametrize("layout", ["explicit", "auto", "partly auto", "two meshes", "two kinds"])
def test_compiled_as_well(layout, alone):
    def all_of_them(params):
        return {name: choose(params, options) for name, options in CHOICES.items()}

    masks = jax.jit(all_of_them)(LAYOUTS[layout])
    for name in CHOICES:
        assert same(masks[name], alone[name]), name
    if layout in ("explicit", "auto"):
        kernel = LAYOUTS[layout]["first"]["kernel"]
        for name in CHOICES:
            assert masks[name]["first"]["kernel"].sharding.is_equivalent_to(kernel.sharding, 2), (
                name
            )


KEY = jax.random.key(0)
HALF = prunax.compute_masks(HOST, 0.5)
POLYNOMIAL = schedules.polynomial(0.75, 0, 2, every=1)
TRANSFORMS = {
    "prune, packed": prunax.prune(
        optax.adam(0.1), POLYNOMIAL, allocation=allocation.global_ranking, packed=True
    ),
    "prune, averaged": prunax.prune(
        optax.sgd(0.1, momentum=0.9), POLYNOMIAL, score=scores.ema(scores.saliency, 0.5)
    ),
    "fixed_masks, packed": transforms.fixed_masks(optax.adam(0.1), HALF, packed=True),
    "rigl": transforms.rigl(optax.adam(0.1), 0.5, key=KEY, every=1),
    "sparse_evolutionary": transforms.sparse_evolutionary(optax.adam(0.1), 0.5, key=KEY, every=1),
    "admm": transforms.admm(optax.adam(0.1), 0.5, penalty=0.1, end_step=2, every=1),
    "proximal_l1": transforms.proximal_l1(optax.sgd(0.1), 0.3),
    "proximal_group_lasso": transforms.proximal_group_lasso(optax.sgd(0.1), 1.0),
}


def train(tx, params, steps=3):
    """Where weights are zero after some steps, in a compiled loop."""

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda w: 0.125 * w, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    return jax.tree.map(lambda w: w == 0, params)


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_need_no_mesh_context(name):
    run = jax.jit(lambda params: train(TRANSFORMS[name], params))
    expected = run(HOST)
    assert any(map(np.any, jax.tree.leaves(expected)))
    assert same(run(LAYOUTS["explicit"]), expected)


def in_shard_map(function, check_vma):
    """On two devices: the first layer's kernel is another on each, the rest is the same."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AUTO,), devices=jax.devices()[:2])
    each, all_alike = PartitionSpec("d"), PartitionSpec()
    specs = {
        "first": {"kernel": each, "bias": all_alike},
        "last": {"kernel": all_alike, "bias": all_alike},
    }
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=check_vma
    )
    return jax.jit(mapped)


def halves():
    return [
        {**HOST, "first": {**HOST["first"], "kernel": half}}
        for half in np.split(HOST["first"]["kernel"], 2)
    ]


def assert_halves(got, expected):
    first = [e["first"]["kernel"] for e in expected]
    assert np.array_equal(got["first"]["kernel"], np.concatenate(first))
    if np.array_equal(expected[0]["last"]["kernel"], expected[1]["last"]["kernel"]):
        assert np.array_equal(got["last"]["kernel"], expected[0]["last"]["kernel"])


@pytest.mark.parametrize("check_vma", [True, False])
def test_every_choice_inside_shard_map(check_vma):
    for name in ("uniform", "lamp", "fan-in", "N:M", "channel", "threshold"):
        options = CHOICES[name]
        if name == "lamp":  # ranks what differs between devices with what must not

            def run(params, options=options):
                return params | {"first": choose({"first": params["first"]}, options)["first"]}
        else:

            def run(params, options=options):
                return choose(params, options)

        got = in_shard_map(run, check_vma)(HOST)
        assert_halves(got, [run(half) for half in halves()])


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_inside_shard_map(name):
    where = {"where": lambda path, leaf: path == "first/kernel"}
    tx = {
        "prune, packed": prunax.prune(optax.adam(0.1), POLYNOMIAL, packed=True),
        "fixed_masks, packed": transforms.fixed_masks(
            optax.adam(0.1),
            jax.tree.map(lambda m: m[:8] if m.shape == (16, 32) else m, HALF),
            packed=True,
        ),
        "rigl": transforms.rigl(
            optax.adam(0.1), 0.5, key=KEY, every=1, allocation=allocation.uniform
        ),
        "admm": transforms.admm(optax.adam(0.1), 0.5, penalty=0.1, end_step=2, every=1, **where),
    }.get(name, TRANSFORMS[name])
    got = in_shard_map(lambda params: train(tx, params), True)(HOST)
    assert_halves(got, [train(tx, half) for half in halves()])


def network(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"][None]


@pytest.mark.parametrize("layout", ["explicit", "three axes"])
def test_functions_of_the_model_need_no_mesh_context(layout):
    x = jnp.asarray(VALUES[:, :16])  # more examples than inputs: rounding stays small

    def loss(params, x):
        return jnp.mean(jnp.square(network(params, x) - x))

    functions = {
        "wanda": lambda p: calibration.wanda(network, p, [x], 0.5),
        "sparsegpt": lambda p: calibration.sparsegpt(network, p, [x], 0.5),
        "snip": lambda p: initialization.snip(loss, p, x),
        "synflow": lambda p: initialization.synflow(network, p, x[:1]),
        "random": lambda p: scores.random(p, key=KEY),
        "deflated_gradient": lambda p: scores.deflated_gradient(p, p),
        "straight_through": lambda p: jax.vjp(lambda p: prunax.straight_through(p, HALF), p)[1](p),
        "summarize": lambda p: np.asarray(prunax.summarize(p, HALF).kept),
    }
    for name, function in functions.items():
        got, expected = function(LAYOUTS[layout]), function(HOST)
        for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            # Sums over devices round otherwise.
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name)
        if name in ("wanda", "sparsegpt"):
            for part in got:
                kernel = LAYOUTS[layout]["first"]["kernel"]
                assert part["first"]["kernel"].sharding.is_equivalent_to(kernel.sharding, 2)


def test_structure_and_search_need_no_mesh_context():
    params = lay(*[((4, 2), ("x", "y"), (EXPLICIT,) * 2, spec) for spec in (("x",), (None, "y"))])
    x = jnp.asarray(VALUES[:8, :16])

    def fn(params, x):
        return x + network(params, x)

    def loss(params, x=x):
        return jnp.mean(jnp.square(fn(params, x) - 2 * x))

    def groups_of(p):
        return structured.prunable_groups(structured.axis_groups(fn, p, x), p)

    def lasso(p):
        tx = structured.proximal_unit_lasso(optax.sgd(0.1), groups_of(p), 0.5)
        return tx.update(p, tx.init(p), p)[0]

    def found(p, structures=None):
        options = {"key": KEY, "generations": 1, "offspring": 1, "sparsities": (0.25, 0.5)}
        return search.allocate(loss, p, 0.4, structures=structures, **options).masks

    functions = {
        "prune_channels": lambda p: structured.prune_channels(fn, p, x, sparsity=0.5).params,
        "prune_depth": lambda p: structured.prune_depth(fn, p, x, count=1).params,
        "gates": lambda p: structured.gate_importance(loss, p, [x], groups_of(p)),
        "lasso": lasso,
        "leaves": found,
        "channels": lambda p: found(p, search.channels(groups_of(p), p)),
        "branches": lambda p: [g.name for g in structured.branches(fn, p, x)],
    }
    for name, function in functions.items():
        got, expected = function(params), function(HOST)
        assert jax.tree.structure(got) == jax.tree.structure(expected), name
        for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            if isinstance(a, str):
                assert a == b
            else:
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.relaxed_promotion
def test_nnx_optimizer_needs_no_mesh_context():
    class Net(nnx.Module):
        def __init__(self, params):
            self.first = nnx.Param(params["first"]["kernel"])
            self.last = nnx.Param(params["last"]["kernel"])

        def __call__(self, x):
            return jnp.maximum(x @ self.first[...], 0) @ self.last[...]

    @nnx.jit
    def step(net, optimizer):
        grads = nnx.grad(lambda net: jnp.mean(net(jnp.asarray(VALUES[:8, :16])) ** 2))(net)
        optimizer.update(net, grads)

    def trained(params):
        net = Net(params)
        optimizer = nnx.Optimizer(net, TRANSFORMS["prune, packed"], wrt=nnx.Param)
        step(net, optimizer)
        step(net, optimizer)
        pruned = nnx.state(net, nnx.Param)
        masks = prunax.get_masks(optimizer.opt_state, pruned)
        return [jax.tree.map(lambda w: w == 0, pruned), jax.tree.map(jnp.logical_not, masks)]

    zeros, pruned = trained(HOST)
    assert same(zeros, pruned) and any(map(np.any, jax.tree.leaves(zeros)))
    assert same(trained(LAYOUTS["replicated"]), [zeros, pruned])


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


ONE_DEVICE = """
import jax, jax.numpy as jnp, numpy as np, prunax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
assert jax.device_count() == 1
values = np.random.default_rng(0).standard_normal((128, 64)).astype(np.float32)
mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
placed = jax.device_put(values, NamedSharding(mesh, PartitionSpec("x", "y")))
for pattern in (prunax.patterns.Unstructured(), prunax.patterns.Block((4, 4))):
    masks = lambda p: prunax.compute_masks(p, 0.75, pattern=pattern)
    expected = masks({"kernel": jnp.asarray(values)})["kernel"]
    for function in (masks, jax.jit(masks)):
        found = function({"kernel": placed})["kernel"]
        assert np.array_equal(found, expected)
        assert found.sharding.is_equivalent_to(placed.sharding, 2)
"""


def test_explicit_mesh_of_one_device():
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", ONE_DEVICE], env=environment, check=True)


CALIBRATING_WORKER = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.distributed.initialize("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
sys.path.append(sys.argv[4])
import processes
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def place(value, spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
found = processes.pruned_in_each_way(place)
whole = jax.jit(lambda t: t, out_shardings=NamedSharding(mesh, PartitionSpec()))(found)
for n, leaf in enumerate(jax.tree.leaves(whole)):
    np.save(f"{sys.argv[3]}/{sys.argv[2]}-{n}.npy", leaf.addressable_data(0))
"""


def test_two_processes_calibrate_shrink_and_search_as_one_does(tmp_path):
    expected = jax.tree.leaves(pruned_in_each_way(lambda value, spec: jnp.asarray(value)))
    run_two(CALIBRATING_WORKER, tmp_path, Path(__file__).parent)
    for process in range(2):
        for n, leaf in enumerate(expected):
            found = np.load(tmp_path / f"{process}-{n}.npy")
            if leaf.dtype == bool:
                assert np.array_equal(found, leaf)
            else:
                np.testing.assert_allclose(found, leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_arrays_on_any_kind_of_mesh(kind):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.standard_normal((16, 32)), jnp.float32),
        "out": jnp.asarray(rng.standard_normal((32, 8)), jnp.float32),
    }
    x = jnp.ones((4, 16))

    def fn(params, x):
        return x @ params["in"] @ params["out"]

    alone = structured.prune_channels(fn, params, x, sparsity=0.5).params
    with jax.set_mesh(mesh):
        divided = jax.device_put(
            params,
            {
                "in": NamedSharding(mesh, PartitionSpec("x")),
                "out": NamedSharding(mesh, PartitionSpec(None, "x")),
            },
        )
        small = structured.prune_channels(fn, divided, x, sparsity=0.5).params
    for name, spec in (("in", ("x", None)), ("out", (None, "x"))):
        assert small[name].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), 2)
        assert np.array_equal(small[name], alone[name])
