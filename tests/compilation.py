"""Count what JAX compiles."""

import logging
from contextlib import contextmanager

import jax


@contextmanager
def compilations():
    """Yield a list that grows by one message for each program that JAX compiles (or takes from its disk cache)."""
    messages = []

    class Collect(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("Compiling"):
                messages.append(record.getMessage())

    handler, logger = Collect(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield messages
    finally:
        logger.removeHandler(handler)
