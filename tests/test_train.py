"""benchmarks.train: the command line, on real images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("grain")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import jax
import jax.numpy as jnp
import PIL.Image

import prunax
from benchmarks import harness, loop, models, train
from benchmarks.recipes import Budget

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.relaxed_promotion  # optax's Adam raises a float to an int32 power


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """All methods, shortly, at a sparsity that divides no layer evenly."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNAX_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        train.main(f"--compare --epochs 10 --seeds 1 --sparsity 0.8333 --out {out}".split())
    (file,) = out.glob("*.json")
    return file, json.loads(file.read_text())


def test_every_method_prunes_exactly(compared):
    _, content = compared
    runs = {run["method"]: run for run in content["runs"]}
    assert set(runs) == set(train.METHODS)
    for method, run in runs.items():
        layers = [leaf for leaf in run["summary"]["leaves"] if leaf["prunable"]]
        pruned = [leaf["weights"] - leaf["kept"] for leaf in layers]
        sizes = [leaf["weights"] for leaf in layers]
        assert len(run["epochs"]["accuracy"]) == 10
        if method == "dense":
            assert sum(pruned) == 0
            assert run["exact"] is None
        elif method == "l1":
            assert run["exact"] is None
        elif method == "global":
            assert sum(pruned) == round(0.8333 * sum(sizes))
            assert run["exact"] is True
        else:
            assert pruned == [round(0.8333 * size) for size in sizes]
            assert run["exact"] is True
        assert run["epochs"]["sparsity"][-1] >= run["sparsity"] - 1e-6  # zeros of the weights


def test_networks_learn(compared):
    _, content = compared
    accuracy = {run["method"]: run["test_accuracy"] for run in content["runs"]}
    assert accuracy["dense"] > 0.95
    assert accuracy["magnitude"] > accuracy["random"]


def test_results_say_how_they_came_about(compared):
    file, content = compared
    assert content["command"].startswith("python -m benchmarks.train --compare --epochs 10")
    assert content["settings"]["sparsity"] == 0.8333
    assert content["settings"]["learning_rate"] == 2e-3
    assert content["environment"]["packages"]["jax"] == jax.__version__
    assert content["environment"]["packages"]["prunax"] == prunax.__version__
    assert content["dataset"] == {
        "name": "digits",
        "train": 1437,
        "test": 360,
        "image": [8, 8, 1],
        "classes": 10,
    }
    assert len(content["table"]) == 2 + len(train.METHODS)
    with PIL.Image.open(file.with_suffix(".png")) as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(10**6)) > 20


def test_the_command_as_it_is_typed(tmp_path):
    options = "--dataset digits --method magnitude --sparsity 0.9 --epochs 1 --out out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train", *options.split()],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(ROOT),
            "PRUNAX_DATA_DIR": str(tmp_path / "data"),
            "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Dense_2/kernel" in done.stdout
    assert "90.00%" in done.stdout
    (file,) = (tmp_path / "out").glob("*.json")
    assert [run["method"] for run in json.loads(file.read_text())["runs"]] == ["dense", "magnitude"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sparsity 90", "must lie in [0, 1], got 90. Pass 0.9 for 90%."),
        ("--sparsity -0.1", "must lie in [0, 1], got -0.1."),
        ("--sparsity nan", "must lie in [0, 1], got nan."),
        ("--sparsity most", "must be a number, got most."),
        ("--epochs 0", "must be a whole number of at least 1, got 0."),
        ("--learning-rate 0", "must be positive, got 0."),
        ("--method magic", "invalid choice: 'magic'"),
        ("--dataset digit", "unknown data set 'digit'. Did you mean"),
    ],
)
def test_bad_arguments_end_with_code_2_and_one_message(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        train.main([*options.split(), "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_shows_examples_and_methods(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "python -m benchmarks.train --dataset digits --compare" in text
    assert all(f"\n  {method} " in text for method in train.METHODS)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", [(8, 8, 1), (15, 20, 3)])
def test_models_take_images_of_any_size(name, shape):
    model = models.MODELS[name](7)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    params = jax.eval_shape(lambda x: models.init(model, jax.random.key(0), x), images)
    logits = jax.eval_shape(lambda p, x: models.apply(model, p, x), params, images)
    assert logits.shape == (2, 7)
    names = [name for name in prunax.trees.paths(params) if name.endswith("kernel")]
    assert len(loop.kernels(params)) == len(names) >= 3


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("window", [(3, 3), (1, 1), (5, 2)])
def test_convolution_by_patches_is_convolution(strides, size, window):
    image_key, kernel_key = jax.random.split(jax.random.key(0))
    images = jax.random.normal(image_key, (2, *size, 3))
    kernel = jax.random.normal(kernel_key, (*window, 3, 4))
    expected = jax.lax.conv_general_dilated(
        images, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    result = models.convolve(
        images, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_epochs_scan_and_map_over_seeds():
    """As a benchmark of many seeds uses them: one program, no Python in between."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(40, 4, 4, 1)), jnp.float32)
    labels = jnp.asarray(images.mean((1, 2, 3)) > 0.5, jnp.int32)
    data = loop.Data(images, labels, images, labels)
    model = models.MLP(2, widths=(8,))
    method = train.METHODS["magnitude"]
    recipe = method.recipe(Budget("mlp", 5, 4, 10, 1e-2), 0.75, **method.options)
    optimizer = recipe.optimizer(jax.random.key(0), None)

    def run(key):
        params = models.init(model, key, images)
        state = loop.State(params, optimizer.init(params), key)

        def one(state, _):
            return loop.epoch(
                lambda p, x: models.apply(model, p, x), optimizer, data, state, batch_size=10
            )

        return jax.lax.scan(one, state, length=5)

    state, metrics = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), 3))
    assert metrics.accuracy.shape == (3, 5)
    zeros = (state.params["Dense_0"]["kernel"] == 0).sum((1, 2))
    assert zeros.tolist() == [round(0.75 * 128)] * 3


def test_evaluation_counts_every_image_once():
    logits = jnp.eye(3)[jnp.array([0, 1, 2, 2, 1])]
    labels = jnp.array([0, 1, 2, 0, 0])
    for batch_size in (1, 2, 5, 9):
        share = loop.evaluate(lambda p, x: x, {}, logits, labels, batch_size)
        assert float(share) == pytest.approx(3 / 5)


def test_table_as_markdown():
    table = harness.Table(("method", "accuracy"), [("dense", "98.1")], title="title")
    assert table.markdown() == "| method | accuracy |\n| --- | ---: |\n| dense | 98.1 |"


def test_timing_takes_turns():
    calls = []
    times = harness.median_seconds(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3
    )
    assert calls == ["a", "b"] * 4
    assert set(times) == {"a", "b"}


def test_environment_names_no_machine_or_folder():
    text = json.dumps(harness.environment())
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
