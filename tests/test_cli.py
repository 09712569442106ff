"""The command line on files and checkpoint folders: the same masks as the library, one tensor at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import prunax
from prunax import export
from prunax.cli import _options, _ranking, main
from prunax.export._checkpoints import Tensor


def torch_like(seed: int = 0) -> dict[str, np.ndarray]:
    """A file with the names and layouts of a Hugging Face encoder, biased so that layers differ."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embeddings.word_embeddings.weight": (50, 8),
        "embeddings.LayerNorm.weight": (8,),
        "encoder.layer.0.attention.query.weight": (8, 8),
        "encoder.layer.0.attention.query.bias": (8,),
        "encoder.layer.0.intermediate.weight": (16, 8),
        "encoder.layer.0.output.weight": (8, 16),
    }
    arrays = {
        n: rng.standard_normal(s).astype(np.float32) * (i + 1)
        for i, (n, s) in enumerate(shapes.items())
    }
    return arrays | {"embeddings.position_ids": np.arange(5)[None]}


WEIGHTS = ["attention.query", "intermediate", "output"]
WEIGHTS = [f"encoder.layer.0.{name}.weight" for name in WEIGHTS]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(torch_like(), path, {"format": "pt"})
    return path


def run(*args: Any) -> int:
    return main([str(a) for a in args])


def masks_of(arrays: dict[str, np.ndarray], sparsity=None, **options) -> dict[str, np.ndarray]:
    tree = {n: jnp.asarray(a) for n, a in arrays.items()}
    masks = prunax.compute_masks(
        tree, sparsity, where=lambda path, leaf: path in WEIGHTS, **options
    )
    return {n: np.asarray(masks[n]) for n in WEIGHTS}


# --- ranking by histograms ------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]),
    sparsity=st.floats(0, 1),
    size=st.sampled_from([1, 5, 200]),
    levels=st.sampled_from([2, 5, 10_000]),
    seed=st.integers(0, 10**6),
)
def test_ranking_is_that_of_compute_masks(name, sparsity, size, levels, seed):
    rng = np.random.default_rng(seed)
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    values = np.round(rng.standard_normal((3, size)) * levels).clip(-400, 400) / 64  # many ties
    arrays = [v.astype(dtype) for v in values]
    masks = prunax.compute_masks(
        [jnp.asarray(a) for a in arrays],
        sparsity,
        allocation=prunax.allocation.global_ranking,
        where=lambda path, leaf: True,
    )
    common = _ranking.common_dtype(a.dtype for a in arrays)
    cut = _ranking.find_cut(lambda: arrays, common, round(sparsity * 3 * size))
    for array, expected in zip(arrays, masks, strict=True):
        mask, cut = _ranking.apply_cut(array, cut)
        np.testing.assert_array_equal(mask, np.asarray(expected))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("n", "m"), [(0, 2), (1, 2), (2, 4), (5, 8), (8, 8)])
def test_ranking_in_groups_is_that_of_compute_masks(axis, n, m):
    array = np.random.default_rng(n).integers(-5, 6, (8, 16, 24)).astype(ml_dtypes.bfloat16)
    pattern = prunax.patterns.NM(n, m, axis=axis)
    mask = prunax.compute_masks({"w": jnp.asarray(array)}, pattern=pattern)["w"]
    np.testing.assert_array_equal(
        _ranking.largest_in_groups(array, axis, m, m - n), np.asarray(mask)
    )


def test_ranking_of_wide_and_extreme_numbers():
    array = np.array([5e-324, -1.0, 0.0, np.inf, 1 + 2**-52, -0.0, 1.0])
    order = np.argsort(np.abs(array), kind="stable")
    for k in range(8):
        mask, _ = _ranking.apply_cut(array, _ranking.find_cut(lambda: [array], array.dtype, k))
        if k not in (1, 4):  # where a tie is cut: the first is kept
            np.testing.assert_array_equal(np.flatnonzero(~mask), np.sort(order[:k]))
        assert np.count_nonzero(~mask) == k
    mask, _ = _ranking.apply_cut(array, _ranking.find_cut(lambda: [array], array.dtype, 1))
    assert mask.tolist() == [True, True, True, True, True, False, True]
    assert _ranking.common_dtype([np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)]) == np.float32


