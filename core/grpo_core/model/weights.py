"""The frozen, invertible table between a model's neutral parameter names and a checkpoint's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import CheckpointError
from .arch import Arch

SHOWN = 6
"""Names listed for one kind of trouble before the rest is only counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One neutral parameter as the rows of one or more checkpoint tensors, stacked in order."""

    neutral: str
    parts: tuple[tuple[str, int], ...]
    """(checkpoint name, rows) from the first row on."""
    tail: tuple[int, ...]
    """Sizes after the first dimension."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the neutral parameter."""
        return (sum(rows for _, rows in self.parts), *self.tail)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMap:
    """Rules of one model; built afresh for every instance.

    Loading copies into given parameters one tensor at a time, so that it needs no second copy of the model;
    exporting yields views.
    """

    rules: tuple[Rule, ...]
    tied: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Checkpoint name that may be stored a second time -> the name whose equal it must be."""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of names that hold no weights: old Llama checkpoints keep their rotary frequencies."""

    def hf_names(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that a checkpoint must hold, tied ones once."""
        return {name: (rows, *rule.tail) for rule in self.rules for name, rows in rule.parts}

    def neutral_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the decoder."""
        return {rule.neutral: rule.shape for rule in self.rules}

    def check(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Hold (name, shape) pairs against the table without any data.

        Raises `CheckpointError` that lists all missing, unknown, repeated and misshaped names.
        """
        report = _Report(self)
        for name, shape in shapes:
            report.place(name, shape)
        report.close()

    def load(self, tensors: Iterable[tuple[str, Tensor]], into: Mapping[str, Tensor]) -> None:
        """Copy checkpoint tensors into `into` (neutral name -> parameter), cast to its dtype.

        Streams: each tensor is dropped before the next is asked for, in whatever order they come. Raises
        `CheckpointError` after the last one, listing all that is missing, unknown, repeated, misshaped, not
        of a floating dtype, not finite, or unequal to the weight it is tied to; call `check` first where
        nothing may be changed for names and shapes.
        """
        report = _Report(self)
        places = {
            part: (rule.neutral, start, rows)
            for rule in self.rules
            for part, start, rows in _with_starts(rule.parts)
        }
        waiting: dict[str, Tensor] = {}
        for name, tensor in tensors:
            if not report.place(name, tuple(tensor.shape)) or not report.sound(name, tensor):
                continue
            if name in self.tied:
                waiting[name] = tensor
                continue
            neutral, start, rows = places[name]
            _copy(tensor, into[neutral], start, rows)
        for name, tensor in waiting.items():
            neutral, start, rows = places[self.tied[name]]
            held = into[neutral].detach()[start : start + rows]
            if self.tied[name] in report.seen and not torch.equal(held, tensor.to(held.device, held.dtype)):
                report.add(f"unequal to {self.tied[name]}, to which config.json ties it", name)
        report.close()

    def export(self, neutral: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, tensor) of every weight, tied ones once: detached views of the parameters."""
        for rule in self.rules:
            parameter = neutral[rule.neutral].detach()
            for name, start, rows in _with_starts(rule.parts):
                yield name, parameter[start : start + rows]


def _with_starts(parts: tuple[tuple[str, int], ...]) -> Iterator[tuple[str, int, int]]:
    start = 0
    for name, rows in parts:
        yield name, start, rows
        start += rows


def _copy(tensor: Tensor, parameter: Tensor, start: int, rows: int) -> None:
    with torch.no_grad():
        parameter[start : start + rows].copy_(tensor)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; reads the tensor once and allocates nothing of its size."""
    # A sum is finite only if every element is; one that overflows is looked at element by element.
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


class _Report:
    """Collects what is wrong with a stream of named tensors, to tell it all at once."""

    def __init__(self, table: WeightMap) -> None:
        self.shapes = table.hf_names()
        self.tied, self.ignored = table.tied, table.ignored
        self.seen: set[str] = set()
        self.troubles: dict[str, list[str]] = {}

    def add(self, trouble: str, name: str) -> None:
        self.troubles.setdefault(trouble, []).append(name)

    def place(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor belongs somewhere and fits there."""
        if name.endswith(self.ignored):
            return False
        wanted = self.shapes.get(self.tied.get(name, name))
        if wanted is None:
            self.add("unknown to the model", name)
            return False
        if name in self.seen:
            self.add("given twice", name)
            return False
        self.seen.add(name)
        if tuple(shape) != wanted:
            self.add("of another shape", f"{name} {list(shape)} instead of {list(wanted)}")
            return False
        return True

    def sound(self, name: str, tensor: Tensor) -> bool:
        """Whether the values can be weights."""
        if not tensor.is_floating_point():
            self.add("not of a floating dtype (a quantised checkpoint?)", f"{name} {tensor.dtype}")
            return False
        if not is_finite(tensor):
            self.add("holding NaN or infinity", name)
            return False
        return True

    def close(self) -> None:
        missing = [name for name in self.shapes if name not in self.seen]
        if missing:
            self.troubles = {"missing": missing, **self.troubles}
        if not self.troubles:
            return
        counted = sum(len(names) for names in self.troubles.values())
        raise CheckpointError(
            f"the weights do not fit the model: {counted} {'name' if counted == 1 else 'names'}",
            why="; ".join(f"{trouble}: {_listed(names)}" for trouble, names in self.troubles.items()),
            fix="check that config.json and the weights belong together and that the download is complete",
        )


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def dense_weight_map(arch: Arch) -> WeightMap:
    """The table of a dense decoder that stores its weights as Llama does (Qwen2 and Qwen3 among others)."""
    hidden, vocab = arch.hidden_size, arch.vocab_size
    rules = [_one("embed.weight", "model.embed_tokens.weight", vocab, hidden)]
    for index in range(len(arch.layers)):
        rules += _layer_rules(arch, index)
    rules.append(_one("norm.weight", "model.norm.weight", hidden))
    if arch.tie_word_embeddings:
        return WeightMap(
            rules=tuple(rules), tied=MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"})
        )
    return WeightMap(rules=(*rules, _one("lm_head.weight", "lm_head.weight", vocab, hidden)))


def _one(neutral: str, hf: str, rows: int, *tail: int) -> Rule:
    return Rule(neutral=neutral, parts=((hf, rows),), tail=tail)


def _layer_rules(arch: Arch, index: int) -> Iterator[Rule]:
    mixer, ffn, hidden = arch.layers[index].mixer, arch.layers[index].ffn, arch.hidden_size
    own, hf = f"layers.{index}.", f"model.layers.{index}."
    q_rows, kv_rows = (n * mixer.head_dim for n in (mixer.num_attention_heads, mixer.num_key_value_heads))
    qkv = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
    gate_up = (("gate_proj", ffn.intermediate_size), ("up_proj", ffn.intermediate_size))
    yield _one(own + "attn_norm.weight", hf + "input_layernorm.weight", hidden)
    yield from _linear(own + "attn.qkv", hf + "self_attn.", qkv, hidden, mixer.qkv_bias)
    if mixer.qk_norm:
        yield _one(own + "attn.q_norm.weight", hf + "self_attn.q_norm.weight", mixer.head_dim)
        yield _one(own + "attn.k_norm.weight", hf + "self_attn.k_norm.weight", mixer.head_dim)
    yield from _linear(own + "attn.out", hf + "self_attn.", (("o_proj", hidden),), q_rows, mixer.out_bias)
    yield _one(own + "mlp_norm.weight", hf + "post_attention_layernorm.weight", hidden)
    yield from _linear(own + "mlp.gate_up", hf + "mlp.", gate_up, hidden, ffn.bias)
    yield from _linear(
        own + "mlp.down", hf + "mlp.", (("down_proj", hidden),), ffn.intermediate_size, ffn.bias
    )


def _linear(
    neutral: str, prefix: str, parts: tuple[tuple[str, int], ...], columns: int, bias: bool
) -> Iterator[Rule]:
    for kind, tail in (("weight", (columns,)), ("bias", ())) if bias else (("weight", (columns,)),):
        named = tuple((f"{prefix}{part}.{kind}", rows) for part, rows in parts)
        yield Rule(neutral=f"{neutral}.{kind}", parts=named, tail=tail)
