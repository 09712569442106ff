"""flaxmodels: ResNets, VGGs, GPT-2 and StyleGAN2 in Linen, untrained."""

import types
from typing import Any

from benchmarks import zoo


def _image(name: str, **options: Any) -> zoo.Network:
    import flaxmodels

    options |= dict(output="logits", pretrained=None, normalize=False)
    module = getattr(flaxmodels, name)(**options)
    return zoo.linen_network(module, zoo.normal(2, 32, 32, 3), train=False)


def _gpt2() -> zoo.Network:
    import flaxmodels

    config = types.SimpleNamespace(
        vocab_size=50,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        layer_norm_epsilon=1e-5,
        activation_function="gelu_new",
        scale_attn_weights=True,
        use_cache=False,
    )
    zoo.take_old_arguments("reshape", newshape="shape")
    module = flaxmodels.gpt2.GPT2Model(config)
    return zoo.linen_network(module, zoo.tokens(), training=False)


def _stylegan2(part: str, **options: Any) -> zoo.Network:
    import flaxmodels

    zoo.take_old_arguments("reshape", newshape="shape")
    module = getattr(flaxmodels.stylegan2, part)(**options)
    inputs = zoo.normal(2, 16, 16, 3) if part == "Discriminator" else zoo.normal(2, 16)
    return zoo.linen_network(module, inputs, **CALLS[part])


RESNETS = "ResNet18 ResNet34 ResNet50 ResNet101".split()
STYLEGAN2 = dict(fmap_base=256, fmap_max=32, resolution=16)
CALLS: dict[str, dict[str, Any]] = {
    "Discriminator": {},
    "MappingNetwork": dict(train=False),
    "Generator": dict(train=False, noise_mode="const"),
}
NETWORKS = (
    {"GPT2": _gpt2}
    | zoo.table(
        _image,
        {name: dict(name=name, num_classes=10) for name in RESNETS}
        | {name: dict(name=name, include_head=False) for name in ("VGG16", "VGG19")},
    )
    | zoo.table(
        _stylegan2,
        {
            "StyleGAN2-discriminator": dict(part="Discriminator", **STYLEGAN2),
            "StyleGAN2-mapping": dict(
                part="MappingNetwork", z_dim=16, w_dim=16, layer_features=32, num_layers=3
            ),
            "StyleGAN2-generator": dict(
                part="Generator",
                z_dim=16,
                w_dim=16,
                mapping_layer_features=32,
                num_ws=6,
                num_mapping_layers=2,
                **STYLEGAN2,
            ),
        },
    )
)
