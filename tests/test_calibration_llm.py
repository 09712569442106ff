"""The language model of the benchmark, small, against a forward pass in NumPy straight from the file's tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import llm, smollm
from prunax import calibration, patterns

CONFIG = smollm.Config(
    layers=3, width=24, hidden=40, heads=6, kv_heads=2, vocabulary=50, rope_base=100.0
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


def forward(t, tokens):
    """One sequence, position by position, head by head."""
    c = CONFIG
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
