"""Prunes made-up checkpoints of shards from the command line: time and memory, and what faults leave behind.

    python -m benchmarks.checkpoints                    # 90 MB in shards, faults, and 4 GB in shards of 1 GB
    python -m benchmarks.checkpoints --only faults      # one part; the others stay in the results
    python -m benchmarks.checkpoints --judge /elsewhere/bin/python  # Transformers write the shards and load the outputs

Times stand beside a bare copy of the same files, flushed to the disk as the command line's output is. Memory is the
peak of the whole process, and beyond that of one which prunes a single small tensor. Faults: interrupts at random
moments, one in each twentieth of a run, files that may not grow beyond a size, as on a full disk, and indices that lie.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from rich.console import Console

from benchmarks import harness, hostile
from benchmarks.files import MB, prunax
from prunax import export

OPTIONS = {
    "uniform": ["--sparsity", "0.5"],
    "global": ["--sparsity", "0.5", "--allocation", "global"],
    "2:4": ["--pattern", "2:4"],
}
FULL = (
    "import resource, runpy, sys; n = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); "
    "runpy.run_module('prunax', run_name='__main__')"
)
# A model of 90 MB as Transformers write it, in one file and in three shards.
MODEL = """
import sys, torch, transformers
torch.manual_seed(0)
sizes = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8, vocab_size=2000)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
model.save_pretrained(sys.argv[1], max_shard_size="1GB")
model.save_pretrained(sys.argv[2], max_shard_size="32MB")
"""
JUDGE = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
zeros = sum(int((p == 0).sum()) for p in model.state_dict().values())
finite = bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())
versions = {"torch": torch.__version__, "transformers": transformers.__version__}
print(json.dumps({"class": type(model).__name__, "zeros": zeros, "finite": finite} | versions))
"""


def make(path: Path, nbytes: int, shard: int | None, side: int = 2048) -> Path:
    """A checkpoint of square float32 matrices, made one at a time."""
    rng = np.random.default_rng(0)
    number = nbytes // (4 * side * side)
    pairs = ((f"{i}.weight", rng.standard_normal((side, side), np.float32)) for i in range(number))
    if shard is None:
        safetensors.numpy.save_file(dict(pairs), path, {"format": "pt"})
    else:
        export.save_checkpoint(path, pairs, shard_size=shard)
    return path


def copy(source: Path, to: Path) -> float:
    """Seconds of a bare copy, on the disk."""
    start = time.perf_counter()
    shutil.copytree(source, to)
    for file in to.iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(to)
    return seconds


def same_zeros(file: Path, folder: Path) -> bool:
    single = safetensors.numpy.load_file(file)
    shards = [safetensors.numpy.load_file(f) for f in folder.glob("*.safetensors")]
    merged = {name: array for shard in shards for name, array in shard.items()}
    return single.keys() == merged.keys() and all(
        single[n].tobytes() == merged[n].tobytes() for n in single
    )


def judged(judge: Path, folder: Path) -> dict[str, Any]:
    """What `from_pretrained` makes of a folder."""
    command = [judge, "-c", JUDGE, folder]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    stored = sum(int((a == 0).sum()) for a in hostile.load(folder).values())
    return found | {"zeros in the files": stored}


def sharded(folder: Path, judge: Path | None) -> list[dict[str, Any]]:
    """The same model as one file and in three shards."""
    one, three = folder / "one.safetensors", folder / "three"
    if judge is None:
        make(one, 96 * MB, None)
        make(three, 96 * MB, 32 * MB + 1)
    else:
        subprocess.run([judge, "-c", MODEL, folder / "one", three], check=True, capture_output=True)
        one = folder / "one" / "model.safetensors"
    largest = max(a.nbytes for a in safetensors.numpy.load_file(one).values())
    small = make(folder / "small.safetensors", 4 * 64, None, 8)
    baseline = prunax("prune", small, folder / "s.safetensors", "--sparsity", "0.5")[0]
    rows = []
    for name, options in OPTIONS.items():
        out, outs = folder / "out.safetensors", folder / "out"
        peak, seconds, _ = prunax("prune", one, out, "--overwrite", *options)
        peaks, longer, _ = prunax("prune", three, outs, "--overwrite", *options)
        assert len(list(outs.glob("*.safetensors"))) == len(list(three.glob("*.safetensors"))) >= 3
        rows.append(
            {
                "options": name,
                "same_zeros": same_zeros(out, outs),
                "peak_file": peak - baseline,
                "peak_folder": peaks - baseline,
                "tensor": largest,
                "size": sum(f.stat().st_size for f in three.glob("*.safetensors")),
                "from_pretrained": None if judge is None else judged(judge, outs),
                "seconds_file": seconds,
                "seconds_folder": longer,
            }
        )
    return rows


def large(folder: Path, gigabytes: float) -> list[dict[str, Any]]:
    source = make(folder / "large", int(gigabytes * 1024) * MB, 1024 * MB, 4096)
    size = sum(f.stat().st_size for f in source.iterdir())
    rows = [{"what": "copy", "size": size, "seconds": copy(source, folder / "copy"), "peak": 0}]
    for name, options in OPTIONS.items():
        peak, seconds, code = prunax("prune", source, folder / "o", "--overwrite", *options)
        assert code == 0
        rows.append({"what": f"prune, {name}", "size": size, "seconds": seconds, "peak": peak})
    return rows