# --- prune ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--sparsity", 0.5], dict(sparsity=0.5)),
        (["--sparsity", 0], dict(sparsity=0.0)),
        (["--sparsity", 1], dict(sparsity=1.0)),
        (["--pattern", "2:4"], dict(pattern=prunax.patterns.NM(2, 4, axis=1))),
        (["--pattern", "2:4", "--layout", "in-out"], dict(pattern=prunax.patterns.NM(2, 4))),
        (
            ["--pattern", "fan-in", "--sparsity", 0.7],
            dict(sparsity=0.7, pattern=prunax.patterns.ConstantFanIn(1)),
        ),
        (
            ["--pattern", "block:3x4", "--sparsity", 0.6],
            dict(sparsity=0.6, pattern=prunax.patterns.Block((3, 4))),
        ),
        (
            ["--pattern", "channel", "--sparsity", 0.5],
            dict(sparsity=0.5, pattern=prunax.patterns.Channel(0)),
        ),
        (
            ["--pattern", "block:4x4", "--sparsity", 0.5, "--allocation", "global"],
            dict(
                sparsity=0.5,
                pattern=prunax.patterns.Block((4, 4)),
                allocation=prunax.allocation.global_ranking,
            ),
        ),
        (
            ["--sparsity", 0.8, "--allocation", "global"],
            dict(sparsity=0.8, allocation=prunax.allocation.global_ranking),
        ),
        (
            ["--sparsity", 0.8, "--allocation", "erdos-renyi"],
            dict(sparsity=0.8, allocation=prunax.allocation.erdos_renyi),
        ),
        (
            ["--sparsity", 0.8, "--allocation", "lamp"],
            dict(sparsity=0.8, allocation=prunax.allocation.lamp),
        ),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_prune_makes_the_masks_of_compute_masks(file, tmp_path, compress, options, expected):
    out = tmp_path / "out.safetensors"
    assert run("prune", file, out, *options, *(["--compress"] if compress else [])) == 0
    arrays = torch_like()
    masks = masks_of(arrays, **expected)
    pruned = export.load_params(out) if compress else safetensors.numpy.load_file(out)
    assert pruned.keys() == arrays.keys()
    for name, array in arrays.items():
        wanted = np.where(masks[name], array, np.float32(0)) if name in masks else array
        assert pruned[name].tobytes() == wanted.tobytes(), name


def test_slabs_and_pieces_change_nothing(file, tmp_path, monkeypatch):
    from prunax.cli import _pruning

    for options in (
        ["--pattern", "2:4"],
        ["--pattern", "fan-in", "--sparsity", "0.6"],
        ["--sparsity", "0.3"],
    ):
        run("prune", file, tmp_path / "whole.safetensors", "--overwrite", *options)
        with monkeypatch.context() as patch:
            patch.setattr(_pruning, "_SLAB", 24)
            patch.setattr(_pruning, "_PIECE", 7)
            patch.setattr(_ranking, "_PIECE", 7)
            run("prune", file, tmp_path / "parts.safetensors", "--overwrite", *options)
        assert run("diff", tmp_path / "whole.safetensors", tmp_path / "parts.safetensors") == 0


def test_prune_says_what_it_does(file, tmp_path, capsys):
    run("prune", file, tmp_path / "o.safetensors", "--pattern", "2:4")
    said = capsys.readouterr().out
    assert (
        "keeps 2 of every 4 weights in a row along the input axis, axis 1 of weights stored as (out, in)"
        in said
    )
    assert "since all names end in 'weight'" in said
    assert "3 of 7 tensors, 320 of 741 numbers" in said and "embeddings stay" in said
    assert "kept      160 of 320 weights: sparsity 50.0000%" in said
    run("prune", file, tmp_path / "o2.safetensors", "--sparsity", "0.5")
    assert "the layout does not matter" in capsys.readouterr().out
    with safetensors.safe_open(tmp_path / "o.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt", "prunax.pattern": "NM(n=2, m=4, axis=1)"}


def test_tensors_by_name(file, tmp_path):
    out = tmp_path / "out.safetensors"
    run(
        "prune",
        file,
        out,
        "--sparsity",
        "1",
        "--select",
        "*embeddings*weight",
        "--exclude",
        "*LayerNorm*",
    )
    pruned = safetensors.numpy.load_file(out)
    assert [n for n, a in pruned.items() if not a.any()] == ["embeddings.word_embeddings.weight"]
    run("prune", file, out, "--sparsity", "1", "--where", "encoder/layer/0/output/*", "--force")
    pruned = safetensors.numpy.load_file(out)
    assert [n for n, a in pruned.items() if not a.any()] == ["encoder.layer.0.output.weight"]


