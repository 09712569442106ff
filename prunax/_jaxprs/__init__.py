"""JAX's programs, as the rest of prunax reads them: the one place that knows jaxprs."""

from prunax._jaxprs.choosing import Kernels, kernels
from prunax._jaxprs.equations import Equation, Loop, Pick, Segment
from prunax._jaxprs.flattening import Product, Program, Reason, trace
from prunax._jaxprs.operands import LinearMap, Operand, places
from prunax._jaxprs.programs import aval, bind

__all__ = [
    "Equation",
    "Kernels",
    "LinearMap",
    "Loop",
    "Operand",
    "Pick",
    "Product",
    "Program",
    "Reason",
    "Segment",
    "aval",
    "bind",
    "kernels",
    "places",
    "trace",
]
