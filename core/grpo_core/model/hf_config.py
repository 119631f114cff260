"""Reading config.json: what families share, with the refusal of settings that would be computed wrongly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from .arch import MLA, Arch, Attention, DenseMLP, GatedDelta, MoE, Rope

AS_PUBLISHED = "set it as the model's authors published it"
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises `CheckpointError` when absent or not JSON."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a model folder",
            why="it has no config.json",
            fix="point `model` at a folder with config.json, *.safetensors and tokenizer.json",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read", why=str(error), fix="download the model again or mend the file"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path} cannot be read",
            why=f"it holds a {type(config).__name__}, not an object",
            fix="download the model again or mend the file",
        )
    return config


def unsupported(setting: str, value: object, why: str, fix: str) -> ConfigError:
    """The error for one setting of config.json that a family does not compute."""
    return ConfigError(f"config.json sets {setting} to {value!r}", why=why, fix=fix)


def size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number. Raises `ConfigError` when it is absent without a default, or anything else."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise unsupported(
            key,
            value,
            "a positive whole number is needed",
            f"set {key!r} as the model's authors published it",
        )
    return value


def count(config: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number of 0 or more. Raises `ConfigError` for anything else; an absent key is the default."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise unsupported(key, value, "a whole number of 0 or more is needed", AS_PUBLISHED)
    return value


def positive(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number above 0. Raises `ConfigError` for anything else; an absent key is the default."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise unsupported(key, value, "a number above 0 is needed", AS_PUBLISHED)
    return float(value)


def expect(config: Mapping[str, Any], key: str, allowed: Iterable[object], why: str) -> None:
    """Raises `ConfigError` where `key` is set to something else; an absent key passes."""
    allowed = tuple(allowed)
    value = config.get(key)
    if value is not None and value not in allowed:
        raise unsupported(
            key, value, f"{why}; supported: {', '.join(map(repr, allowed))}",
            "use another model, or bring a model plugin of your own that computes it",
        )  # fmt: skip


def expect_common(config: Mapping[str, Any], *, quantised: bool = False) -> None:
    """The settings that every family here computes in one way only.

    `quantised` lets a `quantization_config` pass, for a family that reads its own (see `fp8_blocks`).
    """
    expect(config, "hidden_act", ("silu", "swish"), "the feed-forward is SwiGLU")
    expect(config, "attention_dropout", (0, 0.0), "the decoder has no dropout")
    expect(config, "pretraining_tp", (0, 1), "slices of the weights are not multiplied one by one")
    if config.get("quantization_config") and not quantised:
        raise unsupported(
            "quantization_config", config["quantization_config"].get("quant_method", "?"),
            "quantised weights cannot be trained", "use the unquantised checkpoint of the model",
        )  # fmt: skip


def expect_fp8_blocks(config: Mapping[str, Any]) -> None:
    """Let float8 weights with one scale for each 128 x 128 block pass, and no other quantisation.

    Such a checkpoint (DeepSeek-V3, arXiv 2412.19437, section 3.3) is dequantised while it is read.
    """
    quantisation = config.get("quantization_config")
    if not quantisation:
        return
    fix = "use a checkpoint in bfloat16, or in float8 with 128 x 128 blocks"
    for key, wanted in (("quant_method", "fp8"), ("fmt", "e4m3"), ("weight_block_size", [128, 128])):
        value = quantisation.get(key, wanted if key == "fmt" else None)
        if (list(value) if isinstance(value, tuple) else value) != wanted:
            raise unsupported(
                f"quantization_config.{key}", value, f"only {wanted!r} is dequantised while reading", fix
            )


def read_rope(
    config: Mapping[str, Any], *, head_dim: int, default_theta: float = 10000.0, partial: float | None = None,
    interleaved: bool = False,
) -> Rope:  # fmt: skip
    """Rotary settings of a model with one kind of layer.

    Reads transformers 5 (`rope_parameters`) and transformers 4 (`rope_theta`, `rope_scaling`), the latter
    winning where both are given, as in transformers. `partial` is the share of a head that turns where
    config.json does not say; None is for families that turn all of it and refuse another
    `partial_rotary_factor`. Raises `ConfigError` for what it does not know.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise unsupported(
            "rope_parameters", sorted(given), "it differs between kinds of layers",
            "use a model with one rotary setting, or bring a model plugin of your own",
        )  # fmt: skip
    factor = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is None:
        expect({"partial_rotary_factor": factor}, "partial_rotary_factor", (1, 1.0),
               "all of a head's dimensions are rotated in this family")  # fmt: skip
        factor = 1.0
    factor = partial if factor is None else factor
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise unsupported(
            "partial_rotary_factor",
            factor,
            "it is a share of a head, above 0 and up to 1",
            "mend config.json",
        )
    rotary_dim = int(head_dim * factor)
    if rotary_dim < 2 or rotary_dim % 2:
        raise unsupported(
            "head_dim", head_dim, f"rotary needs an even number of dimensions, not {rotary_dim}",
            "use another model",
        )  # fmt: skip
    theta = given.get("rope_theta") or config.get("rope_theta") or default_theta
    return Rope(
        theta=float(theta),
        rotary_dim=rotary_dim,
        scaling=_rope_scaling(config, given),
        interleaved=interleaved,
        max_position_embeddings=size(config, "max_position_embeddings", 2048),
    )


