"""A Llama in a folder of the Hugging Face layout, judged by `transformers` where it is installed."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prunax
from benchmarks import decoding, huggingface, smollm
from prunax import export

CONFIG = smollm.Config(
    layers=4, width=24, hidden=40, heads=6, kv_heads=2, head_width=8, vocabulary=50
)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(3, 50, (2, 9)), jnp.int32)


@pytest.fixture(scope="module")
def params(tokens):
    params = smollm.Llama(CONFIG).init(jax.random.key(0), tokens)["params"]
    # Far from one and from each other, so that no norm is taken for another.
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(
        lambda x: x if x.ndim > 1 else x + jax.random.uniform(next(keys), x.shape), params
    )


def apply(params, tokens):
    return smollm.apply(params, tokens, CONFIG)


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders") / "dense"
    huggingface.save(folder, params, CONFIG)
    return folder


def test_round_trip(folder, params):
    read, config = huggingface.load(folder)
    assert config == CONFIG == huggingface.sizes(params, CONFIG)
    chex.assert_trees_all_equal(read, params)


def test_decoding_with_a_cache_is_the_whole_function_again_and_again(params, tokens):
    weights = decoding.weights(params, CONFIG)
    made = decoding.greedy(weights, tokens[0], CONFIG, 6)
    expected = tokens[:1]
    for _ in range(6):
        best = jnp.argmax(apply(params, expected)[:, -1], axis=-1).astype(jnp.int32)
        expected = jnp.concatenate([expected, best[:, None]], axis=1)
    np.testing.assert_array_equal(made, expected[0])
    in_a_format = decoding.narrow(weights, "dense, float32", "dense, float32")
    np.testing.assert_array_equal(decoding.greedy(in_a_format, tokens[0], CONFIG, 6), made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 48}, "gate_proj.weight' is (48, 24), and it is (40, 24)"),
        ({"num_key_value_heads": 3}, "k_proj.weight' is (24, 24), and it is (16, 24)"),
        ({"num_hidden_layers": 5}, "and it is missing"),
        ({"num_hidden_layers": 3}, "without 'model.layers.3."),
    ],
)
def test_a_config_that_contradicts_the_tensors(folder, tmp_path, change, message):
    wrong = tmp_path / "wrong"
    with export.open_checkpoint(folder) as checkpoint:
        held = {name: checkpoint.read(name) for name in checkpoint.tensors}
    export.save_checkpoint(wrong, held, config=huggingface.entries(CONFIG) | change)
    with pytest.raises(ValueError) as caught:
        huggingface.load(wrong)
    assert message in str(caught.value)
    assert json.loads((wrong / "config.json").read_text())["hidden_size"] == 24


def test_params_that_the_config_does_not_fit(params, tmp_path):
    with pytest.raises(ValueError, match=r"attention_3/.* has shape .*asks for none"):
        huggingface.save(tmp_path / "no", params, CONFIG.__class__(**vars(CONFIG) | {"layers": 3}))
    assert not (tmp_path / "no").exists()


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("kind", ["dense", "masked", "narrow", "shallow"])
def test_transformers_computes_the_same(kind, folder, params, tokens, tmp_path):
    pytest.importorskip(
        "torch", reason="the judge of the folders is PyTorch: pip install 'prunax[peers]'"
    )
    pytest.importorskip("transformers", minversion="5", reason="pip install 'prunax[peers]'")
    fn, own, place = apply, params, tmp_path / kind
    if kind == "masked":
        own = prunax.apply_masks(params, prunax.compute_masks(params, 0.5))
        huggingface.save(place, own, CONFIG)
    elif kind == "narrow":
        narrow = huggingface.narrower(params, tokens, CONFIG)
        fn, own = narrow.fn, narrow.params
        small = huggingface.sizes(own, CONFIG)
        assert (small.heads, small.kv_heads, small.hidden) == (3, 1, 30)
        config = {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 30}
        names = huggingface.names(CONFIG)
        export.shrink_checkpoint(folder, place, narrow.keep, names=names, config=config)
    elif kind == "shallow":
        shallow = huggingface.shallower(params, tokens, CONFIG, [1, 2])
        fn, own = shallow.fn, shallow.params
        export.shrink_checkpoint(
            folder,
            place,
            shallow.keep,
            without=["model.layers.1", "model.layers.2"],
            config={"num_hidden_layers": 2},
        )
        again, config = huggingface.load(place)
        assert config.layers == 2
        chex.assert_trees_all_equal(again, huggingface.renumbered(own))
    else:
        place = folder
    judged = huggingface.judge(place, fn, own, tokens, CONFIG, count=12)
    assert judged.difference < 1e-5 * judged.scale
    assert judged.same and len(judged.text) > 9
