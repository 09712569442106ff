"""The language models of google-tunix, in NNX. In an environment of their own: ``pip install google-tunix``."""

import importlib
from typing import Any

from benchmarks import zoo

QWEN: dict[str, Any] = dict(
    num_layers=2,
    vocab_size=50,
    embed_dim=32,
    hidden_dim=48,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-6,
)
GEMMA: dict[str, Any] = dict(
    num_layers=2,
    num_embed=50,
    embed_dim=32,
    hidden_dim=48,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    sliding_window_size=4,
)
# The module, the class, and its sizes.
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama3": ("llama3", "Llama3", QWEN),
    "Llama3-tied": ("llama3", "Llama3", QWEN | dict(weight_tying=True)),
    "Qwen2": ("qwen2", "Qwen2", QWEN),
    "Qwen3": ("qwen3", "Qwen3", QWEN),
    "Qwen3-mixture": ("qwen3", "Qwen3", QWEN | dict(num_experts=4, num_experts_per_tok=2)),
    "Gemma3": ("gemma3", "Gemma3", GEMMA),
}


def _model(module: str, name: str, sizes: dict[str, Any]) -> zoo.Network:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    models = importlib.import_module(f"tunix.models.{module}.model")
    if module == "gemma3":
        sizes = sizes | dict(param_dtype=jnp.float32)
    model = nnx.eval_shape(
        lambda: getattr(models, name)(models.ModelConfig(**sizes), rngs=nnx.Rngs(0))
    )
    graph, state, others = nnx.split(model, nnx.Param, ...)
    others = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), others)
    tokens = zoo.tokens()
    positions = jnp.broadcast_to(jnp.arange(8), tokens.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((8, 8), bool)), (2, 8, 8))

    def fn(state: Any, tokens: Any) -> Any:
        return nnx.merge(graph, state, others)(tokens, positions, None, mask)[0]

    return zoo.Network(fn, zoo.random(state), (tokens,))


NETWORKS = zoo.table(_model, CONFIGS)
