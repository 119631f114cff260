"""attention.cache in torch: a pool of token rows for each key/value head, prompts shared by their forks.

Pools are [K * R, D], so that one gather yields [K, B, L, D], the batch of a product, without another copy.
Index tensors are made once for a step and serve all layers: they are kept until slots or lengths change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.reference.slots import SlotCache
from grpo_core.ops.reference.tokens import TokenTable


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Where the keys of B sequences lie: those of their own, and those of N prefixes that they share."""

    own_rows: Tensor
    """int64 [K * B * S] pool rows."""
    prefix_rows: Tensor
    """int64 [K * N * P] pool rows."""
    members: Tensor
    """int64 [N * M] sequences of each prefix, padded with the first."""
    member_at: Tensor
    """int64 [B] place of each sequence among the members."""
    length_B: Tensor
    """int64 keys of each sequence."""
    prefix_B: Tensor
    """int64 how many of them are shared."""
    positions: Tensor
    """int64 [B, P + S] of all keys."""
    there: Tensor
    """bool [B, P + S]; which keys a sequence has."""
    N: int
    M: int
    P: int
    S: int

    def hidden(self, window: int | None) -> Tensor:
        """bool [B, P + S]: which keys are not there or not within the window."""
        if window is None:
            return ~self.there
        return ~self.there | (self.length_B[:, None] - 1 - self.positions >= window)


def _keys(prefix_B: Tensor, length_B: Tensor, P: int, S: int) -> tuple[Tensor, Tensor]:
    """(positions, there) of a plan."""
    position_BP = torch.arange(P).expand(length_B.numel(), P)
    position_BS = prefix_B[:, None] + torch.arange(S)
    shared_B = torch.minimum(prefix_B, length_B)
    there = torch.cat([position_BP < shared_B[:, None], position_BS < length_B[:, None]], 1)
    return torch.cat([position_BP, position_BS], 1), there