def test_dry_run_writes_nothing(file, tmp_path, capsys):
    assert run("prune", file, tmp_path / "o.safetensors", "--sparsity", "0.5", "--dry-run") == 0
    assert WEIGHTS[0] in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--pattern", "2:4", "--where", "*.query.*", "--where", "*position_ids"],
            "is int64 and has no magnitude",
        ),
        (["--sparsity", "0.5", "--where", "nothing*"], "matches no tensor"),
        (["--sparsity", "0.5", "--exclude", "*"], "no tensor is chosen"),
        ([], "how much? Pass --sparsity"),
        (["--pattern", "3:7"], "does not fit 'encoder.layer.0.attention.query.weight'"),
        (["--pattern", "2:4", "--sparsity", "0.9"], "prunes at most 0.5"),
        (["--pattern", "2:4", "--allocation", "global"], "nothing to rank across leaves"),
    ],
)
def test_prune_refuses(file, tmp_path, capsys, args, message):
    assert run("prune", file, tmp_path / "out.safetensors", *args) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    "args", [["--sparsity", "80"], ["--pattern", "4:2"], ["--pattern", "x"], ["--layout", "x"]]
)
def test_wrong_options_exit_with_2(file, tmp_path, args):
    with pytest.raises(SystemExit) as exit:
        run("prune", file, tmp_path / "out.safetensors", *args)
    assert exit.value.code == 2


