"""The weights of the inference decoder: packed linears, plain norms and embedding, updated in place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError
from ..model.weights import is_finite

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from ..model.arch import Arch
    from ..model.weights import Rule, WeightMap
    from ..ops.fused import PackedLinear

LINEARS = tuple(
    f".{name}.weight"
    for name in (
        "attn.qkv", "attn.out", "attn.q", "attn.q_a", "attn.q_b", "attn.kv_a",
        "linear_attn.qkvz", "linear_attn.ba", "linear_attn.out",
        "mlp.gate_up", "mlp.down", "mlp.shared.gate_up", "mlp.shared.down",
    )
)  # fmt: skip
"""Endings of the weights that only ever multiply rows, and may be kept in the device's own layout."""
ROUTER = ".mlp.router.weight"
HEAD = "lm_head"


def following_norm(arch: Arch, index: int) -> str:
    """Name of the norm after a layer: the next layer's first, or the final one."""
    return f"layers.{index + 1}.attn_norm.weight" if index + 1 < len(arch.layers) else "norm.weight"


class DecoderWeights:
    """Weights by neutral name, linears without their ".weight".

    A load goes through one buffer of the size of one layer's largest matrix; there is never a second copy
    of the model, except that a tied head is packed beside the embedding where packing makes a copy.
    """

    def __init__(
        self,
        weight_map: WeightMap,
        packed: type[PackedLinear],
        *,
        tied: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._map = weight_map
        self._packed = packed
        self._tied = tied
        self._device = device
        self._dtype = dtype
        self._rules = {rule.neutral: rule for rule in weight_map.rules}
        self.plain: dict[str, Tensor] = {}
        self.linears: dict[str, PackedLinear] = {}

    @property
    def loaded(self) -> bool:
        return bool(self.plain)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take every weight by its checkpoint name, cast to the engine's dtype.

        Raises `CheckpointError` that lists missing, unknown, repeated and misshaped names, values that are
        not finite and a tied weight that differs from its source; nothing has changed then.
        """
        given = checked(self._map, tensors)
        for rule in self._rules.values():
            name, _, kind = rule.neutral.rpartition(".")
            if kind == "bias" and f"{name}.weight".endswith(LINEARS):
                continue
            if rule.neutral.endswith(LINEARS) or name == HEAD:
                bias = self._rules.get(f"{name}.bias")
                self._take(name, self._fill(rule, given), None if bias is None else self._fill(bias, given))
            else:
                self._keep(rule, given)
        if self._tied:
            self._take(HEAD, self.plain["embed.weight"], None)

    def _fill(self, rule: Rule, given: Mapping[str, Tensor]) -> Tensor:
        dtype = torch.float32 if rule.float32 else self._dtype
        buffer = torch.empty(rule.shape, device=self._device, dtype=dtype)
        rule.fill(given, buffer)
        return buffer

    def _keep(self, rule: Rule, given: Mapping[str, Tensor]) -> None:
        held = self.plain.get(rule.neutral)
        if rule.neutral.endswith(ROUTER):
            # Rounded as in the trainer, then kept as its logits are computed: no cast in every step.
            rounded = self._fill(rule, given).float()
            self.plain[rule.neutral] = rounded if held is None else held.copy_(rounded)
        elif held is None:
            self.plain[rule.neutral] = self._fill(rule, given)
        else:
            rule.fill(given, held)

    def _take(self, name: str, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        linear = self.linears.get(name)
        if linear is None:
            self.linears[name] = self._packed(weight_NK, bias_N)
        else:
            linear.update(weight_NK, bias_N)

    def drop(self) -> None:
        """Forget every weight."""
        self.plain.clear()
        self.linears.clear()

    def nbytes(self) -> int:
        """Bytes held, a tied head counted once where it is not packed."""
        total = sum(tensor.nbytes for tensor in self.plain.values())
        for name, linear in self.linears.items():
            own = linear.nbytes()
            if own == 0 and f"{name}.weight" in self._rules:
                # It works on the very tensor that it was given.
                own = math.prod(self._rules[f"{name}.weight"].shape) * self._dtype.itemsize
            total += own
        return total


def checked(weight_map: WeightMap, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors by name when every one is there, fits and can be a weight."""
    pairs = list(tensors)
    weight_map.check((name, tuple(tensor.shape)) for name, tensor in pairs)
    given = {
        name: tensor
        for name, tensor in pairs
        if not name.endswith(weight_map.ignored) and name not in weight_map.kept
    }
    bad = [name for name, tensor in given.items() if not (tensor.is_floating_point() and is_finite(tensor))]
    unequal = [
        f"{copy} is not {source}"
        for copy, source in weight_map.tied.items()
        if copy in given and source in given and not torch.equal(given[copy], given[source])
    ]
    if bad or unequal:
        raise CheckpointError(
            f"{len(bad) + len(unequal)} weights cannot be taken by the rollout engine",
            why="; ".join(
                part
                for part in (
                    f"not floating point or not finite: {', '.join(bad[:6])}" if bad else "",
                    f"tied by config.json but different: {', '.join(unequal)}" if unequal else "",
                )
                if part
            ),
            fix="look at the last update (loss, gradient norm) or at the checkpoint that it comes from",
        )
    return given
