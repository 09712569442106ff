"""How every test runs: eight CPU devices, strict promotion, a compilation cache.

The environment is set before jax is imported, since jax reads it once.
"""

import os
from pathlib import Path

FLAG = "--xla_force_host_platform_device_count"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=8".strip()
CACHE = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow: no deadline. Fixed examples: a red test stays red.
hypothesis.settings.register_profile(
    "prunax", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("prunax")


@pytest.fixture
def relaxed_promotion():
    """JAX's standard promotion, for models of other libraries. Also a marker of this name."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True)
def _promotion(request):
    if request.node.get_closest_marker("relaxed_promotion"):
        request.getfixturevalue("relaxed_promotion")
