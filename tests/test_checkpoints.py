"""Checkpoints as people have them: the three layouts, folders of shards in and out, hostile indices, faults."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
import safetensors
import safetensors.numpy

import prunax
from benchmarks import hostile
from benchmarks.hostile import load
from prunax import export
from prunax.cli import main

BF16 = ml_dtypes.bfloat16


def weights() -> dict[str, np.ndarray]:
    """A model of few distinct values, so that ties lie across shards."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,)}
    for i in range(3):
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (32, 16)
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (16, 32)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (16,)
    arrays = {n: np.round(rng.normal(size=s) * 4).astype(BF16) / BF16(4) for n, s in shapes.items()}
    return arrays | {"model.layers.0.mlp.router.weight": rng.normal(size=(4, 16)).astype("f4")}


CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "tie_word_embeddings": True,
    "vocab_size": 40,
}


def write_sharded(folder: Path, arrays: dict[str, np.ndarray], shards: int = 3) -> Path:
    """As Hugging Face's libraries write it, by the reference library."""
    folder.mkdir()
    names = sorted(arrays)[::-1]  # an order of its own
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: arrays[name] for name in names[i::shards]}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(a.nbytes for a in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02never read")
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    return write_sharded(tmp_path / "model", weights())


def run(*args: Any) -> int:
    return main([str(a) for a in args])


# --- reading and writing --------------------------------------------------------------------------------------------


def test_three_layouts_are_read_alike(tmp_path, model):
    import orbax.checkpoint as ocp

    arrays = weights()
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {n.replace(".", "_"): a for n, a in arrays.items()})
    for path, layout in (("x.safetensors", "file"), ("model", "folder"), ("orbax", "orbax")):
        with export.open_checkpoint(tmp_path / path) as checkpoint:
            assert checkpoint.layout == layout
            for name, array in arrays.items():
                name = name.replace(".", "_") if layout == "orbax" else name
                tensor = checkpoint.tensors[name]
                assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
                assert checkpoint.read(name).tobytes() == array.tobytes()
    with export.open_checkpoint(model) as checkpoint:
        assert checkpoint.metadata == {"format": "pt"} and checkpoint.config == CONFIG
        assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert run("diff", tmp_path / "x.safetensors", model) == 0


def test_a_folder_like_another(tmp_path, model):
    with export.open_checkpoint(model) as checkpoint:
        pairs = ((name, checkpoint.read(name)) for name in checkpoint.tensors)
        export.save_checkpoint(tmp_path / "out", pairs, like=checkpoint)
    files = lambda folder: sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))  # noqa: E731
    assert files(tmp_path / "out") == [f for f in files(model) if not f.endswith(".bin")]
    for file in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        ours, theirs = (json.loads((p / file).read_text()) for p in (tmp_path / "out", model))
        assert ours == theirs
    for file in model.glob("*.safetensors"):
        with (
            safetensors.safe_open(file, "np") as a,
            safetensors.safe_open(tmp_path / "out" / file.name, "np") as b,
        ):
            assert set(a.keys()) == set(b.keys()) and a.metadata() == b.metadata()
    for name, array in load(tmp_path / "out").items():
        assert array.tobytes() == weights()[name].tobytes()


def test_what_an_index_says_besides_is_kept(tmp_path, model):
    file = model / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["metadata"] |= {"total_parameters": 1, "made_by": "us"}
    file.write_text(json.dumps(index))
    assert run("prune", model, tmp_path / "out", "--sparsity", "0.5") == 0
    kept = json.loads((tmp_path / "out" / file.name).read_text())["metadata"]
    numbers = sum(a.size for a in weights().values())
    assert kept == index["metadata"] | {"total_parameters": numbers}


def test_other_weights_stay_behind_and_are_named(tmp_path, model, capsys):
    (model / "original").mkdir()
    (model / "original" / "consolidated.00.pth").write_bytes(b"never read")
    (model / "consolidated.safetensors").write_bytes(b"never read")
    assert run("prune", model, tmp_path / "out", "--sparsity", "0.5") == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("left out"))
    names = "consolidated.safetensors", "original/consolidated.00.pth", "pytorch_model.bin"
    assert line.startswith(f"left out  {', '.join(names)}: states and weights")
    assert not any((tmp_path / "out" / name).exists() for name in names)


