"""JAX's programs, as the rest of prunax reads them: the one place that knows jaxprs."""

from prunax._jaxprs.flattening import Equation, Pick, Product, Program, View, scan_arity, trace

__all__ = ["Equation", "Pick", "Product", "Program", "View", "scan_arity", "trace"]
