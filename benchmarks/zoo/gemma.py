"""DeepMind's gemma, in Linen. In an environment of its own, since it brings TensorFlow: ``pip install gemma``."""

from typing import Any

from benchmarks import zoo
from benchmarks.zoo.tunix import GEMMA


def _model(name: str) -> zoo.Network:
    import dataclasses

    import jax.numpy as jnp
    from gemma import gm

    kind = getattr(gm.nn, name)
    kinds = kind.config.attention_types[-GEMMA["num_layers"] :]
    sizes = {name: size for name, size in GEMMA.items() if name != "num_layers"}
    config = dataclasses.replace(kind.config, attention_types=kinds, vision_encoder=None, **sizes)

    class Logits(kind):
        def __call__(self, tokens: Any) -> Any:
            return super().__call__(tokens).logits

    return zoo.linen_network(Logits(config=config, dtype=jnp.float32), zoo.tokens())


NETWORKS = zoo.table(_model, {name: (name,) for name in ("Gemma2_2B", "Gemma3_270M", "Gemma3_1B")})