def test_heads_and_routers_are_pointed_out(tmp_path, model, capsys):
    assert run("prune", model, tmp_path / "out", "--sparsity", "0.5", "--dry-run") == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("note"))
    assert "model.layers.0.mlp.router.weight chooses experts" in line
    assert "lm_head" not in line  # it is the table of embeddings
    glob = line.split("'")[1]
    assert run("prune", model, tmp_path / "out", "--sparsity", "0.5", "--exclude", glob) == 0
    assert "chooses experts" not in capsys.readouterr().out
    with export.open_checkpoint(tmp_path / "out") as checkpoint:
        router = checkpoint.read("model.layers.0.mlp.router.weight")
    assert (router == weights()["model.layers.0.mlp.router.weight"]).all()


def test_shards_of_a_given_size(tmp_path):
    arrays = {f"{i}.weight": jnp.full((8, 8), i, jnp.float32) for i in range(5)}
    export.save_checkpoint(tmp_path / "out", arrays, shard_size=600)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    assert {n: a[0, 0] for n, a in load(tmp_path / "out").items()} == {
        f"{i}.weight": i for i in range(5)
    }
    export.save_checkpoint(tmp_path / "one", arrays)
    assert os.listdir(tmp_path / "one") == ["model.safetensors"]
    # More names than the room for a header takes begin another shard.
    many = ((f"{i:0200d}", np.zeros(1, np.float32)) for i in range(500))
    export.save_checkpoint(tmp_path / "many", many)
    assert len(load(tmp_path / "many")) == 500


@pytest.mark.parametrize(
    ("tensors", "error", "match"),
    [
        ([("a", np.ones(2)), ("a", np.ones(2))], ValueError, "'a' comes twice"),
        ({"a": np.ones(2, np.complex128)}, ValueError, "'a' is complex128"),
        ((1 / 0 for _ in [0]), ZeroDivisionError, "division"),
    ],
)
def test_a_folder_is_whole_or_not_there(tmp_path, tensors, error, match):
    with pytest.raises(error, match=match):
        export.save_checkpoint(tmp_path / "out", tensors)
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError):
            export.save_checkpoint(tmp_path / "notes", {"a": np.ones(2)}, overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    export.save_checkpoint(tmp_path / "empty", {"a": np.ones(2)})
    with pytest.raises(FileExistsError):
        export.save_checkpoint(tmp_path / "empty", {"a": np.zeros(2)})
    export.save_checkpoint(tmp_path / "empty", {"b": np.zeros(2)}, overwrite=True)
    assert list(load(tmp_path / "empty")) == ["b"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "notes"]


def test_what_a_killed_run_left_is_removed_and_what_runs_is_not(tmp_path):
    from prunax import _atomic

    (tmp_path / ".out.01234567.partial").mkdir()
    (tmp_path / ".out.01234567.partial" / "0.shard").write_text("half")
    running = _atomic.Place(tmp_path / "out", folder=True)
    assert os.listdir(tmp_path) == [running.temporary.name]
    export.save_checkpoint(tmp_path / "out", {"a": np.ones(2)})
    assert sorted(os.listdir(tmp_path)) == [running.temporary.name, "out"]
    running.discard()


# --- hostile indices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", hostile.INDICES)
def test_hostile_index(model, capsys, case):
    problem = hostile.change(model, case)
    with pytest.raises(export.FormatError, match=problem):
        export.open_checkpoint(model)
    out = model.parent / "out"
    assert run("prune", model, out, "--sparsity", "0.5") == 2
    said = capsys.readouterr()
    assert said.err.startswith("prunax prune: ") and said.err.count("\n") == 1
    assert os.listdir(model.parent) == ["model"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.gguf", b"GGUF", "is a GGUF file, which is not read here. Convert it"),
        ("x.bin", b"PK\x03\x04", "is a PyTorch pickle"),
        ("x.pt", b"", "is a PyTorch pickle"),
        ("x.h5", b"\x89HDF", "is an HDF5 file"),
        ("renamed", b"GGUF" + bytes(20), "is a GGUF file"),
        ("torch.safetensors", b"PK\x03\x04" + bytes(20), "is a PyTorch pickle"),
    ],
)
def test_other_formats_are_named(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert run("inspect", tmp_path / name) == 2
    assert message in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert run("inspect", tmp_path / "folder") == 2
    assert "pytorch_model.bin is a PyTorch pickle" in capsys.readouterr().err


# --- the command line on folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--sparsity", "0.5"],
        ["--sparsity", "0.37", "--allocation", "global"],
        ["--pattern", "2:4"],
        ["--sparsity", "0.5", "--allocation", "lamp"],
    ],
    ids=" ".join,
)
def test_shards_have_the_zeros_of_the_single_file(tmp_path, model, options):
    safetensors.numpy.save_file(weights(), tmp_path / "x.safetensors", {"format": "pt"})
    assert run("prune", tmp_path / "x.safetensors", tmp_path / "y.safetensors", *options) == 0
    assert run("prune", model, tmp_path / "out", *options) == 0
    single, sharded = (
        safetensors.numpy.load_file(tmp_path / "y.safetensors"),
        load(tmp_path / "out"),
    )
    assert single.keys() == sharded.keys()
    assert all(single[n].tobytes() == sharded[n].tobytes() for n in single)
    kernels = [n for n in single if "proj" in n or "router" in n]
    assert all(np.any(single[n] != weights()[n]) == (n in kernels) for n in single)
    assert run("diff", tmp_path / "y.safetensors", tmp_path / "out") == 0
    if "--pattern" in options:
        assert run("inspect", tmp_path / "out", *options) == 0