def faults(folder: Path, moments: int = 20) -> list[dict[str, Any]]:
    """What was printed and what was left, of interrupted runs and of full disks."""
    source = make(folder / "model", 96 * MB, 32 * MB + 1)
    work = folder / "work"
    work.mkdir()
    rng = random.Random(0)
    args = ["prune", source, work / "out", "--sparsity", "0.5", "--allocation", "global"]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "prunax", *args], check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    shutil.rmtree(work / "out")
    rows = []
    for i in range(moments):
        number = (signal.SIGINT, signal.SIGTERM)[i % 2]
        after = whole * (i + rng.random()) / moments
        process = subprocess.Popen(
            [sys.executable, "-m", "prunax", *args],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        time.sleep(after)
        process.send_signal(number)
        said = process.communicate()[1].strip()
        left = os.listdir(work)
        done = left == ["out"]
        rows.append(
            {
                "fault": number.name,
                "at": f"{after:.2f} s",
                "code": process.returncode,
                "printed": said.splitlines()[-1] if said else "",
                "left": "the whole output" if done else ", ".join(left),
            }
        )
        if done:
            shutil.rmtree(work / "out")
    process = subprocess.Popen(
        [sys.executable, "-m", "prunax", *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while not list(work.glob(".out.*")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    left = len(os.listdir(work))
    code = prunax(*args)[2]
    names = ", ".join(os.listdir(work))
    rows.append(
        {
            "fault": f"SIGKILL (left {left}), then again",
            "at": "",
            "code": code,
            "printed": "",
            "left": names,
        }
    )
    shutil.rmtree(work / "out")
    for size in np.linspace(1 * MB, 31 * MB, 10).astype(int):
        command = [sys.executable, "-c", FULL, str(size), *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True)
        rows.append(
            {
                "fault": "files that cannot grow",
                "at": f"{size / MB:.1f} MB",
                "code": result.returncode,
                "printed": result.stderr.strip().replace(f"{folder}/", ""),
                "left": ", ".join(os.listdir(work)),
            }
        )
    for case in hostile.INDICES:
        model = make(folder / "hostile", 12 * 256, 4 * 256, 8)
        hostile.change(model, case)
        command = [
            sys.executable,
            "-m",
            "prunax",
            "prune",
            model,
            work / "out",
            "--sparsity",
            "0.5",
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        rows.append(
            {
                "fault": f"index: {case}",
                "at": "",
                "code": result.returncode,
                "printed": result.stderr.strip().replace(f"{folder}/", ""),
                "left": ", ".join(os.listdir(work)),
            }
        )
        shutil.rmtree(model)
    return rows


PARTS = ("sharded", "faults", "large")


def main() -> None:
    parser = harness.parser("checkpoints", __doc__)
    parser.add_argument("--large", type=float, default=4, help="size of the large one, in GB (4)")
    parser.add_argument("--judge", type=Path, help="a Python that has Transformers and PyTorch")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="other parts stay")
    args = parser.parse_args()
    file = args.out / "checkpoints.json"
    figures: dict[str, Any] = {part: [] for part in PARTS}
    if file.is_file():
        figures |= {part: json.loads(file.read_text())[part] for part in PARTS}
    make = {
        "sharded": lambda folder: sharded(folder, args.judge),
        "faults": faults,
        "large": lambda folder: large(folder, args.large),
    }
    for part in args.only:
        with tempfile.TemporaryDirectory() as folder:
            figures[part] = make[part](Path(folder))
    content = harness.content("python -m benchmarks.checkpoints --judge PYTHON", **figures)
    harness.publish(file, "`prunax prune` on folders of shards", content, tables, Console())


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """The tables of a results file."""

    def mb(number: int) -> str:
        return f"{number / MB:.0f}"

    def verdict(found: Mapping[str, Any] | None) -> str:
        if found is None:
            return "not tried"
        good = found["finite"] and found["zeros"] == found["zeros in the files"]
        return f"{found['class']} {found['transformers']}" if good else "NO"

    rows = [
        [
            r["options"],
            "yes" if r["same_zeros"] else "NO",
            mb(r["peak_file"]),
            mb(r["peak_folder"]),
            f"{r['seconds_file']:.1f}",
            f"{r['seconds_folder']:.1f}",
            verdict(r["from_pretrained"]),
        ]
        for r in content["sharded"]
    ]
    columns = "options,same zeros,file MB,folder MB,file s,folder s,from_pretrained".split(",")
    first = content["sharded"][0]
    title = (
        f"{mb(first['size'])} MB as a file and in shards, the largest tensor {mb(first['tensor'])} MB; "
        f"memory beyond a run on one small tensor"
    )
    made = {"checkpoints": harness.Table(columns, rows, title=title)}
    alike: dict[tuple[str, ...], list[str]] = {}
    for r in content["faults"]:
        outcome = (r["fault"], str(r["code"]), r["printed"], r["left"] or "nothing")
        alike.setdefault(outcome, []).append(r["at"])
    found = [
        (fault, str(len(at)), f"{at[0]} to {at[-1]}" if len(at) > 1 else at[0], *rest)
        for (fault, *rest), at in alike.items()
    ]
    columns = ("fault", "runs", "at", "exit code", "printed", "left")
    made["checkpoints/faults"] = harness.Table(columns, found, title="Faults", text=6)
    if content["large"]:
        rows = [
            [r["what"], f"{r['size'] / 1e9:.2f}", f"{r['seconds']:.1f}", mb(r["peak"])]
            for r in content["large"]
        ]
        title = "A large checkpoint in shards of 1 GB"
        made["checkpoints/large"] = harness.Table(
            ("what", "GB", "seconds", "peak MB"), rows, title=title
        )
    return made


if __name__ == "__main__":
    main()
