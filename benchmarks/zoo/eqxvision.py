"""eqxvision's classifiers, which are torchvision's in Equinox.

It was written for Equinox 0.9 and is not kept up: batch normalisation held its own statistics then, which a module here
does in its stead. It asks for torch, but only to load weights: ``pip install --no-deps eqxvision``.
"""

import functools
import sys
import types
from typing import Any

from benchmarks import zoo

# The size of the image, and options.
CONFIGS: dict[str, tuple[Any, ...]] = {
    "alexnet": (224,),
    "densenet121": (32,),
    "efficientnet_b0": (32,),
    "efficientnet_b1": (32,),
    "efficientnet_v2_s": (32,),
    "googlenet": (32,),
    "mobilenet_v2": (32, dict(width_mult=0.5)),
    "mobilenet_v3_small": (32,),
    "mobilenet_v3_large": (32,),
    "regnet_x_400mf": (32,),
    "regnet_y_400mf": (32,),
    "resnet18": (32,),
    "resnet34": (32,),
    "resnet50": (32,),
    "resnet101": (32,),
    "resnext50_32x4d": (32,),
    "wide_resnet50_2": (32,),
    "shufflenet_v2_x0_5": (32,),
    "shufflenet_v2_x1_0": (32,),
    "squeezenet1_0": (32,),
    "squeezenet1_1": (32,),
    "swin_t": (224,),
    "swin_v2_t": (256,),
    "vgg11": (224,),
    "vgg11_bn": (224,),
    "vit_tiny": (
        None,
        dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=10),
    ),
    "convnext_tiny": (32,),
}


def _classifier(name: str, size: int | None, options: Any = None) -> zoo.Network:
    import equinox as eqx
    import jax

    _keep_statistics_in_the_module()
    import eqxvision.models

    make = getattr(eqxvision.models, name)
    options = dict(num_classes=10) | (options or {})

    def call(module: Any, x: Any) -> Any:
        return jax.vmap(lambda x: module(x, key=jax.random.key(0)), axis_name="batch")(x)

    image = zoo.normal(2, 3, size or 32, size or 32)
    make = functools.partial(make, **options)
    if not name.startswith(("regnet", "vit")):  # these compute widths with JAX
        make = eqx.filter_jit(make)
    module = make()
    return zoo.equinox_network(eqx.nn.inference_mode(module), image, call=call)


def _keep_statistics_in_the_module() -> None:
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    if "equinox.experimental" in sys.modules:
        return

    class BatchNorm(eqx.Module):
        weight: jax.Array
        bias: jax.Array
        mean: jax.Array
        var: jax.Array
        eps: float = eqx.field(static=True)

        def __init__(self, input_size: int, axis_name: str, eps: float = 1e-5, **_: Any) -> None:
            self.weight, self.bias = jnp.ones(input_size), jnp.zeros(input_size)
            self.mean, self.var = jnp.zeros(input_size), jnp.ones(input_size)
            self.eps = eps

        def __call__(self, x: jax.Array, *, key: Any = None) -> jax.Array:
            scale = self.weight * jax.lax.rsqrt(self.var + self.eps)
            return (x - self.mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]

    experimental: Any = types.ModuleType("equinox.experimental")
    experimental.BatchNorm = BatchNorm
    sys.modules["equinox.experimental"] = eqx.experimental = experimental


NETWORKS = zoo.table(_classifier, {name: (name, *config) for name, config in CONFIGS.items()})
