"""Products as matrix problems: how a `dot_general` or a convolution is rows of inputs times a matrix ``(in, out)``.

A layout turns the operands of one product into ``(problems, rows, in)`` and ``(problems, in, out)`` and back. Batched
weights (experts, heads with weights of their own) and feature groups of a convolution are problems side by side.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from prunax import _jaxprs

__all__ = ["ConvLayout", "DotLayout", "Layout", "layout_of"]

Shape = tuple[int, ...]


class DotLayout(NamedTuple):
    """The layout of a `dot_general`.

    Attributes:
        input_axes: Axes of the activation, (batch, rows, in), the inputs in the order that they have in the weight.
        weight_axes: Axes of the weight, (batch, in, out).
        batch: How many axes are batch axes.
        contracting: How many axes are contracted.
        weight_shape: Shape of the weight.
    """

    input_axes: Shape
    weight_axes: Shape
    batch: int
    contracting: int
    weight_shape: Shape

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(problems, in, out)``."""
        return _split(self._permuted, self.batch, self.contracting)

    @property
    def group_length(self) -> int:
        """Length of the runs of inputs within which neighbours are neighbours in the weight: its last input axis."""
        return self._permuted[self.batch + self.contracting - 1]

    @property
    def is_batched(self) -> bool:
        """Whether the weight has axes of problems, be they of length 1."""
        return self.batch > 0

    @property
    def reading(self) -> Any:
        """What decides how inputs are read. Products of equal readings of one activation share their inputs."""
        return "dot", self.input_axes, self.batch, self.contracting

    def inputs(self, x: jax.Array) -> jax.Array:
        """The activation as (problems, rows, in)."""
        x = x.transpose(self.input_axes)
        return x.reshape(_split(x.shape, self.batch, x.ndim - self.batch - self.contracting))

    def matrices(self, weight: jax.Array) -> jax.Array:
        """The weight as (problems, in, out)."""
        return weight.transpose(self.weight_axes).reshape(self.shape)

    def weight(self, matrices: jax.Array) -> jax.Array:
        """The weight whose matrices these are."""
        return matrices.reshape(self._permuted).transpose(_inverse(self.weight_axes))

    @property
    def _permuted(self) -> Shape:
        return tuple(self.weight_shape[a] for a in self.weight_axes)