def test_folders_convert_and_compress(tmp_path, model, capsys):
    assert run("prune", model, tmp_path / "x.prunax", "--sparsity", "0.8", "--compress") == 0
    apart = "apart     1_Pooling/config.json, config.json, tokenizer.json: a file holds tensors, and no more"
    assert apart in capsys.readouterr().out
    with safetensors.safe_open(tmp_path / "x.prunax", "np") as opened:
        assert opened.metadata()["format"] == "prunax"
    assert run("convert", tmp_path / "x.prunax", tmp_path / "out") == 0
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as opened:
        assert opened.metadata()["format"] == "pt"
    assert run("diff", tmp_path / "x.prunax", tmp_path / "out") == 0
    assert run("prune", model, tmp_path / "other", "--sparsity", "0.8") == 0
    assert run("diff", tmp_path / "other", tmp_path / "out") == 0


def test_where_narrows_and_select_replaces(tmp_path, model, capsys):
    base = ["prune", model, tmp_path / "out", "--sparsity", "0.5", "--dry-run"]
    assert run(*base, "--where", "*layers.1*") == 0
    said = capsys.readouterr().out
    chosen = [line.split()[0] for line in said.splitlines() if line.startswith("  ")]
    assert sorted(chosen) == [f"model.layers.1.mlp.{n}_proj.weight" for n in ("down", "up")]
    assert (
        "whole     1, a table of embeddings, positions or tokens, by its folder: model.embed"
        in said
    )
    assert run(*base, "--where", "*embed_tokens*") == 2
    assert "is left whole: a table of embeddings" in capsys.readouterr().err
    assert run(*base, "--select", "*embed_tokens*") == 0
    assert "\n  model.embed_tokens.weight  40 x 16" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["model"]


