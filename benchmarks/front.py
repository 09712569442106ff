"""The figures of the README: one row of each benchmark, from its results file, with the command beside it."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import accelerator, harness, methods
from benchmarks.zoo import __main__ as zoo

Row = tuple[str, str, str, str]


def table(results: Path) -> harness.Table:
    """The table of all results that a folder has."""
    rows: list[Row] = []
    for name, row in ROWS.items():
        file = results / f"{name}.json"
        if file.is_file():
            rows += [(*cells, f"`{name}`") for cells in row(json.loads(file.read_text()))]
    for file in sorted(results.glob(f"{accelerator.STEM}-*.json")):
        rows += [(*c, f"`{accelerator.STEM}`") for c in _accelerator(json.loads(file.read_text()))]
    columns = ("what", "prunax", "beside it", "`python -m benchmarks.`")
    return harness.Table(columns, rows, text=4, title="The front page")


def _selection(content: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    (seconds,) = (
        r["seconds"]
        for r in content["results"]
        if (r["input"], r["size"], r["sparsity"]) == ("normal", 10_000_000, 0.9)
    )
    ms = {name: f"{1e3 * s:,.0f} ms" for name, s in seconds.items()}
    others = "argsort, as JaxPruner", "torch.topk", "numpy.partition"
    keys = "argsort", "torch.topk", "numpy.partition"
    beside = ", ".join(
        f"{name} {ms[key]}" for name, key in zip(others, keys, strict=True) if key in ms
    )
    return [("masks of 10 M weights at 90%", ms["prunax"], beside)]


def _overhead(content: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    ratios = content["results"]["a step without mask update, 4 x 1024 x 1024"]["ratio"]
    what = "a training step under masks, of a dense step"
    return [
        (what, f"{ratios['packed']:.3f} (masks of one bit), {ratios['bool']:.3f} (of one byte)", "")
    ]


def _methods(content: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    found = {
        (r["method"], r["sparsity"]): f"{100 * statistics.mean(r['test_accuracy']):.2f}"
        for r in content["records"]
        if r["network"] == "mlp" and methods.main_allocation(r)
    }
    what = "Fashion-MNIST, LeNet-300-100, nine weights in ten pruned, accuracy %"
    ours = {"gradual": "magnitude", "lottery ticket": "imp"}
    prunax = ", ".join(f"{found.get((m, 0.9), '-')} {name}" for name, m in ours.items())
    beside = f"dense {found['dense', 0.0]}, random masks {found.get(('static', 0.9), '-')}"
    return [(what, prunax, beside)]


def _llm(content: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    found = {
        r["method"]: r["perplexity"]["quotations"]
        for r in content["results"]
        if r["target"] == "50%"
    }
    best = min(found, key=lambda name: found[name])
    others = [f"{n} {found[n]:.1f}" for n in ("Wanda", "magnitude") if n in found]
    dense = f"dense {content['dense']['quotations']:.1f}"
    what = "SmolLM2-135M, half of the weights, no training, perplexity of quotations"
    return [(what, f"{found[best]:.1f} ({best})", ", ".join([dense, *others]))]


def _structured(content: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    rows = {r["target"]: r for r in content["rows"] if r["network"] == "resnet"}
    dense, half = rows[1.0], rows[0.5]
    faster = dense["batched"] / half["batched"]
    share = half["flops"] / dense["flops"]
    what = "ResNet, channels removed, accuracy %"
    prunax = f"{100 * half['accuracy']:.1f} at {share:.0%} of the FLOPs, {faster:.1f} times as fast"
    return [(what, prunax, f"dense {100 * dense['accuracy']:.1f}")]


def _recover(content: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    found = {r["row"]: r["perplexity"]["256 quotations"] for r in content["records"]}
    ours, twin = (found.get(f"75% both{how}") for how in (" refined distilled", " twin"))
    if not ours or not twin:
        return []
    minutes = f"{content['settings']['minutes']:.0f} minutes"
    what = f"SmolLM2-135M, a quarter of its parameters gone, {minutes} of distillation, the same"
    beside = f"dense {found['dense']:.1f} (in these windows), the same shape from random weights {twin:,.0f}"
    return [(what, f"{ours:.1f}", beside)]


def _zoo(content: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    records = content["records"]
    right = sum(map(zoo.is_right, records))
    what = "networks that others wrote, halved, equal to the masked ones"
    return [(what, f"{right} of {len(records)}", "Torch-Pruning publishes 77 of 85 of torchvision")]


def _accelerator(content: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    name = content["environment"]["devices"][0].partition(": ")[2]
    found = {r["row"]: r.get("figures", {}) for r in content["rows"]}
    cells = []
    masks = found.get("masks, 1,000,000,000 float32")
    if masks:
        others = [f"{n} {masks[f'{n} ms']:,.0f} ms" for n in ("argsort", "lax.top_k", "torch.topk")]
        what = f"masks of 1 G weights at 90%, {name}"
        cells.append((what, f"{masks['prunax ms']:.0f} ms", ", ".join(others)))
    step = next((f for row, f in found.items() if row.startswith("training step, MLP")), None)
    if step:
        ratios = (
            f"{step['packed / dense']:.2f} (of one bit), {step['bool / dense']:.2f} (of one byte)"
        )
        cells.append((f"a training step under masks, of a dense step, {name}", ratios, ""))
    return cells


ROWS = {
    "selection": _selection,
    "overhead": _overhead,
    "methods": _methods,
    "llm": _llm,
    "recover": _recover,
    "structured": _structured,
    "zoo": _zoo,
}
