"""Reading config.json: what families share, with the refusal of settings that would be computed wrongly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from .arch import Arch, Rope

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


def expect(config: Mapping[str, Any], key: str, allowed: Iterable[object], why: str) -> None:
    """Raises `ConfigError` where `key` is set to something else; an absent key passes."""
    allowed = tuple(allowed)
    value = config.get(key)
    if value is not None and value not in allowed:
        raise unsupported(
            key, value, f"{why}; supported: {', '.join(map(repr, allowed))}",
            "use another model, or bring a model plugin of your own that computes it",
        )  # fmt: skip


def expect_dense_decoder(config: Mapping[str, Any]) -> None:
    """The settings that every dense family here computes in one way only."""
    expect(config, "hidden_act", ("silu", "swish"), "the feed-forward is SwiGLU")
    expect(config, "attention_dropout", (0, 0.0), "the decoder has no dropout")
    expect(config, "partial_rotary_factor", (1, 1.0), "all of a head's dimensions are rotated in this family")
    if config.get("quantization_config"):
        raise unsupported(
            "quantization_config", config["quantization_config"].get("quant_method", "?"),
            "quantised weights cannot be trained", "use the unquantised checkpoint of the model",
        )  # fmt: skip


def read_rope(config: Mapping[str, Any], *, head_dim: int, default_theta: float = 10000.0) -> Rope:
    """Rotary settings of a model with one kind of layer.

    Reads transformers 5 (`rope_parameters`) and transformers 4 (`rope_theta`, `rope_scaling`), the latter
    winning where both are given, as in transformers. Raises `ConfigError` for what it does not know.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise unsupported(
            "rope_parameters", sorted(given), "it differs between kinds of layers",
            "use a model with one rotary setting, or bring a model plugin of your own",
        )  # fmt: skip
    scaling = {key: value for key, value in given.items() if key not in ("rope_theta", "type")}
    scaling["rope_type"] = given.get("rope_type") or given.get("type") or "default"
    expect(scaling, "rope_type", ROPE_TYPES, "other rotary scalings are not computed")
    expect(
        scaling, "partial_rotary_factor", (1, 1.0), "all of a head's dimensions are rotated in this family"
    )
    if scaling["rope_type"] in ("llama3", "yarn", "longrope") and config.get(
        "original_max_position_embeddings"
    ):
        scaling["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if head_dim % 2:
        raise unsupported("head_dim", head_dim, "rotary needs an even number", "use another model")
    theta = given.get("rope_theta") or config.get("rope_theta") or default_theta
    return Rope(
        theta=float(theta),
        rotary_dim=head_dim,
        scaling=scaling,
        max_position_embeddings=size(config, "max_position_embeddings", 2048),
    )


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
    troubles = []
    for index, layer in enumerate(arch.layers):
        mixer = layer.mixer
        if mixer.num_attention_heads % mixer.num_key_value_heads:
            troubles.append(
                f"layer {index}: {mixer.num_attention_heads} heads cannot share {mixer.num_key_value_heads} "
                "key-value heads evenly"
            )
        if mixer.rope.rotary_dim % 2 or not 0 < mixer.rope.rotary_dim <= mixer.head_dim:
            troubles.append(f"layer {index}: rotary_dim {mixer.rope.rotary_dim} of head_dim {mixer.head_dim}")
        if mixer.window is not None and mixer.window < 1:
            troubles.append(f"layer {index}: a window of {mixer.window}")
    if not arch.rms_norm_eps > 0:
        troubles.append(f"rms_norm_eps {arch.rms_norm_eps} is not above 0")
    if troubles:
        raise ConfigError(
            f"the sizes of this {arch.family} model do not fit together",
            why="; ".join(troubles[:4]),
            fix="check config.json against the one that the model's authors published",
        )
    return arch