def test_quantised_checkpoints(tmp_path, capsys):
    rng = np.random.default_rng(0)
    fp8 = rng.normal(size=(64, 64)).astype(ml_dtypes.float8_e4m3fn)
    arrays = {
        "a.up_proj.weight": fp8,
        "a.up_proj.weight_scale_inv": rng.random((2, 2)).astype("f4"),
        "b.up_proj.weight": fp8,
        "b.up_proj.weight_scale": rng.random((64, 1)).astype("f4"),
        "b.up_proj.weight_zero_point": rng.random((64, 1)).astype("f4"),
        "c.up_proj.qweight": np.ones((8, 64), np.int32),
        "c.up_proj.scales": rng.random((4, 64)).astype("f2"),
    }
    export.save_checkpoint(tmp_path / "x", arrays)
    assert run("prune", tmp_path / "x", tmp_path / "y", "--sparsity", "0.5") == 0
    said = capsys.readouterr().out
    assert "chosen    1 of 7 tensors" in said and "so that a stored zero is no zero: b.up" in said
    with export.open_checkpoint(tmp_path / "y") as checkpoint:
        pruned = {name: checkpoint.read(name) for name in arrays}
    assert [n for n in arrays if pruned[n].tobytes() != arrays[n].tobytes()] == ["a.up_proj.weight"]
    scale = np.kron(arrays["a.up_proj.weight_scale_inv"], np.ones((32, 32)))
    assert np.mean(pruned["a.up_proj.weight"].astype("f4") * scale == 0) == pytest.approx(
        0.5, abs=0.02
    )


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("-", [], "nothing is written to the output stream"),
        ("x.gguf", [], ".gguf is not written. Name OUT.safetensors, or a folder"),
        ("x.bin", [], ".bin is not written"),
        ("notes", ["--overwrite"], "holds no checkpoint, and is not replaced"),
        ("taken", [], "exists already. Choose another name, or pass --overwrite"),
        ("no/out", [], "does not exist"),
        ("model/out", [], "over itself, or within"),
        ("out", ["--compress"], "--compress writes one file"),
    ],
)
def test_out_is_checked_before_work(tmp_path, model, capsys, out, options, message):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    write_sharded(tmp_path / "taken", weights())
    target = out if out == "-" else tmp_path / out
    assert run("prune", model, target, "--sparsity", "0.5", *options) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""
    assert sorted(os.listdir(tmp_path)) == ["model", "notes", "taken"]


def test_a_page_has_pictures(tmp_path, model):
    run("prune", model, tmp_path / "out", "--sparsity", "0.5")
    page = tmp_path / "page.html"
    assert run("report", tmp_path / "out", "--format", "html", "--out", page) == 0
    assert page.read_text().count("data:image/png;base64,") == 3


def test_looking_needs_no_jax(model):
    code = "import sys; from prunax.cli import main; main(sys.argv[1:]); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "inspect", model, "--json"], check=True)


# --- faults ---------------------------------------------------------------------------------------------------------


def big(folder: Path, megabytes: int = 24) -> Path:
    rng = np.random.default_rng(0)
    arrays = {f"{i}.weight": rng.standard_normal((512, 512), np.float32) for i in range(megabytes)}
    return write_sharded(folder, arrays)


def big_orbax(folder: Path, megabytes: int = 24) -> Path:
    arrays = load(big(folder.with_name("sharded"), megabytes))
    shutil.rmtree(folder.with_name("sharded"))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, arrays)
    return folder


