"""Recurrent states of the running sequences, beside the slots of a token cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..model.arch import GatedDelta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..model.arch import Arch


class LayerState(NamedTuple):
    """One gated delta layer's part of the states: N rows."""

    delta_NKDE: Tensor
    """float32"""
    window_NCW: Tensor
    """The last inputs of the convolution, oldest first, in the compute dtype: [N, C, width - 1]."""


def state_shapes(spec: GatedDelta) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Shapes of one sequence's state and window in one layer: [K, D, E] and [C, width - 1]."""
    keys, values = spec.num_key_heads * spec.key_head_dim, spec.num_value_heads * spec.value_head_dim
    return (
        (spec.num_value_heads, spec.key_head_dim, spec.value_head_dim),
        (2 * keys + values, spec.conv_kernel - 1),
    )


def state_bytes(arch: Arch, itemsize: int) -> int:
    """Bytes of one sequence's states over all layers; `itemsize` is that of the compute dtype."""
    total = 0
    for layer in arch.layers:
        if isinstance(layer.mixer, GatedDelta):
            (K, D, E), (C, W) = state_shapes(layer.mixer)
            total += K * D * E * 4 + C * W * itemsize
    return total


class States:
    """The states of `rows` sequences; layers of one shape lie in one tensor, so that a row moves at once."""

    def __init__(self, arch: Arch, *, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self._dtype = dtype
        self._device = device
        self._mixers = [
            (index, layer.mixer)
            for index, layer in enumerate(arch.layers)
            if isinstance(layer.mixer, GatedDelta)
        ]
        self._stacks: dict[GatedDelta, tuple[Tensor, Tensor]] = {}
        self.layers: dict[int, LayerState] = {}
        """By the layer's index in the model; new tensors after `restore`."""
        self.restore()

    def restore(self) -> None:
        """Take the storage where it is not held."""
        if self._stacks:
            return
        groups: dict[GatedDelta, list[int]] = {}
        for index, mixer in self._mixers:
            groups.setdefault(mixer, []).append(index)
        for mixer, indices in groups.items():
            delta, window = state_shapes(mixer)
            shape = (len(indices), self.rows)
            stack = (
                torch.zeros(*shape, *delta, dtype=torch.float32, device=self._device),
                torch.zeros(*shape, *window, dtype=self._dtype, device=self._device),
            )
            self._stacks[mixer] = stack
            for place, index in enumerate(indices):
                self.layers[index] = LayerState(stack[0][place], stack[1][place])

    def release(self) -> None:
        """Drop the storage."""
        self._stacks.clear()
        self.layers = {}

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for stack in self._stacks.values() for tensor in stack)

    def clear(self, row: int) -> None:
        """Start a row at zero."""
        for stack in self._stacks.values():
            for tensor in stack:
                tensor[:, row].zero_()

    def copy(self, source: int, target: int) -> None:
        """Let one row go on where another one stands."""
        for stack in self._stacks.values():
            for tensor in stack:
                tensor[:, target].copy_(tensor[:, source])


class StatefulCache:
    """A token cache whose every slot also owns a row of states; the life cycle is that of `KVCache`.

    A freed parent keeps its slot while children live, but gives its row back at once: children have copies.
    """

    def __init__(self, tokens: Any, states: States, *, max_slots: int, device: torch.device) -> None:
        self.tokens = tokens
        self.states = states
        self.row_of = torch.zeros(max_slots, dtype=torch.int64, device=device)
        """Row of each slot that is alive."""
        self._rows: dict[int, int] = {}
        self._free: list[int] = []
        self.reset()

    @property
    def layers(self) -> Sequence[Any]:
        """Of the token cache."""
        layers: Sequence[Any] = self.tokens.layers
        return layers

    def allocate(self, length: int) -> int | None:
        """See `KVCache.allocate`; the state starts at zero."""
        slot: int | None = self.tokens.allocate(length) if self._free else None
        if slot is not None:
            self.states.clear(self._take(slot))
        return slot

    def fork(self, slot: int, *, prefix: int, length: int) -> int | None:
        """See `KVCache.fork`; the child gets a copy of the parent's state, which stands at `prefix`."""
        child: int | None = self.tokens.fork(slot, prefix=prefix, length=length) if self._free else None
        if child is not None:
            self.states.copy(self._rows[slot], self._take(child))
        return child

    def _take(self, slot: int) -> int:
        row = self._rows[slot] = self._free.pop()
        self.row_of[slot] = row
        return row

    def free(self, slot: int) -> None:
        """See `KVCache.free`."""
        self.tokens.free(slot)
        self._free.append(self._rows.pop(slot))

    def reset(self) -> None:
        """See `KVCache.reset`."""
        self.tokens.reset()
        self._rows.clear()
        self._free = list(range(self.states.rows - 1, -1, -1))

    def nbytes(self) -> int:
        """Bytes of tokens and states."""
        return int(self.tokens.nbytes()) + self.states.nbytes()

    def release(self) -> None:
        """See `KVCache.release`."""
        self.tokens.release()
        self.states.release()

    def restore(self) -> None:
        """See `KVCache.restore`."""
        self.tokens.restore()
        self.states.restore()


class SlotCounter:
    """The slots of a model that caches no tokens: every layer is recurrent."""

    layers: Sequence[Any] = ()

    def __init__(self, max_slots: int) -> None:
        self._max_slots = max_slots
        self._free: list[int] = []
        self.reset()

    def allocate(self, length: int) -> int | None:
        """A free slot, whatever the length."""
        return self._free.pop() if self._free else None

    def fork(self, slot: int, *, prefix: int, length: int) -> int | None:
        """A free slot; nothing is shared."""
        return self.allocate(length)

    def free(self, slot: int) -> None:
        """Give the slot back."""
        self._free.append(slot)

    def reset(self) -> None:
        """Free every slot."""
        self._free = list(range(self._max_slots - 1, -1, -1))

    def nbytes(self) -> int:
        """None."""
        return 0

    def release(self) -> None:
        """Nothing is held."""

    def restore(self) -> None:
        """Nothing is held."""
