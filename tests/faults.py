"""Training that can be killed: run as a script by test_reliability.py, which says when it dies.

    python tests/faults.py FOLDER STEPS [kill-at-step N | kill-while-saving N]

It goes on from the last checkpoint in the folder, and writes `final.npz` there when all steps are done.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import prunax

EVERY = 5  # steps from one checkpoint to the next


def optimizer():
    schedule = prunax.schedules.polynomial(0.9, 4, 30, every=7)
    return prunax.prune(optax.adamw(1e-2), schedule, packed=True)


def start():
    keys = jax.random.split(jax.random.key(0))
    params = {
        "hidden": {"kernel": 0.1 * jax.random.normal(keys[0], (64, 32)), "bias": jnp.zeros(32)},
        "out": {"kernel": 0.1 * jax.random.normal(keys[1], (32, 10)), "bias": jnp.zeros(10)},
    }
    return {"params": params, "state": optimizer().init(params)}


def loss(params, images, labels):
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def step(tree, images, labels):
    grads = jax.grad(loss)(tree["params"], images, labels)
    updates, state = optimizer().update(grads, tree["state"], tree["params"])
    return {"params": optax.apply_updates(tree["params"], updates), "state": state}


def batch(number, size=64):
    """The batch depends on nothing but the step."""
    digits = load_digits()
    rows = np.random.default_rng(number).choice(len(digits.target), size)
    return jnp.asarray(digits.data[rows] / 16, jnp.float32), jnp.asarray(digits.target[rows])


def save(path, tree):
    arrays = {
        prunax.trees.path_name(key): np.asarray(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    np.savez(path, **arrays)


def main(folder, steps, fault, at):
    folder = Path(folder)
    options = ocp.CheckpointManagerOptions(save_interval_steps=EVERY, max_to_keep=2)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
        tree, first = start(), 0
        if (last := manager.latest_step()) is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            tree = manager.restore(last, args=ocp.args.StandardRestore(abstract))
            first = last + 1
        print("first", first, flush=True)
        for number in range(first, steps):
            if fault == "kill-at-step" and number == at:
                manager.wait_until_finished()
                os.kill(os.getpid(), signal.SIGKILL)
            tree = step(tree, *batch(number))
            manager.save(number, args=ocp.args.StandardSave(tree))
            if fault == "kill-while-saving" and number == at:
                os.kill(os.getpid(), signal.SIGKILL)  # the write goes on in the background
        manager.wait_until_finished()
    save(folder / "final.npz", tree)


if __name__ == "__main__":
    fault, at = (sys.argv[3], int(sys.argv[4])) if len(sys.argv) > 3 else ("", -1)
    main(sys.argv[1], int(sys.argv[2]), fault, at)
