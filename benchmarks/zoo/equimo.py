"""equimo's vision models, in Equinox: families with narrow and shallow configurations."""

import functools
from typing import Any

from benchmarks import zoo

IMAGE = dict(in_channels=3, num_classes=10)
WIDTHS = dict(dims=[32, 64, 96, 128], depths=[1, 1, 1, 1])
VIT = dict(img_size=32, patch_size=8, dim=32, depths=[2], num_heads=4)

# The class, and its sizes.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "AttNet": ("AttNet", WIDTHS | dict(img_size=224)),
    "ConvNeXt": ("ConvNeXt", WIDTHS),
    "LowFormer": (
        "LowFormer",
        dict(
            widths=[8, 16, 32, 32, 64],
            depths=[0, 1, 1, 1, 1],
            att_strides=[1, 1, 1, 1, 1],
            block_types=["conv", "conv", "conv", "attention", "attention"],
            attention_type="softmax",
        ),
    ),
    "Mlla": (
        "Mlla",
        dict(img_size=32, dim=16, patch_size=4, depths=[1, 1], num_heads=[2, 4]),
    ),
    "MobileNetV3": (
        "MobileNetv3",
        dict(
            layers_config=[
                (16, 16, 16, 16, True, "relu"),
                (3, 16, 72, 24, False, "relu"),
                (5, 24, 96, 40, True, "hard_swish"),
            ],
            last_channels=64,
        ),
    ),
    "PartialFormer": (
        "PartialFormer",
        dict(
            img_size=32,
            dim=16,
            patch_size=2,
            num_heads=[2, 4],
            depths=[1, 1],
            foreground_ratios=(0.5, 0.5),
        ),
    ),
    "ReduceFormer": (
        "ReduceFormer",
        dict(
            widths=[8, 16, 32, 32, 64],
            depths=[1, 1, 1, 1, 1],
            block_types=["conv", "conv", "conv", "attention", "attention"],
            head_dim=8,
        ),
    ),
    "ViT": ("VisionTransformer", VIT),
    "ViT-registers": ("VisionTransformer", VIT | dict(reg_tokens=2, init_values=0.1)),
    "ViT-rope": (
        "VisionTransformer",
        VIT | dict(use_global_pos_embed=False, use_local_pos_embed=True),
    ),
    "ViT-swiglu": ("VisionTransformer", VIT | dict(ffn_layer="swiglu", qk_norm=True)),
    "Vssd": (
        "Vssd",
        dict(
            img_size=32,
            dim=16,
            d_state=8,
            depths=[1, 1, 1, 1],
            num_heads=[2, 2, 4, 4],
        ),
    ),
    "IFormer": ("iformer_t", {}),
    "MobileNetV3-small": ("mobilenetv3_small", {}),
    "LowFormer-B0": ("lowformer_backbone_b0", dict(attention_type="softmax")),
}


def _model(name: str, sizes: dict[str, Any]) -> zoo.Network:
    import equimo.models
    import equinox as eqx
    import jax

    def call(module: Any, x: Any) -> Any:
        return jax.vmap(lambda x: module(x, key=jax.random.key(0), inference=True))(x)

    options = IMAGE | sizes
    size = options.get("img_size", 32)
    make = functools.partial(getattr(equimo.models, name), **options)
    module = eqx.filter_jit(make)(key=jax.random.key(0))
    return zoo.equinox_network(module, zoo.normal(2, 3, size, size), call=call)


NETWORKS = zoo.table(_model, CONFIGS)
