"""Haiku: the networks of `hk.nets`, and recurrent ones made of its cores."""

import functools
from typing import Any

from benchmarks import zoo

# Blocks of each group, whether they are bottlenecks, and whether they are of the second version.
RESNETS = {
    "ResNet18": ((2, 2, 2, 2), False, False),
    "ResNet34": ((3, 4, 6, 3), False, False),
    "ResNet50": ((3, 4, 6, 3), True, False),
    "ResNet50V2": ((3, 4, 6, 3), True, True),
    "ResNet101": ((3, 4, 23, 3), True, False),
    "ResNet152": ((3, 8, 36, 3), True, False),
    "ResNet152V2": ((3, 8, 36, 3), True, True),
}


def _image(name: str, **config: Any) -> zoo.Network:
    import haiku as hk

    def call(x: Any, training: bool = False) -> Any:
        return getattr(hk.nets, name)(**config)(x, is_training=training)

    return _transformed(call, zoo.normal(1, 32, 32, 3), training=True)


def _resnet(blocks: tuple[int, ...], bottleneck: bool, resnet_v2: bool) -> zoo.Network:
    widths = (32, 64, 128, 256)
    return _image(
        "ResNet",
        blocks_per_group=blocks,
        num_classes=10,
        bottleneck=bottleneck,
        resnet_v2=resnet_v2,
        channels_per_group=widths,
        use_projection=(True,) * 4,
    )


def _mlp() -> zoo.Network:
    import haiku as hk

    return _transformed(lambda x: hk.nets.MLP([32, 32, 10])(x), zoo.normal(4, 16))


def _recurrent(core: str) -> zoo.Network:
    import haiku as hk

    def call(x: Any) -> Any:
        x = hk.Embed(50, 16)(x)
        layer = getattr(hk, core)(24)
        hidden, _ = hk.dynamic_unroll(layer, x, layer.initial_state(len(x)), time_major=False)
        return hk.Linear(50)(hidden)

    return _transformed(call, zoo.tokens())


def _attention() -> zoo.Network:
    import haiku as hk

    def call(x: Any) -> Any:
        init = hk.initializers.VarianceScaling(1.0)
        x = hk.Embed(50, 32)(x)
        for _ in range(2):
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.MultiHeadAttention(4, 8, w_init=init, model_size=32)(h, h, h)
            x = x + hk.nets.MLP([64, 32])(hk.LayerNorm(-1, True, True)(x))
        return hk.Linear(50)(hk.LayerNorm(-1, True, True)(x))

    return _transformed(call, zoo.tokens())


def _autoencoder() -> zoo.Network:
    import haiku as hk

    def call(x: Any) -> Any:
        import jax

        for channels in (16, 32):
            x = jax.nn.relu(hk.Conv2D(channels, 4, stride=2)(x))
        x = hk.nets.VectorQuantizer(32, 24, 0.25)(x, is_training=False)["quantize"]
        return hk.Conv2DTranspose(3, 4, 2)(jax.nn.relu(hk.Conv2DTranspose(16, 4, 2)(x)))

    return _transformed(call, zoo.normal(2, 16, 16, 3))


def _transformed(call: Any, *args: Any, **init: Any) -> zoo.Network:
    import haiku as hk
    import jax

    model = hk.without_apply_rng(hk.transform_with_state(call))

    def fn(variables: Any, *args: Any) -> Any:
        return model.apply(*variables, *args)[0]

    variables = jax.eval_shape(functools.partial(model.init, **init), jax.random.key(0), *args)
    return zoo.Network(fn, zoo.random(variables), args)


NETWORKS = {
    "MLP": _mlp,
    "LSTM": lambda: _recurrent("LSTM"),
    "GRU": lambda: _recurrent("GRU"),
    "VanillaRNN": lambda: _recurrent("VanillaRNN"),
    "Transformer": _attention,
    "VectorQuantizer": _autoencoder,
    "MobileNetV1": lambda: _image("MobileNetV1", num_classes=10),
} | zoo.table(_resnet, RESNETS)