@pytest.mark.parametrize("make", [big, big_orbax])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing_and_say_one_line(tmp_path, number, make):
    source = make(tmp_path / "model")
    command = [
        sys.executable,
        "-m",
        "prunax",
        "prune",
        source,
        tmp_path / "out",
        "--sparsity",
        "0.5",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.*.partial/*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (
        128 + number,
        "prunax: interrupted, nothing was written\n",
    )
    assert os.listdir(tmp_path) == ["model"]


AT_IMPORT = """
import os, sys
number, module = int(sys.argv.pop(1)), sys.argv.pop(1)

class Finder:
    def find_spec(self, name, *args):
        if name == module:
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Finder())
from prunax.__main__ import main  # as the command `prunax` does
sys.exit(main())
"""


@pytest.mark.parametrize(
    "module", ["prunax.cli", "argparse", "numpy", "prunax._atomic", "jax", "jax.numpy"]
)
def test_signals_while_modules_are_imported(tmp_path, module):
    source = write_sharded(tmp_path / "model", weights())
    number = signal.SIGINT if len(module) % 2 else signal.SIGTERM
    command = [sys.executable, "-c", AT_IMPORT, str(int(number)), module]
    command += ["prune", source, tmp_path / "out", "--sparsity", "0.5"]
    result = subprocess.run(command, capture_output=True, text=True)
    said = "prunax: interrupted, nothing was written\n"
    assert (result.returncode, result.stderr) == (128 + number, said)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("make", "out"),
    [(big, "out"), (big, "out.safetensors"), (big, "out.prunax"), (big_orbax, "out")],
)
def test_full_disk(tmp_path, make, out):
    source = make(tmp_path / "model", 6)
    full = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
        "runpy.run_module('prunax', run_name='__main__')"
    )
    command = [sys.executable, "-c", full, "prune", source, tmp_path / out, "--sparsity", "0.5"]
    command += ["--compress"] if out.endswith("prunax") else []
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"prunax prune: {tmp_path / out}: File too large\n"
    assert os.listdir(tmp_path) == ["model"]


# --- smaller networks -----------------------------------------------------------------------------------------------


def attention_and_mlp(params: Any, x: jax.Array) -> jax.Array:
    """Heads apart in the parameters, together in the checkpoint."""
    for layer in params["layers"]:
        heads = jnp.tanh(jnp.einsum("bd,dhk->bhk", x, layer["q"]))
        x = x + jnp.einsum("bhk,hkd->bd", heads, layer["o"])
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x


def test_shrink_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    make = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    layer = lambda: dict(q=make(12, 4, 3), o=make(4, 3, 12), up=make(12, 24), down=make(24, 12))  # noqa: E731
    params = {"layers": [layer(), layer(), layer()]}
    small = prunax.structured.prune_channels(
        attention_and_mlp, params, jnp.ones((2, 12)), sparsity=0.5
    )
    arrays, names = {"model.norm.weight": np.ones(12, np.float32)}, {}
    for i, leaves in enumerate(params["layers"]):
        stored = f"model.layers.{i}."
        for name, axes in {"q": (1, 2, 0), "o": (2, 0, 1), "up": (1, 0), "down": (1, 0)}.items():
            array = np.transpose(leaves[name], axes)
            shape = {"q": (12, 12), "o": (12, 12)}.get(name, array.shape)
            arrays[f"{stored}{name}.weight"] = array.reshape(shape)
            names[f"layers/{i}/{name}"] = (f"{stored}{name}.weight", axes)
    source = tmp_path / "whole"
    export.save_checkpoint(source, arrays, config={"intermediate_size": 24, "hidden_size": 12})
    call = lambda **options: export.shrink_checkpoint(  # noqa: E731
        source, tmp_path / "small", small.keep, names=names, **options
    )
    with pytest.raises(
        ValueError, match="intermediate_size: 24, and no tensor has an axis of this"
    ):
        call()
    with pytest.raises(ValueError, match=r"intermediate_size: 13 fits no axis"):
        call(config={"intermediate_size": 13})
    with pytest.raises(ValueError, match=r"no tensor's name begins with 'model.layers.7'"):
        call(config={"intermediate_size": 12}, without=["model.layers.7"])
    assert not (tmp_path / "small").exists()
    call(config={"intermediate_size": 12}, without=["model.layers.1"])
    found = load(tmp_path / "small")
    assert sorted(found) == sorted(
        ["model.norm.weight", *(f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in layer())]
    )
    for new, old in ((0, 0), (1, 2)):
        for name, axes in {"q": (1, 2, 0), "o": (2, 0, 1), "up": (1, 0), "down": (1, 0)}.items():
            wanted = np.transpose(small.params["layers"][old][name], axes)
            array = found[f"model.layers.{new}.{name}.weight"]
            np.testing.assert_array_equal(array, wanted.reshape(array.shape))
    assert json.loads((tmp_path / "small" / "config.json").read_text())["intermediate_size"] == 12


def test_shrink_checkpoint_names_what_is_missing(tmp_path):
    params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 3))}
    function = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    small = prunax.structured.prune_channels(function, params, jnp.ones((2, 4)), sparsity=0.5)
    export.save_checkpoint(
        tmp_path / "whole", {"up.weight": params["up"].T, "down": params["down"]}
    )
    for names, match in (
        (None, r"'up' shrinks, and 'up' is no tensor of"),
        (
            {"up": "up.weight", "down": "down"},
            r"'up.weight' has shape \(8, 4\), and 'up' has \(4, 8\)",
        ),
        ({"up": ("up.weight", (0, 0)), "down": "down"}, "are no order of those of 'up'"),
    ):
        with pytest.raises(ValueError, match=match):
            export.shrink_checkpoint(
                tmp_path / "whole", tmp_path / "small", small.keep, names=names
            )
    assert os.listdir(tmp_path) == ["whole"]
