"""The default choice of leaves, on names that libraries give: shapes are small, names are theirs."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prunax
from prunax import trees

# `kernel` where the leaf is one, else a word of the reason why it stays whole. One tree a library.
NAMES = {
    "Flax": {
        "params/Dense_0/kernel": ((8, 4), "kernel"),
        "params/Dense_0/bias": ((4,), "axes"),
        "params/Conv_0/kernel": ((1, 1, 3, 8), "kernel"),
        "params/ConvLocal_0/bias": ((4, 4, 8), "bias"),
        "params/head/kernel": ((8, 1), "kernel"),
        "params/one_input/kernel": ((1, 8), "kernel"),
        "params/Embed_0/embedding": ((9, 8), "table"),
        "params/embedding/kernel": ((3, 4), "kernel"),
        "params/layers/LayerNorm_0/scale": ((12, 8), "scale"),
        "params/layers/Dense_0/bias": ((12, 8), "bias"),
        "params/layers/Dense_0/kernel": ((12, 8, 8), "kernel"),
        "params/attention/query/kernel": ((8, 2, 4), "kernel"),
        "params/attention/out/kernel": ((2, 4, 8), "kernel"),
        "params/lstm/ii/kernel": ((4, 4), "kernel"),
        "params/lstm/hf/kernel": ((4, 4), "kernel"),
        "params/encoderblock/posembed_input/pos_embedding": ((1, 17, 8), "table"),
        "params/MAPHead_0/probe": ((1, 1, 8), "table"),
        "params/cls": ((1, 1, 8), "table"),
        "params/mm/lora_a": ((8, 2), "low-rank"),
        "params/mm/lora_b": ((2, 8), "low-rank"),
        "params/WeightNorm_0/Dense_0/kernel/scale": ((2, 4), "kernel, by its place"),
        "batch_stats/BatchNorm_0/mean": ((12, 8), "collection"),
        "batch_stats/SpectralNorm_0/Dense_0/kernel/u": ((3, 8), "collection"),
        "opt_state/mu/kernel": ((8, 4), "optimizer"),
        "params/boxed/kernel/value": ((8, 4), "kernel"),
        "params/boxed/scale/value": ((8, 4), "scale"),
    },
    "Optax and an encoder": {
        "0/mu/dense/kernel": ((8, 4), "optimizer"),
        "0/nu/dense/kernel": ((8, 4), "optimizer"),
        "mu/kernel": ((8, 4), "kernel"),  # the mean of a variational encoder
        "log_var/kernel": ((8, 4), "kernel"),
    },
    "bonsai": {
        "embedder/input_embedding": ((32, 8), "table"),
        "layers/0/attn/q_proj/w": ((8, 2, 4), "kernel"),
        "layers/0/attn/q_norm/w": ((2, 4), "normalisation"),
        "layers/0/mlp/gate_proj/kernel": ((8, 16), "kernel"),
        "layers/0/layer_scale1/gamma": ((2, 8), "gain"),
        "register_tokens": ((1, 4, 8), "table"),
        "mamba/A_log": ((16, 4), "recurrence"),
        "mamba/in_proj/kernel": ((8, 32), "kernel"),
        "mamba/x_proj/kernel": ((16, 6), "kernel"),
        "mamba/dt_bias": ((2, 8), "bias"),
        "mamba/conv1d/kernel": ((4, 1, 16), "kernel"),
    },
    "Keras": {
        "conv2d/kernel": ((3, 3, 3, 8), "kernel"),
        "separable_conv2d/depthwise_kernel": ((3, 3, 8, 1), "kernel"),
        "separable_conv2d/pointwise_kernel": ((1, 1, 8, 4), "kernel"),
        "lstm/lstm_cell/recurrent_kernel": ((4, 16), "kernel"),
        "gru/gru_cell/bias": ((2, 12), "bias"),
        "multi_head_attention/query/kernel": ((8, 2, 4), "kernel"),
        "multi_head_attention/query/bias": ((2, 4), "bias"),
        "embedding/embeddings": ((9, 8), "table"),
        "p_re_lu/alpha": ((4, 4, 8), "gain"),
        "spectral_normalization/vector_u": ((1, 4), "broadcast"),
        "batch_normalization/moving_variance": ((1, 8), "statistic"),
        "layer_normalization/gamma": ((4, 8), "gain"),
        "layer_normalization/beta": ((4, 8), "bias"),
        "convnext/stage_0_block_0_layer_scale/gamma": ((2, 8), "gain"),
    },
    "Haiku": {
        "resnet/~/initial_conv/w": ((7, 7, 3, 8), "kernel"),
        "resnet/~/initial_batchnorm/scale": ((1, 1, 1, 8), "scale"),
        "resnet/~/initial_batchnorm/offset": ((1, 1, 1, 8), "bias"),
        "resnet/~/initial_batchnorm/~/mean_ema/average": ((1, 1, 1, 8), "statistic"),
        "resnet/~/initial_batchnorm/~/mean_ema/hidden": ((2, 8), "statistic"),
        "exponential_moving_average/hidden": ((3, 4), "statistic"),
        "gru/w_i": ((3, 12), "kernel"),
        "gru/w_h": ((4, 12), "kernel"),
        "lstm/linear/w": ((7, 16), "kernel"),
        "embed/embeddings": ((9, 8), "table"),
        "spectral_norm/u0": ((1, 4), "broadcast"),
        "mlp/hidden": ((3, 4), "kernel"),
    },
    "Equinox": {
        "layers/0/weight": ((8, 4), "kernel"),
        "layers/0/bias": ((8,), "axes"),
        "conv/weight": ((8, 3, 1, 1), "kernel"),
        "conv/bias": ((8, 1, 1), "bias"),
        "cell/weight_ih": ((12, 4), "kernel"),
        "cell/weight_hh": ((12, 4), "kernel"),
        "emb/weight": ((9, 8), "table"),
        "ln/weight": ((4, 8), "normalisation"),
        "affine/weight": ((4, 8), "bias of its shape"),
        "affine/bias": ((4, 8), "bias"),
        "group/norm/weight": ((12, 8), "normalisation"),
        "attention/query_proj/weight": ((8, 8), "kernel"),
        "patch_embed/linear/weight": ((8, 48), "kernel"),
        "pos": ((16, 8), "table"),
        "head/query": ((4, 4), "kernel"),
        "head/value": ((4, 4), "kernel"),
    },
    "state spaces": {
        "ssm/B": ((8, 4), "recurrence"),
        "ssm/C": ((4, 8), "recurrence"),
        "ssm/Lambda_re": ((4, 2), "recurrence"),
        "ssm/log_step": ((4, 1), "recurrence"),
        "factors/B": ((8, 4), "kernel"),
        "rwkv/time_mix_k": ((1, 1, 8), "recurrence"),
        "rwkv/time_decay": ((2, 4), "recurrence"),
        "rwkv/key/weight": ((8, 8), "kernel"),
    },
    "no names": {
        "0/0": ((8, 4), "kernel"),
        "W1": ((1, 8), "kernel"),
        "": ((3, 4), "kernel"),
        "biases/0": ((2, 4), "bias"),
    },
    "transformers": {
        "bert/embeddings/word_embeddings/weight": ((32, 8), "table"),
        "bert/embeddings/LayerNorm/weight": ((8,), "axes"),
        "bert/encoder/layer/0/attention/self/query/weight": ((8, 8), "kernel"),
        "bert/encoder/layer/0/attention/output/dense/weight": ((8, 8), "kernel"),
        "bert/pooler/dense/weight": ((8, 8), "kernel"),
        "deberta/encoder/rel_embeddings/weight": ((16, 8), "table"),
        "deberta/layer/0/pos_q_proj/weight": ((8, 8), "kernel"),
        "albert/encoder/embedding_hidden_mapping_in/weight": ((8, 4), "kernel"),
        "albert/encoder/embedding_hidden_mapping_in/bias": ((8,), "axes"),
        "transformer/wte/weight": ((32, 8), "table"),
        "transformer/wpe/weight": ((32, 8), "table"),
        "transformer/h/0/attn/bias": ((1, 1, 8, 8), "bias"),
        "transformer/h/0/attn/masked_bias": ((1, 1), "bias"),
        "transformer/h/0/attn/c_attn/weight": ((8, 24), "kernel"),
        "gpt_neox/embed_in/weight": ((32, 8), "table"),
        "embed_out/weight": ((32, 8), "kernel"),
        "lm_head/weight": ((32, 8), "kernel"),
        "model/embed_tokens/weight": ((32, 8), "table"),
        "model/layers/0/input_layernorm/weight": ((2, 8), "normalisation"),
        "model/layers/0/self_attn/q_norm/weight": ((2, 4), "normalisation"),
        "model/layers/0/self_attn/q_proj/weight": ((8, 8), "kernel"),
        "model/layers/0/mlp/experts/gate_up_proj": ((4, 8, 16), "kernel"),
        "model/layers/0/mlp/experts/gate_up_proj_bias": ((4, 16), "bias"),
        "model/layers/0/mlp/gate/weight": ((4, 8), "kernel"),
        "model/rotary_emb/inv_freq": ((4, 4), "buffer"),
        "shared/weight": ((32, 8), "table"),
        "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/weight": ((32, 4), "table"),
        "encoder/block/0/layer/1/DenseReluDense/wi_0/weight": ((16, 8), "kernel"),
        "vit/embeddings/cls_token": ((1, 1, 8), "table"),
        "vit/embeddings/position_embeddings": ((1, 17, 8), "table"),
        "vit/embeddings/patch_embeddings/projection/weight": ((8, 3, 4, 4), "kernel"),
        "swin/self/relative_position_bias_table": ((49, 4), "bias"),
        "swinv2/self/logit_scale": ((4, 1, 1), "scale"),
        "swinv2/self/continuous_position_bias_mlp/2/weight": ((4, 16), "kernel"),
        "sam/attn/rel_pos_h": ((27, 8), "table"),
        "detr/query_position_embeddings/weight": ((100, 8), "table"),
        "detr/bbox_predictor/layers/0/weight": ((8, 8), "kernel"),
        "blip2/query_tokens": ((1, 4, 8), "table"),
        "clip/text_projection": ((8, 8), "kernel"),
        "wav2vec2/pos_conv_embed/conv/weight_g": ((1, 1, 8), "broadcast"),
        "wav2vec2/pos_conv_embed/conv/weight_v": ((8, 4, 8), "kernel"),
        "wav2vec2/pos_conv_embed/conv/parametrizations/weight/original0": ((1, 1, 8), "broadcast"),
        "wav2vec2/pos_conv_embed/conv/parametrizations/weight/original1": ((8, 4, 8), "kernel"),
        "wav2vec2/quantizer/codevectors": ((1, 8, 4), "table"),
        "time_embedding/linear_1/weight": ((8, 4), "kernel"),
        "time_embed/0/weight": ((8, 4), "kernel"),
        "time_embed/0/bias": ((8,), "axes"),
        "adaLN_modulation/1/weight": ((48, 8), "kernel"),
        "adaLN_modulation/1/bias": ((48,), "axes"),
        "pixart/scale_shift_table": ((6, 8), "bias"),
        "rnn/weight_ih_l0": ((16, 4), "kernel"),
        "rnn/bias_ih_l0": ((2, 16), "bias"),
        "mha/in_proj_weight": ((24, 8), "kernel"),
        "mha/bias_k": ((1, 1, 8), "bias"),
        "bn/weight": ((3, 8), "statistics beside it"),
        "bn/running_mean": ((3, 8), "statistic"),
        "up/lora_A/default/weight": ((2, 8), "low-rank"),
        "up/base_layer/weight": ((8, 8), "kernel"),
        "prune/weight_orig": ((8, 8), "kernel"),
        "prune/weight_mask": ((8, 8), "buffer"),
        "vq/codebook/weight": ((16, 8), "table"),
        "moco/queue": ((8, 64), "buffer"),
    },
    "quantised": {
        "fp8/up_proj/weight": ((8, 8), "kernel"),
        "fp8/up_proj/weight_scale_inv": ((2, 2), "scale"),
        "ct/up_proj/weight": ((8, 8), "kernel"),
        "ct/up_proj/weight_scale": ((8, 1), "scale"),
        "ct/up_proj/weight_block_amax": ((2, 2), "scale"),
        "ct/up_proj/weight_other": ((8, 2), "weight beside it"),
        "asym/up_proj/weight": ((8, 8), "zero point"),
        "asym/up_proj/weight_scale": ((8, 1), "scale"),
        "asym/up_proj/weight_zero_point": ((8, 1), "zero point"),
        "gptq/up_proj/scales": ((2, 8), "scale"),
        "gptq/up_proj/qzeros": ((2, 1), "scale"),
        "marlin/up_proj/s": ((2, 8), "scale"),
        "bnb/up_proj/weight/absmax": ((2, 8), "weight, by its place"),
        "bnb/up_proj/weight/quant_map": ((2, 8), "weight, by its place"),
        "bnb8/up_proj/SCB": ((2, 8), "scale"),
        "aqlm/up_proj/codebooks": ((1, 16, 1, 8), "table"),
    },
}


@pytest.mark.parametrize("library", NAMES)
def test_names_of_libraries(library):
    tree = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, (shape, _) in NAMES[library].items()
    }
    reasons = trees.explain(tree)
    wrong = {
        path: reasons[path]
        for path, (_, expected) in NAMES[library].items()
        if (reasons[path] != "" if expected == "kernel" else expected not in reasons[path])
    }
    assert not wrong
    assert trees.select(tree, trees.is_kernel).paths == [p for p in reasons if not reasons[p]]


@pytest.mark.parametrize("library", NAMES)
def test_a_leaf_seen_alone_is_no_kernel_where_only_neighbours_tell_that_it_is(library):
    """Alone, a leaf may stay whole that is a kernel, never the other way, but where nothing but a neighbour tells."""
    by_neighbours = ("ssm/", "affine/weight", "bn/", "asym/", "/mu/", "/nu/", "other")
    for path, (shape, expected) in NAMES[library].items():
        alone = trees.is_kernel(path, jax.ShapeDtypeStruct(shape, jnp.float32))
        if expected != "kernel" and not any(part in f"/{path}" for part in by_neighbours):
            assert not alone, path


def test_dtypes_and_other_leaves_have_reasons():
    tree = {"ids": np.ones((2, 2), np.int32), "z": jnp.ones((2, 2), jnp.complex64), "f": jnp.tanh}
    assert trees.explain(tree) == {
        "f": "no array",
        "ids": "int32 is no floating-point dtype",
        "z": "",
    }
    kernels = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    assert trees.explain(kernels, lambda path, leaf: path == "a") == {
        "a": "",
        "b": "left out by `where`",
    }


@pytest.mark.relaxed_promotion
def test_haiku_networks_with_their_state():
    def network(x):
        x = hk.nets.ResNet18(4)(x, is_training=True)
        hk.SpectralNorm()(jnp.ones((3, 4)))
        return hk.ExponentialMovingAverage(0.9)(x)

    trees_of = hk.transform_with_state(network)
    params, state = jax.eval_shape(trees_of.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    assert all(trees.explain(state).values())
    whole = [path for path, reason in trees.explain(params).items() if reason]
    assert {path.rsplit("/", 1)[-1] for path in whole} == {"scale", "offset", "b"}


def test_equinox_modules():
    class Model(eqx.Module):
        embedding: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        affine: eqx.nn.LayerNorm
        layers: eqx.nn.MLP
        cell: eqx.nn.LSTMCell
        conv: eqx.nn.Conv2d
        attention: eqx.nn.MultiheadAttention

    keys = iter(jax.random.split(jax.random.key(0), 5))
    model = Model(
        eqx.nn.Embedding(10, 8, key=next(keys)),
        eqx.nn.LayerNorm((4, 8), use_bias=False),
        eqx.nn.LayerNorm((4, 8)),
        eqx.nn.MLP(4, 3, 5, 1, key=next(keys)),
        eqx.nn.LSTMCell(4, 4, key=next(keys)),
        eqx.nn.Conv2d(3, 4, 1, key=next(keys)),
        eqx.nn.MultiheadAttention(2, 8, key=next(keys)),
    )
    masks = prunax.compute_masks(model, 0.5)
    pruned = [p for p, m in zip(trees.paths(masks), jax.tree.leaves(masks), strict=True) if m.ndim]
    assert pruned == [
        "layers/layers/0/weight",
        "layers/layers/1/weight",
        "cell/weight_ih",
        "cell/weight_hh",
        "conv/weight",
        *(f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")),
    ]