class ConvLayout(NamedTuple):
    """The layout of a `conv_general_dilated`: inputs are the windows that the kernel meets.

    Attributes:
        input_axes: Axes of the activation, (turns of loops, batch, feature, spatial).
        weight_axes: Axes of the kernel, (spatial, in, out).
        weight_shape: Shape of the kernel.
        window_strides: As in `jax.lax.conv_general_dilated`.
        padding: As there.
        lhs_dilation: As there.
        rhs_dilation: As there.
        groups: How many feature groups.
    """

    input_axes: Shape
    weight_axes: Shape
    weight_shape: Shape
    window_strides: Shape
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: Shape
    rhs_dilation: Shape
    groups: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(problems, in, out)``: in is (spatial, in), out the output channels of one group."""
        return self.groups, math.prod(self._permuted[:-1]), self._permuted[-1] // self.groups

    @property
    def group_length(self) -> int:
        """Length of the runs of inputs at one place of the window: the input channels."""
        return self._permuted[-2]

    @property
    def is_batched(self) -> bool:
        """Whether there are feature groups."""
        return self.groups > 1

    @property
    def reading(self) -> Any:
        """What decides how inputs are read: all but the number of outputs."""
        return ("conv", self._permuted[:-1], *self[3:], self.input_axes)

    def inputs(self, x: jax.Array) -> jax.Array:
        """The windows of the activation as (problems, rows, in)."""
        x = x.transpose(self.input_axes)
        x = x.reshape(-1, *x.shape[x.ndim - len(self.weight_shape) + 1 :])
        n, channels = x.shape[:2]
        patches = jax.lax.conv_general_dilated_patches(
            x,
            self._permuted[:-2],
            self.window_strides,
            self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            precision=jax.lax.Precision.HIGHEST,
        )
        window = math.prod(self._permuted[:-2])
        # The patches are (n, channels x window, places); inputs of a group are (window, channels).
        patches = patches.reshape(n, self.groups, channels // self.groups, window, -1)
        return patches.transpose(1, 0, 4, 3, 2).reshape(self.groups, -1, self.shape[1])

    def matrices(self, weight: jax.Array) -> jax.Array:
        """The kernel as (problems, in, out)."""
        problems, length, width = self.shape
        flat = weight.transpose(self.weight_axes).reshape(length, problems, width)
        return flat.swapaxes(0, 1)

    def weight(self, matrices: jax.Array) -> jax.Array:
        """The kernel whose matrices these are."""
        flat = matrices.swapaxes(0, 1).reshape(self._permuted)
        return flat.transpose(_inverse(self.weight_axes))

    @property
    def _permuted(self) -> Shape:
        return tuple(self.weight_shape[a] for a in self.weight_axes)


Layout = DotLayout | ConvLayout


def layout_of(product: _jaxprs.Product, experts: Sequence[int] = ()) -> Layout:
    """Read the layout of a product.

    Args:
        product: A product of a program.
        experts: Axes of the weight that are contracted, and stand for matrices of their own all the same.

    Returns:
        The layout.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.ones((4, 3))}
        >>> program = prunax._jaxprs.trace(lambda p, x: x @ p["kernel"], params, jnp.ones((2, 4)))
        >>> prunax.calibration.layouts.layout_of(program.products[0]).shape
        (1, 4, 3)
    """
    if product.eqn.primitive.name == "dot_general":
        return _dot_layout(product, experts)
    return _conv_layout(product)


def _dot_layout(product: _jaxprs.Product, experts: Sequence[int]) -> DotLayout:
    eqn, side = product.eqn, product.side
    contracting, batch = eqn.params["dimension_numbers"]
    weight, other = (_jaxprs.aval(eqn.invars[n]) for n in (side, 1 - side))
    pairs = sorted(zip(contracting[side], contracting[1 - side], strict=True))
    of_problems = list(zip(batch[side], batch[1 - side], strict=True))
    of_problems += [pair for pair in pairs if pair[0] in experts]
    pairs = [pair for pair in pairs if pair[0] not in experts]
    weight_in, other_in = zip(*pairs, strict=True)
    weight_batch, other_batch = [w for w, _ in of_problems], [x for _, x in of_problems]
    weight_out = [a for a in range(weight.ndim) if a not in (*weight_in, *weight_batch)]
    rows = [a for a in range(other.ndim) if a not in (*other_in, *other_batch)]
    # Turns of loops, in front of all axes, are rows.
    later = product.loops
    return DotLayout(
        (
            *(a + later for a in other_batch),
            *range(later),
            *(a + later for a in (*rows, *other_in)),
        ),
        (*weight_batch, *weight_in, *weight_out),
        len(weight_batch),
        len(weight_in),
        weight.shape,
    )


def _conv_layout(product: _jaxprs.Product) -> ConvLayout:
    params = product.eqn.params
    numbers = params["dimension_numbers"]
    outputs, inputs, *spatial = numbers.rhs_spec
    return ConvLayout(
        (*range(product.loops), *(a + product.loops for a in numbers.lhs_spec)),
        (*spatial, inputs, outputs),
        _jaxprs.aval(product.eqn.invars[1]).shape,
        tuple(params["window_strides"]),
        tuple(map(tuple, params["padding"])),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
        params["feature_group_count"],
    )


def _split(shape: Shape, first: int, second: int) -> tuple[int, int, int]:
    """Flatten a shape to three axes, the first two made of so many each."""
    return (
        math.prod(shape[:first]),
        math.prod(shape[first : first + second]),
        math.prod(shape[first + second :]),
    )


def _inverse(permutation: Shape) -> Shape:
    return tuple(sorted(range(len(permutation)), key=lambda n: permutation[n]))
