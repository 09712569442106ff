"""benchmarks.methods, robustness and render: short runs on real images."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("grain")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import jax
import jax.numpy as jnp

import prunax
from benchmarks import (
    adversarial,
    datasets,
    formats,
    kernels,
    limits,
    loop,
    methods,
    recipes,
    regrowth,
    render,
    robustness,
)
from benchmarks.recipes import METHODS, Budget

pytestmark = pytest.mark.relaxed_promotion  # optax's Adam raises a float to an int32 power

RUN = (
    "--dataset digits --network mlp --methods dense magnitude imp rigl --allocations erk "
    "--sparsities 0.5 0.7 --seeds 2 --epochs 2"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    digits = datasets.load("digits", tmp_path_factory.mktemp("data"))
    return loop.Data(*map(jnp.asarray, digits[1:5]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNAX_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(methods.harness, "OUT", tmp_path)
    return tmp_path


def as_key(record):
    return record["method"], record["sparsity"]


def test_a_run_goes_on_where_it_stopped(folder, monkeypatch):
    stop_after, begun = 4, []
    add = methods.Results.add

    def interrupted(self, *records):
        add(self, *records)
        if len(self.records) >= stop_after:
            raise KeyboardInterrupt

    class Counted(methods.Results):
        def find(self, budget, method, allocation, sparsity):
            found = super().find(budget, method, allocation, sparsity)
            if found is None:
                begun.append((method, sparsity))
            return found

    arguments = [*RUN.split(), "--out", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(methods.Results, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            methods.main(arguments)
    file = folder / "methods.json"
    first = json.loads(file.read_text())["records"]
    assert len(first) == stop_after

    stop_after = 6  # between the two sparsities of the lottery tickets
    with monkeypatch.context() as patch:
        patch.setattr(methods.Results, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            methods.main(arguments)
    begun_by_then = json.loads(file.read_text())["records"]
    assert [as_key(r) for r in begun_by_then[5:]] == [("imp", 0.5), ("imp-reinit", 0.5)]

    monkeypatch.setattr(methods, "Results", Counted)
    methods.main(arguments)
    content = json.loads(file.read_text())
    records = {as_key(r): r for r in content["records"]}
    rates = json.loads((folder / "methods-rates.json").read_text())
    held_out = {r["learning_rate"]: np.mean(r["held_out_accuracy"]) for r in rates["records"]}
    assert set(held_out) >= set(methods.RATES)
    assert max(held_out, key=held_out.get) not in (min(held_out), max(held_out))
    assert sum(rates["settings"]["images"].values()) == content["settings"]["images"]["train"]
    assert {r["learning_rate"] for r in content["records"]} == {max(held_out, key=held_out.get)}
    assert content["records"][:7] == begun_by_then  # untouched
    assert set(begun) == {("imp", 0.7)}
    pairs = [(m, s) for m in ("magnitude", "rigl", "imp", "imp-reinit") for s in (0.5, 0.7)]
    assert set(records) == {("dense", 0.0), *pairs}
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert "| imp-reinit |" in file.with_suffix(".md").read_text()
    for (method, sparsity), r in records.items():
        assert len(r["test_accuracy"]) == 2
        np.testing.assert_allclose(r["realised_sparsity"], sparsity, atol=1e-4)
        assert r["exact_zeros"]
        assert np.isfinite(r["losses"]).all()
        assert r["trainings"] == (1 if not method.startswith("imp") else r["trainings"])
    assert records["imp", 0.7]["trainings"] == 1 + 3 + 2
    assert np.mean(records["dense", 0.0]["test_accuracy"]) > 0.8

    # A ticket that was gone on from is the one that an uninterrupted run draws.
    with monkeypatch.context() as patch:
        whole = folder / "whole"
        patch.setattr(methods.harness, "OUT", whole)
        methods.main([*RUN.replace("dense magnitude imp rigl", "imp").split(), "--out", str(whole)])
    again = {as_key(r): r for r in json.loads((whole / "methods.json").read_text())["records"]}
    for key in (("imp", 0.7), ("imp-reinit", 0.7)):
        assert again[key]["test_accuracy"] == records[key]["test_accuracy"]
        assert again[key]["layer_sparsity"] == records[key]["layer_sparsity"]

    with pytest.raises(SystemExit) as exit_:  # other settings do not mix with these results
        methods.main([*arguments, "--epochs", "3"])
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("method", "allocation"),
    methods.with_allocations(
        [name for name, m in METHODS.items() if m.recipe], ["erk", "uniform", "global", "lamp"]
    ),
)
def test_every_recipe_prunes_as_many_weights_as_asked(method, allocation, data):
    """Of an MLP whose layers divide unevenly."""
    budget = Budget("mlp", 2, 20, 32, 1e-3)
    images = data._replace(
        train_images=data.train_images[:640], train_labels=data.train_labels[:640]
    )
    sparsity = 0.8333
    options = {}
    if method == "proximal-l1":
        options["strength"] = methods.strength_for(sparsity, budget, 10, images)
    run = method, allocation, sparsity, budget, 10, images, 1
    outcome, *_ = methods.train_method(*run, **options)
    assert outcome.zeros.all()
    assert np.isfinite(outcome.losses).all()
    masks = jax.tree.map(lambda m: m[0], outcome.masks)
    params = jax.tree.map(lambda p: p[0], outcome.params)
    summary = prunax.summarize(params, masks)
    layers = [leaf for leaf in summary.leaves if leaf.prunable]
    assert len(layers) == 3
    zeros = sum(int((kernel == 0).sum()) for kernel in loop.kernels(params))
    if method == "dense":
        assert summary.kept == summary.weights
    elif method == "proximal-l1":  # its strength was found for this seed
        assert zeros == summary.weights - summary.kept
        assert zeros / summary.weights == pytest.approx(sparsity, abs=0.03)
    else:
        rounding = 0 if METHODS[method].family == "" else len(layers) / 2  # each layer rounds
        pruned = summary.weights - summary.kept
        assert abs(pruned - sparsity * summary.weights) <= rounding + 0.5
        assert zeros >= pruned
    if allocation in ("erk", "uniform"):
        alone = prunax.compute_masks(params, sparsity, allocation=recipes.ALLOCATIONS[allocation])
        expected = prunax.summarize(params, alone)
        for layer, like in zip(summary.leaves, expected.leaves, strict=True):
            assert layer.kept == like.kept


def test_steps_that_change_no_masks_skip_the_ranking(data):
    """Mapped over seeds, the step count has no seed axis, so that a mask update stays a branch."""
    budget = Budget("mlp", 1, 4, 32, 1e-3)
    options = METHODS["rigl"].options | {"allocation": recipes.ALLOCATIONS["erk"]}
    recipe = METHODS["rigl"].recipe(budget, 0.9, **options)
    keys = methods.keys_of(2)
    params = methods.initial("mlp", 10, keys, data.train_images[:1])

    def seeds(params, keys):
        return jax.vmap(lambda p, k: methods.run(recipe, budget, 10, data, p, k))(params, keys)

    def primitives(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name, eqn
            for value in jax.tree.leaves(list(eqn.params.values())):
                if hasattr(value := getattr(value, "jaxpr", value), "eqns"):
                    yield from primitives(value)

    conds = [
        e for name, e in primitives(jax.make_jaxpr(seeds)(params, keys).jaxpr) if name == "cond"
    ]
    assert len(conds) >= 2
    assert all(eqn.invars[0].aval.shape == () for eqn in conds)


def test_robustness_in_short(folder):
    arguments = (
        "--quick --dataset digits --methods magnitude --allocations global --sparsities 0.9 "
        "--seeds 1 --epochs 40"
    )
    robustness.main([*arguments.split(), "--out", str(folder)])
    content = json.loads((folder / "robustness-quick.json").read_text())
    dense, pruned = (r["accuracy"] for r in content["records"])
    assert set(dense) == {"train", "test", *robustness.PERTURBATIONS}
    for accuracy in (dense, pruned):
        assert accuracy["train"][0] >= accuracy["test"][0] > 0.7
        assert accuracy["pgd"][0] <= accuracy["fgsm"][0] < accuracy["test"][0]
    assert (folder / "robustness-quick.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", robustness.PERTURBATIONS)
def test_perturbed_images_are_images_near_by(name, data):
    images, labels = data.test_images[:20], data.test_labels[:20]
    weights = jax.random.normal(jax.random.key(0), (64, 10))

    def apply(params, x):
        return x.reshape(len(x), -1) @ params

    x = robustness.PERTURBATIONS[name](apply, weights, images, labels, jax.random.key(1))
    assert x.shape == images.shape
    assert jnp.all((x >= 0) & (x <= 1 + 1e-6))
    assert jnp.any(x != images)
    if name in ("fgsm", "pgd"):
        assert jnp.max(jnp.abs(x - images)) <= robustness.EPSILON + 1e-6


@pytest.mark.parametrize("regrown", ["corrected", "mean"])
def test_moments_of_regrowth_are_adams_where_nothing_grew(regrown):
    tx, expected = (regrowth.adam(lambda step: 0.1, r) for r in (regrown, "anew"))
    params = {"w": jnp.ones(3)}
    state, known = tx.init(params), expected.init(params)
    for g in ([1.0, -2.0, 0.5], [0.3, 0.1, -4.0]):
        updates, state = tx.update({"w": jnp.array(g)}, state, params)
        like, known = expected.update({"w": jnp.array(g)}, known, params)
        np.testing.assert_allclose(updates["w"], like["w"], rtol=1e-5)
    # The second weight grows anew: by its own count one learning rate, by the layer's mean less.
    state = jax.tree.map(lambda x: x.at[1].set(0) if jnp.ndim(x) else x, state)
    updates, _ = tx.update({"w": jnp.array([1.0, 0.1, 1.0])}, state, params)
    step = float(jnp.abs(updates["w"][1]))
    assert step == pytest.approx(0.1, rel=1e-3) if regrown == "corrected" else 0 < step < 0.01


def test_attacks_stay_within_their_radius():
    images, labels = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1)), jnp.arange(4)
    params = adversarial.models.init(adversarial.MODEL, jax.random.key(1), images)
    for key, steps in ((None, 1), (jax.random.key(2), 3)):
        x = adversarial.attack(params, images, labels, key, 0.1, steps)
        assert 0 < jnp.max(jnp.abs(x - images)) <= 0.1 + 1e-6
        losses = [
            adversarial.finetuning.cross_entropy(adversarial.MODEL, params, i, labels)
            for i in (images, x)
        ]
        assert losses[0] < losses[1]


def test_tables_are_rendered_between_markers(tmp_path, capsys):
    def result(method, allocation, sparsity, accuracy):
        same = {"network": "mlp", "realised_sparsity": [sparsity] * 2}
        same |= {"allocation": allocation}
        return same | {"method": method, "sparsity": sparsity, "test_accuracy": accuracy}

    records = [
        result("dense", "", 0.0, [0.9, 0.92]),
        result("magnitude", "erk", 0.9, [0.89, 0.93]),
        result("magnitude", "lamp", 0.9, [0.7, 0.7]),
    ]
    (tmp_path / "methods.json").write_text(json.dumps({"records": records}))
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table: methods/mlp -->\n<!-- end table -->\nb\n")
    arguments = [str(page), "--results", str(tmp_path)]

    with pytest.raises(SystemExit) as exit_:
        render.main([*arguments, "--check"])
    assert exit_.value.code == 1
    render.main(arguments)
    render.main([*arguments, "--check"])
    text = page.read_text()
    assert "| dense | 91.00 ± 1.41 |" in text
    assert "| magnitude | 91.00 ± 2.83 |" in text
    assert text.startswith("a\n")
    assert text.endswith("<!-- end table -->\nb\n")

    page.write_text(text.replace("91.00", "99.00"))  # typed
    with pytest.raises(SystemExit):
        render.main([*arguments, "--check"])
    page.write_text("<!-- table: methods/no -->\n<!-- end table -->\n")
    with pytest.raises(SystemExit):
        render.main(arguments)
    assert "there is no table 'methods/no'" in capsys.readouterr().err
    ((*_, erk), (*_, lamp)) = methods.allocations_table(records, "mlp").rows
    assert (erk, lamp) == ("91.00 ± 2.83", "70.00 ± 0.00")
    claims = methods.claims_table(records, "mlp")
    assert claims.rows == [("magnitude at 90% against dense", "-0.2", "+0.00 ± 1.41", "yes")]


@pytest.mark.parametrize("name", [*formats.FORMATS, *formats.KERNELS])
def test_formats_multiply_what_they_keep(name):
    if name in formats.KERNELS and not kernels.available():
        pytest.skip("no compiler, or another processor")
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((64, 24)).astype(np.float32), rng.standard_normal(64)
    options = {"pattern": prunax.patterns.NM(2, 4)} if name.startswith("2:4") else {"sparsity": 0.0}
    if name.startswith("bitmask"):
        options = {"sparsity": 0.9 if "90" in name else 0.75}
    mask = prunax.compute_masks({"kernel": w}, **options)["kernel"]
    coarse = {"float32": 1e-5, "bfloat16": 0.1, "int8": 0.3}[name.split(", ")[1]]
    made = (formats.FORMATS | formats.KERNELS)[name](w)
    for product in made.products.values():
        y = product(jnp.asarray(x, jnp.float32), *made.arrays)
        np.testing.assert_allclose(y, x @ np.where(mask, w, 0), atol=coarse)


def test_limits_count_bytes():
    packed = {"pattern": "NM(2, 4)", "shape": [4096, 4096], "sparsity": 0.5, "batch": 1}
    packed["seconds"] = {"dense": 2.0, "packed": 3.0}
    # Half of the weights, and an index as large as each: the bytes of the dense matrix.
    ((_, least, found, _),) = limits.JOBS["packed"]({"results": [packed]})
    assert (least, found) == (2.0, 3.0)
    blocks = packed | {"pattern": "Block((64, 64))", "sparsity": 0.75}
    ((_, least, _, _),) = limits.JOBS["packed"]({"results": [blocks]})
    assert least == 0.5


def test_pages_of_the_project_are_up_to_date():
    render.main(["--check"])
    assert Path(render.ROOT / "README.md").is_file()
