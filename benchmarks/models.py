"""Small Flax Linen image classifiers.

A model is a function of images `(n, height, width, channels)` to logits `(n, classes)`, for images of any size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def convolve(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` for NHWC images, HWIO kernels, no dilation and no groups.

    On the CPU it is one matrix product over the patches. XLA compiles the gradient of a convolution
    inside `lax.scan` to plain loops there, 5 times slower than outside of it; a product stays fast.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **options)
    height, width, inputs, outputs = kernel.shape
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(images.shape[1:3], (height, width), strides, padding)
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    down = images.shape[1] - height + 1
    right = images.shape[2] - width + 1
    patches = [
        images[:, i : i + down : strides[0], j : j + right : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    flat = kernel.reshape(height * width * inputs, outputs)
    return jnp.concatenate(patches, axis=-1) @ flat


Conv = functools.partial(nn.Conv, conv_general_dilated=convolve)


class MLP(nn.Module):
    """LeNet-300-100: two hidden layers (LeCun et al., 1998)."""

    num_classes: int
    widths: tuple[int, ...] = (300, 100)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(images.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


class CNN(nn.Module):
    """Two convolutions with average pooling and two dense layers, after LeNet-5, with ReLU."""

    num_classes: int
    channels: tuple[int, ...] = (16, 32)
    width: int = 128

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for channels in self.channels:
            x = nn.relu(Conv(channels, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.width)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(x)


class LeNet5(nn.Module):
    """Two 5x5 convolutions of stride 2 and three dense layers, after LeNet-5 (LeCun et al., 1998).

    Strides stand in for pooling (Simard et al., 2003), and convolutions are written as products of patches: within
    `lax.scan` XLA's own run on one CPU thread, which takes many times as long.
    """

    num_classes: int
    channels: tuple[int, ...] = (6, 16)
    widths: tuple[int, ...] = (120, 84)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = jnp.moveaxis(images, (3, 0), (0, 3))  # the batch last: patches are copies of long rows
        for channels in self.channels:
            x = nn.relu(PatchConv(channels)(x))
        x = x.reshape(-1, x.shape[-1]).T
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


class PatchConv(nn.Module):
    """A 5x5 convolution of stride 2 of `(channels, height, width, n)`, as one matrix product.

    The kernel has Flax's shape, `(5, 5, in, out)`.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, stride = 5, 2
        channels, *_, count = x.shape
        kernel_shape = (size, size, channels, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), kernel_shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        height, width = ((n - 1) // stride + 1 for n in x.shape[1:3])
        x = jnp.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
        patches = [
            x[:, i : i + stride * height : stride, j : j + stride * width : stride]
            for i in range(size)
            for j in range(size)
        ]
        rows = jnp.concatenate(patches).reshape(size * size * channels, -1)
        y = kernel.reshape(-1, self.features).T @ rows + bias[:, None]
        return y.reshape(self.features, height, width, count)


class BatchNormResNet(nn.Module):
    """Basic residual blocks with batch normalisation, at half and a quarter of the image's side."""

    num_classes: int
    channels: int = 64
    conv: Callable[..., nn.Module] = nn.Conv
    momentum: float = 0.9

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        conv = functools.partial(self.conv, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=self.momentum
        )
        x = nn.relu(norm()(conv(self.channels, (3, 3), 2)(images)))
        for channels, stride in ((self.channels, 1), (2 * self.channels, 2)):
            y = nn.relu(norm()(conv(channels, (3, 3), stride)(x)))
            y = norm()(conv(channels, (3, 3))(y))
            skip = x if stride == 1 else norm()(conv(channels, (1, 1), stride)(x))
            x = nn.relu(skip + y)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class ViT(nn.Module):
    """A small vision transformer: four by four patches, learned positions, mean over the patches."""

    num_classes: int
    width: int = 192
    heads: int = 4
    depth: int = 2

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        patch = images.shape[1] // 4
        x = nn.Conv(self.width, (patch, patch), patch, padding="VALID")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x).mean(1))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": MLP,
    "lenet5": LeNet5,
    "cnn": CNN,
    "resnet": functools.partial(BatchNormResNet, channels=16, conv=Conv),
}


def init(model: nn.Module, key: jax.Array, images: jax.Array) -> Any:
    """Fresh parameters.

    Args:
        model: one of `MODELS`, made for a number of classes.
        key: a JAX random key.
        images: any batch of the right shape.

    Returns:
        The `params` collection: what `apply` takes and what is pruned.
    """
    return model.init(key, images[:1])["params"]


def apply(model: nn.Module, params: Any, images: jax.Array) -> jax.Array:
    """Logits `(n, classes)` of images `(n, height, width, channels)` in [0, 1], as in training.

    Batch normalisation takes the statistics of these images.
    """
    if isinstance(model, BatchNormResNet):
        return _with_statistics(model, params, images)[0]
    return model.apply({"params": params}, images)


def as_used(
    model: nn.Module, params: Any, training_images: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """`apply` of a trained network: batch normalisation takes the statistics of the training images given here."""
    if isinstance(model, BatchNormResNet):
        _, statistics = _with_statistics(model, params, training_images)
        return lambda images: model.apply({"params": params, **statistics}, images)
    return lambda images: apply(model, params, images)


def _with_statistics(model: nn.Module, params: Any, images: jax.Array) -> tuple[jax.Array, Any]:
    """Logits, and the means and variances of these images alone."""
    return model.clone(momentum=0.0).apply(
        {"params": params}, images, train=True, mutable=["batch_stats"]
    )
