"""Paths, the default predicate, structure checks; mask trees of every kind of pytree."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import prunax
from prunax import trees


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=["name"]
)
@dataclasses.dataclass
class Registered:
    kernel: Any
    bias: Any
    name: str = "layer"


class Head(NamedTuple):
    key: Any
    value: Any


class Struct(flax.struct.PyTreeNode):
    kernel: Any
    bias: Any
    name: str = flax.struct.field(pytree_node=False, default="layer")


KERNEL = jnp.arange(1.0, 13.0).reshape(3, 4)
BIAS = jnp.ones(4)
TREES = {
    "dict": {"kernel": KERNEL, "bias": BIAS},
    "FrozenDict": flax.core.freeze({"layer": {"kernel": KERNEL, "bias": BIAS}}),
    "list": [KERNEL, BIAS],
    "tuple": (KERNEL, (BIAS,)),
    "NamedTuple": Layer(KERNEL, BIAS),
    "dataclass": Registered(KERNEL, BIAS),
    "flax.struct": Struct(KERNEL, BIAS),
    "None nodes": {"kernel": KERNEL, "bias": None, "other": [None, BIAS]},
    "non-arrays": {
        "kernel": KERNEL,
        "activation": jnp.tanh,
        "name": "dense",
        "units": 4,
        "rate": 0.5,
        "on": True,
    },
    "other dtypes": {
        "kernel": KERNEL,
        "ids": jnp.ones((3, 4), jnp.int32),
        "key": jax.random.key(0),
        "z": jnp.ones(2, jnp.complex64),
    },
    "numpy": {"kernel": np.asarray(KERNEL), "bias": np.asarray(BIAS)},
    "a bare array": KERNEL,
    "nnx.State": nnx.State({"dense": {"kernel": nnx.Param(KERNEL), "bias": nnx.Param(BIAS)}}),
}


@pytest.mark.parametrize("kind", TREES)
def test_every_kind_of_pytree(kind):
    params = TREES[kind]
    masks = prunax.compute_masks(params, 0.75)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    shapes = [mask.shape for mask in jax.tree.leaves(masks)]
    assert shapes.count((3, 4)) == 1
    assert set(shapes) <= {(3, 4), ()}
    assert all(mask.dtype == jnp.bool_ for mask in jax.tree.leaves(masks))
    for function in (prunax.apply_masks, prunax.straight_through):
        pruned = function(params, masks)
        assert jax.tree.structure(pruned) == jax.tree.structure(params)
        for leaf, old in zip(jax.tree.leaves(pruned), jax.tree.leaves(params), strict=True):
            if np.shape(old) == (3, 4) and jnp.issubdtype(old.dtype, jnp.floating):
                assert leaf.tolist() == [[0.0] * 4, [0.0] * 4, [0.0, 10.0, 11.0, 12.0]]
            else:
                assert leaf is old or jnp.array_equal(leaf, old)
    summary = prunax.summarize(params, masks)
    assert (summary.weights, summary.kept, summary.sparsity) == (12, 3, 0.75)
    assert prunax.summarize(pruned).kept == 3


def test_paths_have_one_spelling():
    tree = {"encoder": [{"kernel": KERNEL}, Layer(KERNEL, None)], "d": Registered(KERNEL, BIAS)}
    assert trees.paths(tree) == ["d/kernel", "d/bias", "encoder/0/kernel", "encoder/1/kernel"]
    assert trees.paths(KERNEL) == [""]


def test_paths_of_nnx_and_boxed_parameters_are_those_of_the_arrays():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(0))])

    assert trees.paths(nnx.state(Model(), nnx.Param)) == ["layers/0/bias", "layers/0/kernel"]
    boxed = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.ones, ("a", "b")))
    variables = boxed.init(jax.random.key(0), jnp.ones((1, 3)))
    assert trees.paths(variables) == ["params/bias", "params/kernel"]
    assert prunax.compute_masks(variables, 0.5)["params"]["kernel"].value.shape == (3, 4)


@pytest.mark.parametrize(
    ("path", "leaf", "expected"),
    [
        ("dense/kernel", jnp.ones((3, 4)), True),
        ("linear/w", jnp.ones((3, 4)), True),
        ("conv/kernel", jnp.ones((3, 3, 4, 5)), True),
        ("", jnp.ones((3, 4), jnp.bfloat16), True),
        ("dense/bias", jnp.ones(4), False),
        ("layers/bias", jnp.ones((12, 4)), False),  # stacked for scan: two axes, and still a bias
        ("linear/b", jnp.ones((12, 4)), False),
        ("norm/scale", jnp.ones((12, 4)), False),
        ("batch_stats/mean", jnp.ones((12, 4)), False),
        ("batch_stats/var", jnp.ones((12, 4)), False),
        ("embed/embedding", jnp.ones((100, 8)), False),
        ("embed/embeddings", jnp.ones((100, 8)), False),
        ("dense/kernel", jnp.ones(4), False),
        ("dense/kernel", jnp.ones((3, 4), jnp.int8), False),
        ("dense/kernel", jnp.ones((3, 4), jnp.complex64), True),
        ("dense/kernel", jnp.ones((3, 4), jnp.float8_e8m0fnu), False),  # cannot hold a zero
        ("embedding/kernel", jnp.ones((3, 4)), True),  # only the last part counts
    ],
)
def test_is_kernel(path, leaf, expected):
    assert trees.is_kernel(path, leaf) is expected


def test_structure_errors_name_the_path():
    params = {"a": {"kernel": KERNEL, "bias": BIAS}}
    with pytest.raises(ValueError, match=r"apply_masks: the masks .* but 'a/bias' is missing"):
        prunax.apply_masks(params, {"a": {"kernel": True}})
    with pytest.raises(
        ValueError, match=r"apply_masks: .*'a/extra' of the masks is not in the params"
    ):
        prunax.apply_masks(params, {"a": {"kernel": True, "bias": True, "extra": True}})


def test_trees_of_the_same_paths_fit_whatever_their_containers_are():
    params = {"dense": {"bias": BIAS, "kernel": KERNEL}}
    masks = prunax.compute_masks(params, 0.75)
    kernel = masks["dense"]["kernel"]
    alike = {
        "FrozenDict": flax.core.freeze(masks),
        "nnx.Param": nnx.State({"dense": {"kernel": nnx.Param(kernel), "bias": nnx.Param(True)}}),
        "other order": {"dense": Layer(kernel, jnp.ones((), bool))},
        "boxed": {"dense": {"bias": True, "kernel": nn.Partitioned(kernel, ("a", "b"))}},
    }
    for kind, others in alike.items():
        assert prunax.summarize(params, others).kept == 3, kind
        pruned = prunax.apply_masks(params, others)
        assert jax.tree.structure(pruned) == jax.tree.structure(params), kind
        assert pruned["dense"]["kernel"].tolist()[2] == [0.0, 10.0, 11.0, 12.0], kind
        assert prunax.compare_masks(masks, others).total.overlap == 1.0, kind
        tx = prunax.transforms.fixed_masks(optax.sgd(0.1), others)
        updates, _ = tx.update(params, tx.init(params), params)
        assert int((optax.apply_updates(params, updates)["dense"]["kernel"] == 0).sum()) == 9, kind


def test_no_error_prints_a_treedef():
    params = {"a": {"kernel": KERNEL}}
    for other in ({"b": {"kernel": True}}, [True], True, {"a": {"kernel": [True, True]}}):
        with pytest.raises(ValueError, match="apply_masks: the masks must") as error:
            prunax.apply_masks(params, other)
        assert "PyTreeDef" not in str(error.value)


def test_an_attribute_called_value_keeps_its_name():
    head = Head(KERNEL, KERNEL)
    tree = {"head": head, "param": nnx.State({"w": nnx.Param({"value": KERNEL})})}
    assert trees.paths(tree) == ["head/key", "head/value", "param/w/value"]
    masks = prunax.compute_masks({"head": head}, 0.5)
    assert masks["head"].value.sum() == masks["head"].key.sum() == 6
    # Of a box with the name of something else, `value` would be the only one in it.
    assert prunax.compute_masks({"scale": head}, 0.5)["scale"].value.sum() == 6
    named = trees.map_with_path(lambda path, leaf: path, {"head": head})
    assert named["head"] == Head("head/key", "head/value")


def test_leaves_whose_names_hold_slashes_are_told_apart():
    params = {"a": {"kernel": KERNEL}, "a/kernel": -KERNEL}
    masks = {"a": {"kernel": KERNEL > 6}, "a/kernel": True}
    frozen = flax.core.freeze(masks)
    pruned = prunax.apply_masks(params, frozen)
    assert [int((x == 0).sum()) for x in jax.tree.leaves(pruned)] == [6, 0]


def test_params_without_a_kernel():
    with pytest.raises(
        ValueError, match=r"`where` selects no leaf. The leaves are: bias, f. Pass where="
    ):
        prunax.compute_masks({"bias": BIAS, "f": jnp.tanh}, 0.5)
    with pytest.raises(ValueError, match=r"The leaves are: none"):
        prunax.compute_masks({}, 0.5)
