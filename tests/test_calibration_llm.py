"""The language model of the benchmark, small, against a forward pass in NumPy straight from the file's tensors."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import calibrating, llm, smollm
from prunax import calibration, patterns

CONFIG = smollm.Config(
    layers=3, width=24, hidden=40, heads=6, kv_heads=2, head_width=4, vocabulary=50, rope_base=100.0
)


def tensors(seed=0):
    """Tensors as a GGUF file has them: (out, in), rotary pairs side by side."""
    rng, c = np.random.default_rng(seed), CONFIG
    shapes = {"token_embd.weight": (c.vocabulary, c.width), "output_norm.weight": (c.width,)}
    for i in range(c.layers):
        kv = c.kv_heads * c.head_width
        own = {
            "attn_norm": (c.width,),
            "ffn_norm": (c.width,),
            "attn_q": (c.width, c.width),
            "attn_k": (kv, c.width),
            "attn_v": (kv, c.width),
            "attn_output": (c.width, c.width),
            "ffn_gate": (c.hidden, c.width),
            "ffn_up": (c.hidden, c.width),
            "ffn_down": (c.width, c.hidden),
        }
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in own.items()}
    return {name: rng.normal(size=shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def forward(t, tokens, c=CONFIG):
    """One sequence, position by position, head by head."""
    half = c.head_width // 2

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.epsilon) * t[name]

    def rotated(x, position):
        pairs = x.reshape(half, 2)
        angle = position * c.rope_base ** (-np.arange(half) / half)
        turned = (pairs[:, 0] + 1j * pairs[:, 1]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], -1).reshape(-1)

    x = t["token_embd.weight"][tokens]
    for i in range(c.layers):
        b = f"blk.{i}."
        h = norm(x, b + "attn_norm.weight")
        q, k, v = (h @ t[f"{b}attn_{n}.weight"].T for n in "qkv")
        mixed = np.zeros_like(x)
        for head in range(c.heads):
            own = slice(head * c.head_width, (head + 1) * c.head_width)
            kv = head // (c.heads // c.kv_heads)
            shared = slice(kv * c.head_width, (kv + 1) * c.head_width)
            for a in range(len(tokens)):
                query = rotated(q[a, own], a)
                logits = [query @ rotated(k[p, shared], p) for p in range(a + 1)]
                weights = np.exp(np.array(logits) / np.sqrt(c.head_width))
                mixed[a, own] = weights / weights.sum() @ v[: a + 1, shared]
        x = x + mixed @ t[b + "attn_output.weight"].T
        h = norm(x, b + "ffn_norm.weight")
        gate, up = (h @ t[f"{b}ffn_{n}.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ t[b + "ffn_down.weight"].T
    return norm(x, "output_norm.weight") @ t["token_embd.weight"].T


@pytest.fixture(scope="module")
def model():
    params = smollm._params(tensors(), CONFIG)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return lambda p, x: smollm.Llama(CONFIG).apply({"params": p}, x), params


def test_the_model_is_the_files(model):
    fn, params = model
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocabulary, (2, 7))
    for row, logits in zip(tokens, fn(params, jnp.asarray(tokens)), strict=True):
        np.testing.assert_allclose(logits, forward(tensors(), row), rtol=2e-3, atol=2e-3)


def test_every_kernel_is_pruned_and_the_embedding_is_not(model):
    fn, params = model
    batches = [jnp.asarray(np.random.default_rng(i).integers(0, 50, (4, 16))) for i in range(2)]
    pruned = calibration.sparsegpt(fn, params, batches, pattern=patterns.NM(2, 4))
    masks = [m for m in jax.tree.leaves(pruned.masks) if m.ndim]
    assert len(masks) == 7 * CONFIG.layers
    assert {float(m.mean()) for m in masks} == {0.5}
    assert pruned.masks["embed"]["embedding"].ndim == 0
    # Groups of the output projection run over the width of a head, those of the others over the residual stream.
    attention = pruned.masks["attention_0"]
    assert np.all(attention["out"]["kernel"].reshape(6, 1, 4, 24).sum(2) == 2)
    assert np.all(attention["query"]["kernel"].reshape(6, 4, 6, 4).sum(1) == 2)


def test_targets():
    assert llm.Target.parse("0.5") == ("50%", 0.5, None)
    assert llm.Target.parse("2:4").options(None) == {"sparsity": None, "pattern": patterns.NM(2, 4)}


def test_windows():
    rows = smollm.windows(np.arange(11), 4)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert [len(b) for b in smollm.batches(np.zeros((5, 4)), 2)] == [2, 2, 1]


@pytest.mark.skipif("SMOLLM2_GGUF" not in os.environ, reason="SMOLLM2_GGUF names no model file")
def test_perplexity_of_the_real_model():
    """The weights as the file has them, through NumPy in float64, against the model of the benchmark."""
    import gguf

    path, config = Path(os.environ["SMOLLM2_GGUF"]), smollm.Config()
    params, tokenizer = smollm.load(path)
    tokens = tokenizer.encode(llm.documentation()[1]).ids
    rows = smollm.windows(np.array(tokens[:3000]), 48)[::20]
    own = {
        t.name: np.asarray(gguf.quants.dequantize(t.data, t.tensor_type), np.float64)
        for t in gguf.GGUFReader(path).tensors
    }
    losses = []
    for row in rows:
        logits = forward(own, row, config)[:-1]
        total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        losses.append(total - logits[np.arange(len(logits)), row[1:]])
    expected = np.exp(np.mean(losses))
    assert smollm.perplexity(params, rows) == pytest.approx(expected, rel=1e-3)


def test_figures_are_kept_from_run_to_run(tmp_path):
    settings = {
        "calibration": {"texts": {"a": 2, "b": 1}, "length": 8, "batch": 1},
        "evaluation": {"a": [1, 8]},
        "malloc": {"MALLOC_ARENA_MAX": "1"},
    }
    results = [
        llm.Result(method, "50%", 0.5, {"a": value}, 1.0, 2**20, (1.0, 2.0))
        for method, value in (("SparseGPT", 20.0), ("Wanda", 30.0))
    ]
    llm.write(tmp_path, settings, {"a": 10.0}, results)
    dense, again = llm.earlier(tmp_path / "llm.json", settings)
    assert dense == {"a": 10.0}
    assert [r.method for r in again] == ["Wanda", "SparseGPT"]  # in the order of the methods
    assert again[1].perplexity == {"a": 20.0}
    assert llm.earlier(tmp_path / "llm.json", settings | {"evaluation": {}}) == ({}, [])
    text = (tmp_path / "llm.md").read_text()
    assert "calibrated on 16 tokens of a, 8 tokens of b" in text
    assert "the model loaded (MALLOC_ARENA_MAX=1)" in text
    assert "| Wanda | 30.00 |" in text and "1 s, 1 MiB (1 and 2)" in text
    assert (tmp_path / "llm.png").stat().st_size > 0


def test_methods_beside_the_models_own_pass():
    def called(what, *seconds):
        return [
            {"what": what, "seconds": s, "compiling": 0.5, "gflops": [100.0, 50.0]} for s in seconds
        ]

    records = [*called(calibrating.PASS, 9, 4), *called("SparseGPT, 50%", 20, 12)]
    content = {"tokens": 1000, "added": {"solving": 2.0}}
    content["records"] = records + called(calibrating.PASS, 4, 7)
    made = calibrating.tables(content)
    own, sparse = made["calibrating"].rows
    # 106,168,320 weights in layers, and their inputs' second moments by halves.
    least = 1e-11 * 2 * 106_168_320 * 1000
    moments = 1e-11 * 30 * 1000 * (3 * 576**2 + 1536**2)
    assert own[2:5] == ("5.0", f"{5 / least:.2f}", "1.00")
    assert sparse[2:] == ("12.0", f"{12 / (least + moments):.2f}", "2.40", "20.0", "0.5")
    assert made["calibrating/added"].rows == [("solving", "2.0")]
