"""The Flax models of transformers 4 (the last line that has them: 4.57), from tiny configurations."""

from typing import Any

from benchmarks import zoo

# Sizes by the names that kinds of configurations give them.
BERT = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
)
ELECTRA = BERT | dict(embedding_size=16)
BART = dict(
    vocab_size=50,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    pad_token_id=1,
    decoder_start_token_id=2,
)
GPT2 = dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
T5 = dict(
    vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
)
VIT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=16,
    patch_size=4,
)
RESNET = dict(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2])
CLIP = {"text": BERT | dict(eos_token_id=2), "vision": VIT}

# What each takes, and its sizes. The name is that of the class without "Flax".
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "AlbertForMaskedLM": ("text", ELECTRA),
    "BartForConditionalGeneration": ("seq2seq", BART),
    "BartForSequenceClassification": ("seq2seq", BART | dict(eos_token_id=2)),
    "BeitForImageClassification": ("image", VIT | dict(use_relative_position_bias=True)),
    "BertForMaskedLM": ("text", BERT),
    "BertForSequenceClassification": ("text", BERT),
    "BigBirdForMaskedLM": ("text", BERT | dict(attention_type="original_full")),
    "BlenderbotForConditionalGeneration": ("seq2seq", BART),
    "BlenderbotSmallForConditionalGeneration": ("seq2seq", BART),
    "BloomForCausalLM": ("text", dict(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)),
    "CLIPTextModel": ("text", BERT | dict(eos_token_id=2)),
    "CLIPVisionModel": ("image", VIT),
    "Dinov2ForImageClassification": ("image", VIT | dict(mlp_ratio=2)),
    "DistilBertForMaskedLM": (
        "text",
        dict(
            vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
        ),
    ),
    "ElectraForPreTraining": ("text", ELECTRA),
    "ElectraForMaskedLM": ("text", ELECTRA),
    "GemmaForCausalLM": ("text", BERT | dict(num_key_value_heads=1, head_dim=8)),
    "GPT2LMHeadModel": ("text", GPT2),
    "GPTJForCausalLM": ("text", GPT2 | dict(rotary_dim=4)),
    "GPTNeoForCausalLM": (
        "text",
        dict(
            vocab_size=50,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            max_position_embeddings=64,
        ),
    ),
    "LlamaForCausalLM": ("text", BERT | dict(num_key_value_heads=2)),
    "LongT5ForConditionalGeneration": ("seq2seq", T5 | dict(local_radius=3)),
    "MarianMTModel": ("seq2seq", BART),
    "MBartForConditionalGeneration": ("seq2seq", BART),
    "MistralForCausalLM": ("text", BERT | dict(num_key_value_heads=2, sliding_window=8)),
    "MT5ForConditionalGeneration": ("seq2seq", T5),
    "OPTForCausalLM": (
        "text",
        dict(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
    ),
    "PegasusForConditionalGeneration": ("seq2seq", BART),
    "RegNetForImageClassification": ("image", RESNET | dict(groups_width=8)),
    "ResNetForImageClassification": ("image", RESNET),
    "RobertaForMaskedLM": ("text", BERT),
    "RobertaPreLayerNormForMaskedLM": ("text", BERT),
    "RoFormerForMaskedLM": ("text", ELECTRA),
    "T5ForConditionalGeneration": ("seq2seq", T5),
    "T5EncoderModel": ("text", T5),
    "ViTForImageClassification": ("image", VIT),
    "Wav2Vec2ForCTC": (
        "audio",
        dict(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=[16] * 3,
            conv_stride=[5, 2, 2],
            conv_kernel=[10, 3, 3],
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            do_stable_layer_norm=True,
            feat_extract_norm="layer",
        ),
    ),
    "WhisperForConditionalGeneration": (
        "spectrogram",
        BART | dict(num_mel_bins=8, max_source_positions=8, max_target_positions=16),
    ),
    "XGLMForCausalLM": (
        "text",
        dict(
            vocab_size=50,
            d_model=32,
            num_layers=2,
            attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=64,
        ),
    ),
    "XLMRobertaForMaskedLM": ("text", BERT),
}


def _model(name: str, takes: str, sizes: dict[str, Any]) -> zoo.Network:
    import jax.numpy as jnp
    import transformers

    zoo.take_old_arguments("clip", a_min="min", a_max="max")  # T5
    kind = getattr(transformers, f"Flax{name}")
    text, image = zoo.tokens(), zoo.normal(2, 3, 16, 16)
    args, options = {
        "text": ((text,), {}),
        "seq2seq": ((text, text), {}),
        "image": ((image,), {"input_shape": (1, 16, 16, 3)}),
        "audio": ((zoo.normal(2, 400),), {"input_shape": (1, 400)}),
        "spectrogram": ((zoo.normal(2, 8, 16), text), {"input_shape": (1, 8, 16)}),
    }[takes]
    if name.startswith(("ResNet", "RegNet", "CLIP")):
        options = {}  # these know
    model = kind(kind.config_class(**sizes), _do_init=False, **options)

    def fn(params: zoo.PyTree, *args: Any) -> Any:
        inputs, *target = map(jnp.asarray, args)
        names = ["decoder_input_ids"] * len(target)
        return model(inputs, **dict(zip(names, target, strict=True)), params=params)[0]

    return zoo.Network(fn, zoo.random(dict(model.params_shape_tree)), args)


NETWORKS = zoo.table(_model, {name: (name, *config) for name, config in CONFIGS.items()})
