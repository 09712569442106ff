"""Two real processes of `jax.distributed` on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from prunax import calibration, search, structured

ROOT = Path(__file__).parents[1]


def run_two(script, *args):
    """Runs a script in two processes with two CPU devices each, and checks that both end well.

    The script's arguments are the port to meet at, the number of the process, and `args`.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(port), str(i), *map(str, args)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)


def pruned_in_each_way(place):
    """Calibration, channels and a search on a perceptron whose arrays `place(value, spec)` puts somewhere."""
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal(s).astype(np.float32) / 4 for s in ((16, 32), (32, 8))]
    inputs = rng.standard_normal((64, 16)).astype(np.float32)
    params = {
        "in": {
            "kernel": place(kernels[0], ("x",)),
            "bias": place(np.ones((1, 32), np.float32), ()),
        },
        "out": {"kernel": place(kernels[1], (None, "x"))},
    }
    x, y = place(inputs, ()), place(np.tanh(inputs[:, :8]), ())
    batches = [place(part, ()) for part in np.split(inputs, 4)]

    def fn(params, x):
        hidden = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"])
        return hidden @ params["out"]["kernel"]

    def loss(params):
        return jnp.mean(jnp.square(fn(params, x) - y))

    wanda = calibration.wanda(fn, params, batches, 0.5)
    sparsegpt = calibration.sparsegpt(fn, params, batches, 0.5)
    small = structured.prune_channels(fn, params, x, sparsity=0.5)
    least = structured.prune_channels(fn, params, x, target=0.6)
    found = search.max_sparsity(loss, params, max_increase=0.5)
    return {
        "wanda": (wanda.masks, wanda.params),
        "sparsegpt": (sparsegpt.masks, sparsegpt.params),
        "channels": (small.params, least.params),
        "search": found.masks,
    }