def _rope_scaling(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    own = ("rope_theta", "type", "partial_rotary_factor")
    scaling = {key: value for key, value in given.items() if key not in own}
    scaling["rope_type"] = given.get("rope_type") or given.get("type") or "default"
    expect(scaling, "rope_type", ROPE_TYPES, "other rotary scalings are not computed")
    if scaling["rope_type"] in ("llama3", "yarn", "longrope") and config.get(
        "original_max_position_embeddings"
    ):
        scaling["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return scaling


def read_top(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Arch` that every family reads alike."""
    return {
        "vocab_size": size(config, "vocab_size"),
        "hidden_size": size(config, "hidden_size"),
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "max_position_embeddings": size(config, "max_position_embeddings", 2048),
        "initializer_range": float(config.get("initializer_range", 0.02)),
        "hf_config": dict(config),
    }


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false. Raises `ConfigError` for anything else; an absent key is the default."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise unsupported(key, value, "it is true or false", AS_PUBLISHED)
    return value


def sparse_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which layers hold experts, in the Qwen way.

    Every `decoder_sparse_step`-th layer has them, those in `mlp_only_layers` and a model of 0 experts not.
    """
    layers, step = size(config, "num_hidden_layers"), size(config, "decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or ()
    odd = [index for index in dense if isinstance(index, bool) or index not in range(layers)]
    if odd:
        raise unsupported(
            "mlp_only_layers", odd[0], f"layers are numbered from 0 to {layers - 1}", "mend config.json"
        )
    return tuple((index + 1) % step == 0 and index not in dense for index in range(layers))


def layer_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Attention window of each layer in the Qwen way: None sees all, w sees itself and w - 1 before.

    `use_sliding_window` switches it on; `layer_types` names the layers that have it, else those from
    `max_window_layers` on have it. Raises `ConfigError` where the two contradict.
    """
    layers = size(config, "num_hidden_layers")
    window = size(config, "sliding_window", 4096) if config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        return tuple(window if index >= first else None for index in range(layers))
    if len(kinds) != layers:
        raise unsupported(
            "layer_types", f"{len(kinds)} entries", f"num_hidden_layers is {layers}",
            "mend config.json: one entry for each layer",
        )  # fmt: skip
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise unsupported(
                "layer_types", kind, "the family has full and sliding attention only",
                "use another model, or bring a model plugin of your own",
            )  # fmt: skip
        if kind == "sliding_attention" and window is None:
            raise unsupported(
                "use_sliding_window", False, "layer_types names sliding_attention, which then has no window",
                "set use_sliding_window and sliding_window, or layer_types to full_attention",
            )  # fmt: skip
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_arch(arch: Arch) -> Arch:
    """The arch itself where its sizes fit together. Raises `ConfigError` that names those that do not."""
    troubles = [
        f"layer {index}: {trouble}"
        for index, layer in enumerate(arch.layers)
        for trouble in (*_mixer_troubles(layer.mixer), *_ffn_troubles(layer.ffn))
    ]
    if not arch.rms_norm_eps > 0:
        troubles.append(f"rms_norm_eps {arch.rms_norm_eps} is not above 0")
    if troubles:
        raise ConfigError(
            f"the sizes of this {arch.family} model do not fit together",
            why="; ".join(troubles[:4]),
            fix="check config.json against the one that the model's authors published",
        )
    return arch


def _mixer_troubles(mixer: Attention | MLA | GatedDelta) -> Iterator[str]:
    if isinstance(mixer, GatedDelta):
        if mixer.num_value_heads % mixer.num_key_heads:
            yield (
                f"{mixer.num_value_heads} value heads (linear_num_value_heads) cannot share "
                f"{mixer.num_key_heads} key heads evenly"
            )
        return
    if isinstance(mixer, MLA):
        rotary, room = mixer.rope.rotary_dim, mixer.qk_rope_head_dim
    else:
        rotary, room = mixer.rope.rotary_dim, mixer.head_dim
        if mixer.num_attention_heads % mixer.num_key_value_heads:
            yield (
                f"{mixer.num_attention_heads} heads cannot share {mixer.num_key_value_heads} "
                "key-value heads evenly"
            )
        if mixer.window is not None and mixer.window < 1:
            yield f"a window of {mixer.window}"
    if rotary % 2 or not 0 < rotary <= room:
        yield f"rotary_dim {rotary} of head_dim {room}"


def _ffn_troubles(ffn: DenseMLP | MoE) -> Iterator[str]:
    if isinstance(ffn, DenseMLP):
        return
    if ffn.top_k > ffn.num_experts:
        yield f"num_experts_per_tok {ffn.top_k} of {ffn.num_experts} experts"
    if ffn.num_experts % ffn.num_groups:
        yield f"{ffn.num_experts} experts in n_group {ffn.num_groups}"
    elif ffn.num_groups > 1:
        each = ffn.num_experts // ffn.num_groups
        if each < 2:
            yield f"n_group {ffn.num_groups} leaves {each} expert in a group, whose best two are summed"
        if ffn.topk_groups > ffn.num_groups:
            yield f"topk_group {ffn.topk_groups} of n_group {ffn.num_groups}"
        elif ffn.top_k > each * ffn.topk_groups:
            yield f"num_experts_per_tok {ffn.top_k} in topk_group {ffn.topk_groups} of {each} experts each"
