"""DeepMind's gemma, in Linen. In an environment of its own, since it brings TensorFlow: ``pip install gemma``."""

from typing import Any

from benchmarks import zoo

SIZES: dict[str, Any] = dict(
    num_embed=50,
    embed_dim=32,
    hidden_dim=48,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    sliding_window_size=4,
)


def _model(name: str) -> zoo.Network:
    import dataclasses

    import jax.numpy as jnp
    from gemma import gm

    kind = getattr(gm.nn, name)
    config = dataclasses.replace(
        kind.config, attention_types=kind.config.attention_types[-2:], vision_encoder=None, **SIZES
    )

    class Logits(kind):
        def __call__(self, tokens: Any) -> Any:
            return super().__call__(tokens).logits

    return zoo.linen_network(Logits(config=config, dtype=jnp.float32), zoo.tokens())


NETWORKS = zoo.table(_model, {name: (name,) for name in ("Gemma2_2B", "Gemma3_270M", "Gemma3_1B")})
