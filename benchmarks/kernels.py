"""Products of one vector by kernels outside of XLA: what `jax.ffi` would win. Compiled here, where a compiler is.

They are no part of prunax, which is pure Python; the script that uses them shows what that costs.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

Array = jax.Array
SOURCE = Path(__file__).with_suffix(".cc")
NAMES = ("dense_bfloat16", "dense_int8", "masked_bfloat16", "masked_int8")
FLAGS = (
    "avx512f",
    "avx512bw",
    "avx512_vbmi2",
)  # of the processor: the last spreads bytes by a mask
PADDING = 64  # weights behind the last, for reads of whole registers


@functools.cache
def available() -> bool:
    """Compiles and registers the kernels; False where that cannot be: no compiler, another processor."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler or not _has_instructions() or jax.default_backend() != "cpu":
        return False
    options = [
        "-std=c++17",
        "-O3",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vbmi2",
        "-mpopcnt",
        "-shared",
        "-fPIC",
    ]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        done = subprocess.run(
            [compiler, *options, f"-I{jax.ffi.include_dir()}", SOURCE, "-o", library],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile:\n{done.stderr[-2000:]}")
        loaded = ctypes.cdll.LoadLibrary(str(library))
    for name in NAMES:
        handler = jax.ffi.pycapsule(getattr(loaded, name))
        jax.ffi.register_ffi_target(f"prunax_{name}", handler, platform="cpu")
    return True


def _has_instructions() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return all(flag in flags for flag in FLAGS)


def dense(x: Array, w: Array, scale: Array) -> Array:
    """All weights.

    Args:
        x: (in,) float32, in 64s.
        w: (out, in), bfloat16 or int8.
        scale: (out,) float32.

    Returns:
        (out,) float32, ``(w @ x) * scale``.
    """
    result = jax.ShapeDtypeStruct((w.shape[0],), jnp.float32)
    return jax.ffi.ffi_call(f"prunax_dense_{w.dtype}", result)(x, w, scale)


def masked(x: Array, w: Array, bits: Array, starts: Array, scale: Array) -> Array:
    """Weights kept anywhere.

    Args:
        x: (in,) float32, in 64s.
        w: Kept weights, row by row, bfloat16 or int8, and `PADDING` more.
        bits: (out, in / 8) uint8, the mask, lowest bit first.
        starts: (out,) int32, where each row begins in w.
        scale: (out,) float32.

    Returns:
        (out,) float32.
    """
    result = jax.ShapeDtypeStruct((bits.shape[0],), jnp.float32)
    return jax.ffi.ffi_call(f"prunax_masked_{w.dtype}", result)(x, w, bits, starts, scale)