def test_nan_is_refused_and_named(tmp_path, capsys):
    safetensors.numpy.save_file({"a.weight": np.full((4, 4), np.nan)}, tmp_path / "in.safetensors")
    assert (
        run("prune", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--sparsity", "0.5")
        == 2
    )
    assert "'a.weight' contains NaN" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_nothing_is_overwritten_unasked(file, tmp_path, capsys):
    before = file.read_bytes()
    assert run("prune", file, file, "--sparsity", "0.5") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert run("prune", file, file, "--sparsity", "0.5", "--overwrite") == 0
    assert run("inspect", file) == 0
    assert run("prune", file, tmp_path / "no" / "out.safetensors", "--sparsity", "0.5") == 2


@pytest.mark.parametrize(
    ("names", "layout"),
    [(["a.kernel", "b.kernel"], "in-out"), (["a.weight"], "out-in"), (["w", "v"], None)],
)
def test_layout_by_names(names, layout):
    tensors = [Tensor(n, n.replace(".", "/"), (4, 4), "float32") for n in names]
    if layout is None:
        with pytest.raises(_options.UsageError, match="--layout in-out or --layout out-in"):
            _options.find_layout("auto", tensors)
    else:
        assert _options.find_layout("auto", tensors).name == layout
    assert _options.find_layout("in-out", tensors).inputs == -2


def test_the_other_way_of_gpt2_is_seen(tmp_path, capsys):
    rng = np.random.default_rng(0)
    shapes = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32)}
    arrays = {f"h.0.{n}.weight": rng.normal(size=s).astype("f4") for n, s in shapes.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "gpt2.safetensors")
    out = tmp_path / "out.safetensors"
    assert run("prune", tmp_path / "gpt2.safetensors", out, "--pattern", "2:4") == 0
    assert "axis -2 of weights stored as (in, out), since layers that widen" in (
        capsys.readouterr().out
    )
    for name, array in safetensors.numpy.load_file(out).items():
        export.verify_pattern({name: array != 0}, prunax.patterns.NM(2, 4, axis=0))
    assert run("inspect", out, "--pattern", "2:4") == 0
    # As torch's Linear would have it, it is no Conv1D.
    turned = {name: np.ascontiguousarray(array.T) for name, array in arrays.items()}
    safetensors.numpy.save_file(turned, tmp_path / "linear.safetensors")
    assert (
        run("prune", tmp_path / "linear.safetensors", out, "--pattern", "2:4", "--overwrite") == 0
    )
    assert "stored as (out, in)" in capsys.readouterr().out
    # Those that are not chosen tell, too; without them nothing does.
    options = "--pattern", "2:4", "--overwrite", "--where", "h.0.attn.c_proj.weight"
    assert run("prune", tmp_path / "gpt2.safetensors", out, *options) == 0
    assert "stored as (in, out)" in capsys.readouterr().out
    square = {"h.0.attn.c_proj.weight": arrays["h.0.attn.c_proj.weight"]}
    safetensors.numpy.save_file(square, tmp_path / "square.safetensors")
    assert run("prune", tmp_path / "square.safetensors", out, *options) == 2
    assert "Say which: --layout in-out" in capsys.readouterr().err
    # Two towers that tell different things.
    both = arrays | {f"vision.{name}": array for name, array in turned.items()}
    safetensors.numpy.save_file(both, tmp_path / "both.safetensors")
    assert run("prune", tmp_path / "both.safetensors", out, "--pattern", "2:4", "--overwrite") == 2
    assert "Say which: --layout in-out" in capsys.readouterr().err
    # Beside a layer of torch's it depends on which is meant.
    mixed = arrays | {"lm_head.weight": rng.normal(size=(40, 8)).astype("f4")}
    safetensors.numpy.save_file(mixed, tmp_path / "mixed.safetensors")
    assert run("prune", tmp_path / "mixed.safetensors", tmp_path / "no", "--pattern", "2:4") == 2
    assert "'lm_head.weight' may lie the other way" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b'{"model_type": "llama", "vocab_size": 8}', "is not a safetensors file"),
        ((1000).to_bytes(8, "little") + b"{}", "header should have 1000 bytes, the file has 2"),
    ],
)
def test_what_is_no_safetensors_file_is_called_so(tmp_path, capsys, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert run("inspect", tmp_path / "model.safetensors") == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_something_else(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    assert run("inspect", tmp_path) == 2
    assert "holds no checkpoint: neither model.safetensors" in capsys.readouterr().err


def test_convolutions_of_pytorch_are_grouped_along_their_inputs(tmp_path):
    array = np.random.default_rng(0).standard_normal((6, 8, 3, 3))
    safetensors.numpy.save_file({"conv.weight": array}, tmp_path / "in.safetensors")
    run("prune", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--pattern", "1:4")
    pruned = safetensors.numpy.load_file(tmp_path / "out.safetensors")["conv.weight"]
    assert np.all(np.count_nonzero(pruned.reshape(6, 2, 4, 3, 3), axis=2) == 1)
    largest = np.abs(array.reshape(6, 2, 4, 3, 3)).max(axis=2)  # in float64, which the file holds
    assert np.array_equal(np.abs(pruned.reshape(6, 2, 4, 3, 3)).max(axis=2), largest)


def test_every_dtype_passes_through(tmp_path):
    arrays = {
        "half.weight": np.linspace(-1, 1, 64).reshape(8, 8).astype(ml_dtypes.bfloat16),
        "eighth.weight": np.linspace(-1, 1, 64).reshape(8, 8).astype(ml_dtypes.float8_e4m3fn),
        "flags": np.array([True, False]),
        "codes": np.arange(7, dtype=np.int8),
    }
    export.save_params(tmp_path / "in.safetensors", arrays)
    assert (
        run(
            "prune",
            tmp_path / "in.safetensors",
            tmp_path / "out.safetensors",
            "--sparsity",
            "0.75",
            "--compress",
        )
        == 0
    )
    pruned = export.load_params(tmp_path / "out.safetensors")
    for name in ("half.weight", "eighth.weight"):
        assert np.count_nonzero(pruned[name].astype(np.float32)) == 16
    assert pruned["codes"].tobytes() == arrays["codes"].tobytes()
    assert run("convert", tmp_path / "out.safetensors", tmp_path / "plain.safetensors") == 0
    assert run("diff", tmp_path / "out.safetensors", tmp_path / "plain.safetensors") == 0
    assert (
        run("convert", tmp_path / "plain.safetensors", tmp_path / "again.safetensors", "--compress")
        == 0
    )
    assert run("diff", tmp_path / "again.safetensors", tmp_path / "plain.safetensors") == 0


def test_tensors_without_elements_and_without_zeros(tmp_path):
    arrays = {
        "empty.weight": np.zeros((0, 8), np.float32),
        "scales.weight": np.ones((4, 4), ml_dtypes.float8_e8m0fnu),
        "w.weight": np.ones((4, 4), np.float32),
        "scalar": np.array(2.0),
    }
    export.save_params(tmp_path / "in.st", arrays)
    for i, options in enumerate(
        (["--sparsity", "0.5"], ["--pattern", "2:4"], ["--pattern", "fan-in", "--sparsity", "0.5"])
    ):
        assert run("prune", tmp_path / "in.st", tmp_path / f"{i}.st", *options, "--compress") == 0
        pruned = export.load_params(tmp_path / f"{i}.st")
        assert pruned["w.weight"].sum() == 8 and pruned["empty.weight"].shape == (0, 8)
        assert pruned["scales.weight"].tobytes() == arrays["scales.weight"].tobytes()
    assert run("inspect", tmp_path / "1.st", "--pattern", "2:4") == 0
    assert (
        run("prune", tmp_path / "in.st", tmp_path / "o.st", "--sparsity", "1", "--where", "scales*")
        == 2
    )


def test_packed_dtypes_that_numpy_lacks_are_copied(tmp_path):
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    header["b.weight"] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [2, 18]}
    text = json.dumps(header).encode()
    data = b"xy" + np.array([1, 2, 3, 4], np.float32).tobytes()
    (tmp_path / "in").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert run("inspect", tmp_path / "in") == 0
    for extra in ([], ["--compress"]):
        assert (
            run(
                "prune",
                tmp_path / "in",
                tmp_path / "out.st",
                "--sparsity",
                "0.5",
                "--overwrite",
                *extra,
            )
            == 0
        )
        assert b"xy" in (tmp_path / "out.st").read_bytes()


# --- checkpoint folders ---------------------------------------------------------------------------------------------


def test_orbax_checkpoints(tmp_path, capsys):
    import orbax.checkpoint as ocp

    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.float32)
    tree = {
        "params": {
            "dense": {"kernel": kernel, "bias": jnp.ones(6)},
            "half": [{"kernel": kernel.astype(jnp.bfloat16)}],
        },
        "opt_state": {"mu": {"kernel": kernel}},
        "step": 7,
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in", tree)
    assert run("prune", tmp_path / "in", tmp_path / "out", "--pattern", "2:4") == 0
    assert (
        "axis -2 of weights stored as (in, out), since all names end in 'kernel'"
        in capsys.readouterr().out
    )
    with ocp.StandardCheckpointer() as checkpointer:
        pruned = checkpointer.restore(tmp_path / "out", tree)
    masks = prunax.compute_masks(tree["params"], pattern=prunax.patterns.NM(2, 4))
    wanted = prunax.apply_masks(tree["params"], masks)
    assert jnp.array_equal(pruned["params"]["dense"]["kernel"], wanted["dense"]["kernel"])
    assert jnp.array_equal(pruned["params"]["half"][0]["kernel"], wanted["half"][0]["kernel"])
    assert jnp.array_equal(pruned["opt_state"]["mu"]["kernel"], kernel) and pruned["step"] == 7
    assert run("inspect", tmp_path / "out", "--pattern", "2:4") == 0
    assert (
        run(
            "prune", tmp_path / "in", tmp_path / "out.safetensors", "--pattern", "2:4", "--compress"
        )
        == 0
    )
    flat = export.load_params(tmp_path / "out.safetensors")
    assert flat["params/dense/kernel"].tobytes() == np.asarray(wanted["dense"]["kernel"]).tobytes()
    assert run("diff", tmp_path / "out", tmp_path / "out.safetensors") == 0
    assert run("prune", tmp_path / "in", tmp_path / "out", "--pattern", "2:4") == 2
    assert run("prune", tmp_path / "in", tmp_path / "in", "--pattern", "2:4", "--overwrite") == 2
    assert run("prune", tmp_path / "in", tmp_path / "out2", "--pattern", "2:4", "--compress") == 2
    assert run("inspect", tmp_path) == 2


# --- inspect, diff, report ------------------------------------------------------------------------------------------


def test_inspect(file, tmp_path, capsys):
    out = tmp_path / "nm.safetensors"
    run("prune", file, out, "--pattern", "2:4")
    capsys.readouterr()
    assert run("inspect", out, "--json") == 0
    tensors = {t["name"]: t for t in json.loads(capsys.readouterr().out)["tensors"]}
    for name in WEIGHTS:
        assert tensors[name]["sparsity"] == 0.5 and "2:4 axis 1" in tensors[name]["nm"]
    assert tensors["embeddings.word_embeddings.weight"]["nm"] == []
    assert run("inspect", out) == 0
    assert "encoder.layer.0.attention.query.weight" in capsys.readouterr().out
    assert run("inspect", out, "--pattern", "2:4") == 0
    assert "3 of 3 tensors follow NM(n=2, m=4, axis=1)" in capsys.readouterr().err
    assert run("inspect", file, "--pattern", "2:4") == 1
    assert "unit (0, 0) keeps 4 of its 4 weights" in capsys.readouterr().err


def test_diff(file, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    run("prune", file, out, "--sparsity", "0.25", "--where", WEIGHTS[0])
    capsys.readouterr()
    assert run("diff", file, file) == 0
    assert run("diff", file, out, "--json") == 1
    said = capsys.readouterr().out
    (difference,) = json.loads(said[said.index("[") :])
    array = torch_like()[WEIGHTS[0]]
    assert difference["name"] == WEIGHTS[0]
    assert (difference["changed"], difference["pruned"], difference["revived"]) == (16, 16, 0)
    assert difference["largest"] == np.sort(np.abs(array).reshape(-1))[15]
    assert difference["overlap"] == 0.75
    other = {n: a for n, a in torch_like().items() if n not in WEIGHTS} | {"new": np.ones(1)}
    safetensors.numpy.save_file(other, tmp_path / "other.safetensors")
    assert run("diff", file, tmp_path / "other.safetensors") == 1
    said = capsys.readouterr().out
    assert (
        "only in the first" in said
        and "only in the second" in said
        and "4 of 8 tensors differ" in said
    )


def test_report(file, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    run("prune", file, out, "--sparsity", "0.75")
    capsys.readouterr()
    assert run("report", out, "--format", "json") == 0
    totals = json.loads(capsys.readouterr().out)["prunable"]
    assert totals == {"weights": 320, "kept": 80, "sparsity": 0.75}
    assert run("report", out) == 0
    assert "75.00%" in capsys.readouterr().out
    assert run("report", out, "--format", "markdown", "--out", tmp_path / "r.md") == 0
    row = "| encoder.layer.0.output.weight | 8 x 16 | float32 | 128 | 32 | 75.00% |"
    assert row in (tmp_path / "r.md").read_text()
    assert run("report", out, "--format", "html", "--out", tmp_path / "r.html") == 0
    page = (tmp_path / "r.html").read_text()
    assert page.startswith("<!doctype html>") and ">75.00%</td>" in page
    assert run("report", out, "--format", "json", "--out", tmp_path / "r.md") == 2


def test_damaged_and_missing_files_exit_with_2(file, tmp_path, capsys):
    (tmp_path / "bad").write_bytes(file.read_bytes()[:-1])
    for path in (tmp_path / "bad", tmp_path / "missing"):
        for command in (
            ["inspect", path],
            ["report", path],
            ["diff", file, path],
            ["diff", path, file],
        ):
            assert run(*command) == 2
            assert capsys.readouterr().err.startswith(f"prunax {command[0]}: ")


def test_names_cannot_speak_to_the_terminal(tmp_path, capsys):
    names = {"a\x1b]0;title\x07.weight": np.eye(4), "[red]b[/red].weight": np.eye(4)}
    safetensors.numpy.save_file(names, tmp_path / "x")
    for command in (["inspect", tmp_path / "x"], ["report", tmp_path / "x"]):
        assert run(*command) == 0
        said = capsys.readouterr().out
        assert "\x1b" not in said and "\x07" not in said and "[red]b[/red]" in said
    assert (
        run("prune", tmp_path / "x", tmp_path / "y.safetensors", "--sparsity", "0.5", "--dry-run")
        == 0
    )
    assert "\x1b" not in capsys.readouterr().out


def test_help_has_examples(capsys):
    for command in ("inspect", "prune", "diff", "report", "convert"):
        with pytest.raises(SystemExit) as exit:
            main([command, "--help"])
        assert exit.value.code == 0
        assert f"  prunax {command} " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "exit codes:" in capsys.readouterr().out


# The peak of this process's own memory: `getrusage` counts that of the process it was forked from too.
MEASURE = """
import re, sys
from prunax.cli import _pruning, main  # the first loads JAX, which is not to be counted
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
assert main(sys.argv[1:]) == 0
print("grown", 1024 * (peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
@pytest.mark.parametrize(
    "options", [["--sparsity", "0.5"], ["--sparsity", "0.9", "--compress"]], ids=str
)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_file_of_many_tensors_is_never_in_memory(tmp_path, options, allocation):
    rng = np.random.default_rng(0)
    arrays = {
        f"{i}.weight": rng.standard_normal((512, 1024), np.float32) for i in range(40)
    }  # 2 MB each
    safetensors.numpy.save_file(arrays, tmp_path / "in.safetensors")
    args = [
        "prune",
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        "--allocation",
        allocation,
        *options,
    ]
    command = [sys.executable, "-c", MEASURE, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = int(result.stdout.split("grown")[1])
    assert grown < 40 << 20, f"{grown >> 20} MB more for tensors of 2 MB in a file of 80"
