"""Products of one vector by kernels outside of XLA: what `jax.ffi` would win. Compiled here, where a compiler is.

They are no part of prunax, which is pure Python; the script that uses them shows what that costs.
"""

import ctypes
import functools
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

Array = jax.Array
SOURCE = Path(__file__).with_suffix(".cc")
NAMES = ("dense_bfloat16", "dense_int8", "pairs_bfloat16", "pairs_int8")


@functools.cache
def available() -> bool:
    """Compiles and registers the kernels; False where that cannot be: no compiler, no x86 with AVX2, no CPU backend."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler or platform.machine() != "x86_64" or jax.default_backend() != "cpu":
        return False
    options = ["-std=c++17", "-O3", "-mavx2", "-mfma", "-shared", "-fPIC"]
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


def dense(x: Array, w: Array, scale: Array) -> Array:
    """All weights.

    Args:
        x: (in,) float32, in 32s.
        w: (out, in), bfloat16 or int8.
        scale: (out,) float32.

    Returns:
        (out,) float32, ``(w @ x) * scale``.
    """
    result = jax.ShapeDtypeStruct((w.shape[0],), jnp.float32)
    return jax.ffi.ffi_call(f"prunax_dense_{w.dtype}", result)(x, w, scale)


def pairs(x: Array, w: Array, places: Array, scale: Array) -> Array:
    """Two weights of every four inputs.

    Args:
        x: (in,) float32, in 16s.
        w: (out, in / 2), bfloat16 or int8.
        places: (out, in / 8) uint8: of four weights the place of each among its four inputs, two bits each.
        scale: (out,) float32.

    Returns:
        (out,) float32.
    """
    result = jax.ShapeDtypeStruct((w.shape[0],), jnp.float32)
    return jax.ffi.ffi_call(f"prunax_pairs_{w.dtype}", result)(x, w, places, scale)
