"""How the tests run: eight CPU devices, strict promotion, a compilation cache.

The environment is set before jax is imported, since jax reads it once.
"""

import os
from pathlib import Path

# Eight devices share the threads of a few cores. Were a device to run two collectives at once, each would hold a thread
# while it waits for the others, until none is left: JAX 0.12 then aborts after 40 seconds. So one after the other.
FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_cpu_enable_concurrency_optimized_scheduler": "false",
}
given = os.environ.get("XLA_FLAGS", "")
missing = [f"{flag}={value}" for flag, value in FLAGS.items() if flag not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
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
