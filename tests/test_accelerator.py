"""benchmarks.accelerator: rehearsed on the CPU, killed half-way, and shown in the documentation."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator, harness, render, smollm

ROOT = Path(__file__).parents[1]
QUICK = [sys.executable, "-m", "benchmarks.accelerator", "--quick", "--out"]
FILE = "accelerator-cpu.json"


def test_quick_run(tmp_path):
    done = subprocess.run([*QUICK, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / FILE).read_text())
    assert content["complete"] and not content["accelerator"]
    assert content["environment"]["packages"]["jax"] == jax.__version__
    assert [row["row"] for row in content["rows"]] == list(
        accelerator.rows(accelerator.QUICK, memory=1e9)
    )
    for row in content["rows"]:
        assert row["exact"] and all(row["exact"].values()), row
    assert (
        "a rehearsal on a CPU, no accelerator" in (tmp_path / FILE).with_suffix(".md").read_text()
    )


def test_killed_half_way_it_leaves_what_it_has(tmp_path):
    # These rows are quick to compile; what is killed is in the middle of one of them.
    process = subprocess.Popen(
        [*QUICK, tmp_path, "--only", "packed"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    file, rows = tmp_path / FILE, []
    while len(rows) < 1:
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.02)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    content = json.loads(file.read_text())
    assert not content["complete"]
    assert content["rows"][:1] == rows[:1] and all(rows[0]["exact"].values())


def test_what_a_row_raises_is_its_result(tmp_path):
    def broken():
        raise RuntimeError("out of memory\nand more")

    def absent():
        raise accelerator.Skipped("not here")

    found = {
        "good": lambda: accelerator.Outcome({"so": True}, {"ms": 1.25}),
        "wrong": lambda: accelerator.Outcome({"so": False}, {}),
        "broken": broken,
        "absent": absent,
    }
    content = {"rows": [], "complete": False}
    accelerator.run(found, tmp_path / "a.json", content, time.monotonic() + 60, lambda name: None)
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["complete"] and len(saved["rows"]) == 4
    assert accelerator.failures(saved) == ["broken: RuntimeError: out of memory", "wrong: so"]
    accelerator.run(
        found, tmp_path / "a.json", {"rows": []}, time.monotonic() - 1, lambda name: None
    )
    late = json.loads((tmp_path / "a.json").read_text())
    assert {row["skipped"] for row in late["rows"]} == {"no time was left"}


def test_some_rows_again_keep_the_others(tmp_path):
    file, here = tmp_path / "a.json", {"devices": ["gpu: a"]}
    rows = [{"row": "masks"}, {"row": "training"}]
    assert accelerator.earlier(file, here, ["masks"]) == []
    harness.write_json(file, {"environment": here, "rows": rows})
    assert accelerator.earlier(file, here, ["masks"]) == rows[1:]
    assert accelerator.earlier(file, {"devices": ["gpu: b"]}, ["masks"]) == []


def test_the_model_of_the_full_run_fits_a_small_gpu():
    model, tokens = smollm.Llama(accelerator.FULL.llama), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert 1e8 < sum(x.size for x in jax.tree.leaves(params)) < 2e8


def test_same_means_bit_for_bit():
    x = {"a": jnp.array([1.0, jnp.nan])}
    assert accelerator.same(x, {"a": np.array([1, np.nan], np.float32)})
    assert not accelerator.same(x, {"a": jnp.array([1.0 + 2.0**-23, jnp.nan])})
    assert not accelerator.same({"a": jnp.zeros(1)}, {"a": -jnp.zeros(1)})


@pytest.mark.parametrize("exists", [True, False])
def test_documentation_shows_what_exists(tmp_path, exists):
    rows = [
        {"row": "masks", "exact": {"kept": True}, "figures": {"prunax ms": 1.5}, "seconds": 2.0},
        {"row": "tests", "skipped": "no pytest", "seconds": 0.0},
    ]
    content = {
        "accelerator": True,
        "environment": {"devices": ["gpu: NVIDIA Z9"], "packages": {"jax": "0.12"}},
        "rows": rows,
    }
    if exists:
        (tmp_path / "accelerator-nvidia-z9.json").write_text(json.dumps(content))
    rehearsal = content | {"accelerator": False}
    (tmp_path / FILE).write_text(json.dumps(rehearsal))
    page = tmp_path / "page.md"
    page.write_text("<!-- table: accelerator -->\n<!-- end table -->\n")
    render.main(["--results", str(tmp_path), str(page)])
    text = page.read_text()
    assert ("No figure from an accelerator exists yet." in text) != exists
    assert ("| masks | yes (1) | prunax ms 1.5 | 2.0 |" in text) == exists
    assert ("**gpu: NVIDIA Z9, JAX 0.12**" in text) == exists