class SharedTable(TokenTable):
    """A token table that also knows which prefix a slot shares, and plans the gathers of a step."""

    def __init__(self, max_slots: int, max_tokens: int, device: torch.device, heads: int) -> None:
        self.heads = heads
        self.prefixes: dict[int, tuple[int, int]] = {}
        """Slot -> (serial of the shared prefix, its tokens)."""
        self.serials: dict[tuple[int, int], int] = {}
        self.opened: list[int] = [0] * max_slots
        """How often each slot number was given out: tells a slot from an earlier one of the same number."""
        self._writing: tuple[Tensor, Tensor, Tensor] | None = None
        self._decoding: tuple[Tensor, Tensor, DecodePlan] | None = None
        super().__init__(max_slots, max_tokens, device)

    def open(self, length: int, *, parent: int | None, prefix: int) -> int | None:
        """See `TokenTable.open`."""
        slot = super().open(length, parent=parent, prefix=prefix)
        if slot is not None:
            self.opened[slot] += 1
            origin = slot if parent is None else parent
            self.prefixes[slot] = (self._serial(origin, self.opened[origin]), prefix)
            self.forget()
        return slot

    def free(self, slot: int) -> None:
        """See `TokenTable.free`."""
        super().free(slot)
        self.forget()

    def reset(self) -> None:
        """See `TokenTable.reset`."""
        super().reset()
        self.prefixes.clear()
        self.serials.clear()
        self.forget()

    def forget(self) -> None:
        """Drop the plans: the same slot numbers may mean other rows now."""
        self._writing = self._decoding = None

    def _serial(self, slot: int, times: int) -> int:
        return self.serials.setdefault((slot, times), len(self.serials))

    def pool_rows(self, rows: Tensor) -> Tensor:
        """Rows of the table as rows of all heads' pools, int64 [K * numel]."""
        return (rows.reshape(1, -1) + self.max_tokens * torch.arange(self.heads)[:, None]).reshape(-1)

    def write_rows(self, slots_T: Tensor, positions_T: Tensor) -> Tensor:
        """Pool rows of tokens, made once for all layers."""
        kept = self._writing
        if kept is None or not (_same(kept[0], slots_T) and _same(kept[1], positions_T)):
            rows = self.pool_rows(self.rows(slots_T, positions_T))
            kept = self._writing = (slots_T.clone(), positions_T.clone(), rows)
        return kept[2]

    def decode_plan(self, slots: Tensor, seqlens_k: Tensor) -> DecodePlan:
        """The gathers of a step, made once for all layers."""
        kept = self._decoding
        if kept is None or not (_same(kept[0], slots) and _same(kept[1], seqlens_k)):
            kept = self._decoding = (slots.clone(), seqlens_k.clone(), self._plan(slots, seqlens_k.long()))
        return kept[2]

    def _plan(self, slots: Tensor, length_B: Tensor) -> DecodePlan:
        numbers = slots.tolist()
        shared = [self.prefixes[number] for number in numbers]
        families: dict[tuple[int, int], list[int]] = {}
        for index, key in enumerate(shared):
            families.setdefault(key, []).append(index)
        groups = [family for key, family in families.items() if key[1] > 0]
        N, M = len(groups), max((len(group) for group in groups), default=0)
        prefix_B = torch.tensor([tokens for _, tokens in shared])
        P = int(prefix_B.max()) if numbers else 0
        S = max(0, int((length_B - prefix_B).max())) if numbers else 0
        members, member_at = (
            torch.zeros(N, M, dtype=torch.int64),
            torch.zeros(len(numbers), dtype=torch.int64),
        )
        for at, group in enumerate(groups):
            members[at] = group[0]
            members[at, : len(group)] = torch.tensor(group)
            member_at[group] = at * M + torch.arange(len(group))
        # A key that is not there is masked; the last one that is stands in for it.
        at_BS = torch.minimum(prefix_B[:, None] + torch.arange(S), length_B[:, None] - 1)
        ends_N1 = torch.tensor([shared[group[0]][1] - 1 for group in groups], dtype=torch.int64)[:, None]
        at_NP = torch.minimum(torch.arange(P), ends_N1)
        first = torch.tensor([numbers[group[0]] for group in groups], dtype=torch.int64)
        positions, there = _keys(prefix_B, length_B, P if N else 0, S)
        return DecodePlan(
            own_rows=self.pool_rows(self.table_SL[slots[:, None], at_BS]),
            prefix_rows=self.pool_rows(self.table_SL[first[:, None], at_NP] if N else first),
            members=members.reshape(-1), member_at=member_at, length_B=length_B, prefix_B=prefix_B,
            positions=positions, there=there, N=N, M=M, P=P if N else 0, S=S,
        )  # fmt: skip


def _same(kept: Tensor, new: Tensor) -> bool:
    return kept.shape == new.shape and torch.equal(kept, new)


class SharedLayer:
    """One layer of `SharedCache`."""

    __slots__ = ("k_RD", "table", "v_RE")

    def __init__(self, table: SharedTable) -> None:
        self.table = table
        self.hold([torch.empty(0), torch.empty(0)])

    def hold(self, pools: Sequence[Tensor]) -> None:
        """Use these pools for the keys and the values."""
        self.k_RD, self.v_RE = pools

    def write(self, k_TKD: Tensor, v_TKE: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """See `LayerCache.write`. Raises IndexError for a position that its slot has no room for."""
        rows = self.table.write_rows(slots_T, positions_T)
        self.k_RD[rows] = k_TKD.transpose(0, 1).reshape(-1, k_TKD.shape[2]).to(self.k_RD.dtype)
        self.v_RE[rows] = v_TKE.transpose(0, 1).reshape(-1, v_TKE.shape[2]).to(self.v_RE.dtype)


class SharedCache(SlotCache[SharedTable, SharedLayer]):
    """See `grpo_core.ops.attention.KVCache`."""

    def __init__(self, spec: CacheSpec) -> None:
        table = SharedTable(spec.max_slots, spec.max_tokens, spec.device, spec.num_key_value_heads)
        rows = spec.max_tokens * spec.num_key_value_heads
        layers = [SharedLayer(table) for _ in range(spec.num_layers)]
        super().__init__(spec, table, layers, ((rows, spec.head_dim), (rows, spec.v_head_dim)))
