"""Equinox: `eqx.nn`'s own networks, and small ones made of its layers."""

from collections.abc import Callable
from typing import Any

import jax

from benchmarks import zoo


def _mlp(key: Any) -> Any:
    import equinox as eqx

    return eqx.nn.MLP(16, 10, width_size=32, depth=3, key=key), zoo.normal(4, 16)


def _cnn(key: Any) -> Any:
    import equinox as eqx

    keys = jax.random.split(key, 4)
    relu = eqx.nn.Lambda(jax.nn.relu)
    layers = [
        eqx.nn.Conv2d(3, 16, 3, padding=1, key=keys[0]),
        eqx.nn.GroupNorm(4, 16),
        relu,
        eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Conv2d(16, 32, 3, padding=1, key=keys[1]),
        relu,
        eqx.nn.AdaptiveAvgPool2d(2),
        eqx.nn.Lambda(lambda x: x.reshape(-1)),
        eqx.nn.Linear(128, 24, key=keys[2]),
        eqx.nn.LayerNorm(24),
        eqx.nn.Linear(24, 10, key=keys[3]),
    ]
    return eqx.nn.Sequential(layers), zoo.normal(2, 3, 16, 16)


def _autoencoder(key: Any) -> Any:
    import equinox as eqx

    keys = jax.random.split(key, 4)
    relu = eqx.nn.Lambda(jax.nn.relu)
    layers = [
        eqx.nn.Conv2d(3, 16, 4, 2, 1, key=keys[0]),
        relu,
        eqx.nn.Conv2d(16, 32, 4, 2, 1, key=keys[1]),
        relu,
        eqx.nn.ConvTranspose2d(32, 16, 4, 2, padding=1, key=keys[2]),
        relu,
        eqx.nn.ConvTranspose2d(16, 3, 4, 2, padding=1, key=keys[3]),
    ]
    return eqx.nn.Sequential(layers), zoo.normal(2, 3, 16, 16)


def _recurrent(cell_name: str) -> Callable[[Any], Any]:
    def make(key: Any) -> Any:
        import equinox as eqx
        import jax.numpy as jnp

        class Net(eqx.Module):
            embedding: Any
            cell: Any
            head: Any

            def __init__(self, key: Any) -> None:
                keys = jax.random.split(key, 3)
                self.embedding = eqx.nn.Embedding(50, 16, key=keys[0])
                self.cell = getattr(eqx.nn, cell_name)(16, 24, key=keys[1])
                self.head = eqx.nn.Linear(24, 50, key=keys[2])

            def __call__(self, tokens: Any) -> Any:
                zeros = jnp.zeros(24)
                state = (zeros, zeros) if cell_name == "LSTMCell" else zeros

                def step(state: Any, x: Any) -> Any:
                    state = self.cell(x, state)
                    return state, state[0] if cell_name == "LSTMCell" else state

                _, out = jax.lax.scan(step, state, jax.vmap(self.embedding)(tokens))
                return jax.vmap(self.head)(out)

        return Net(key), zoo.tokens()

    return make


def _transformer(stacked: bool, rotary: bool = False) -> Callable[[Any], Any]:
    def make(key: Any) -> Any:
        import equinox as eqx
        import jax.numpy as jnp

        class Block(eqx.Module):
            attention: Any
            norms: Any
            mlp: Any
            rope: Any

            def __init__(self, key: Any) -> None:
                keys = jax.random.split(key, 2)
                self.attention = eqx.nn.MultiheadAttention(4, 32, key=keys[0])
                self.norms = [eqx.nn.RMSNorm(32), eqx.nn.LayerNorm(32)]
                self.mlp = eqx.nn.MLP(32, 32, 64, 1, jax.nn.gelu, key=keys[1])
                self.rope = eqx.nn.RotaryPositionalEmbedding(8)

            def rotate(self, q: Any, k: Any, v: Any) -> Any:
                turn = jax.vmap(self.rope, in_axes=1, out_axes=1)
                return turn(q), turn(k), v

            def __call__(self, x: Any) -> Any:
                h = jax.vmap(self.norms[0])(x)
                mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
                turn = {"process_heads": self.rotate} if rotary else {}
                x = x + self.attention(h, h, h, mask=mask, **turn)
                return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))

        class Net(eqx.Module):
            embedding: Any
            positions: jax.Array
            blocks: Any
            head: Any

            def __init__(self, key: Any) -> None:
                keys = jax.random.split(key, 4)
                self.embedding = eqx.nn.Embedding(50, 32, key=keys[0])
                self.positions = jax.random.normal(keys[1], (8, 32))
                each = jax.random.split(keys[2], 2)
                self.blocks = eqx.filter_vmap(Block)(each) if stacked else [Block(k) for k in each]
                self.head = eqx.nn.Linear(32, 50, key=keys[3])

            def __call__(self, tokens: Any) -> Any:
                x = jax.vmap(self.embedding)(tokens) + self.positions
                if stacked:
                    arrays, static = eqx.partition(self.blocks, eqx.is_array)

                    def step(x: Any, block: Any) -> Any:
                        return eqx.combine(block, static)(x), None

                    x, _ = jax.lax.scan(step, x, arrays)
                else:
                    for block in self.blocks:
                        x = block(x)
                return jax.vmap(self.head)(x)

        return Net(key), zoo.tokens()

    return make


def _neural_ode(key: Any) -> Any:
    import equinox as eqx

    class Field(eqx.Module):
        mlp: Any

        def __call__(self, x: Any) -> Any:
            def step(x: Any, _: Any) -> Any:
                middle = x + 0.05 * self.mlp(x)
                return x + 0.1 * self.mlp(middle), None

            return jax.lax.scan(step, x, None, length=10)[0]

    mlp = eqx.nn.MLP(4, 4, 32, 2, jax.nn.softplus, key=key)
    return Field(mlp), zoo.normal(4, 4)


def _network(make: Callable[[Any], Any]) -> zoo.Network:
    module, *args = make(jax.random.key(0))
    return zoo.equinox_network(module, *args)


NETWORKS = zoo.table(
    _network,
    {
        "MLP": (_mlp,),
        "CNN": (_cnn,),
        "autoencoder": (_autoencoder,),
        "GRU": (_recurrent("GRUCell"),),
        "LSTM": (_recurrent("LSTMCell"),),
        "transformer": (_transformer(stacked=False),),
        "transformer-rotary": (_transformer(stacked=False, rotary=True),),
        "transformer-stacked": (_transformer(stacked=True),),
        "neural-ode": (_neural_ode,),
    },
)
