"""How the tests run: eight CPU devices, strict promotion, a compilation cache.

The environment is set before jax is imported, since jax reads it once.
"""

import os
from pathlib import Path

DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
CACHE = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import chex  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", False)

# Compilation makes a first example slow: no deadline. Fixed examples: what is red stays red.
hypothesis.settings.register_profile(
    "prunax", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("prunax")


@pytest.fixture(autouse=True)
def _promotion(request):
    """Strict, except where the marker says that models of other libraries cannot do with it.

    The examples in prunax's docstrings, which stand outside this folder, run as users run them.
    """
    relaxed = request.node.get_closest_marker("relaxed_promotion") is not None
    with (
        jax.numpy_dtype_promotion("standard" if relaxed else "strict"),
        jax.numpy_rank_promotion("allow" if relaxed else "raise"),
    ):
        yield


@pytest.fixture(autouse=True)
def _count_traces_anew():
    chex.clear_trace_counter()  # `chex.assert_max_traces` counts by names, of all tests together


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Drop what a module compiled: each function maps memory, and a process has only so many maps.

    Without it a worker held half of Linux's 65,530 maps and 4.8 GB after a quarter of the tests, and crashed later.
    """
    yield
    jax.clear_caches()
