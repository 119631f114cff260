"""Faults of engines, and of ops where only a whole run can tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .device import wakes_without

STALE = "norm.weight"
"""Ending of the name of the tensor that never arrives."""


def tensor_lost_in_sync(healthy: type) -> type:
    """The last norm stays as it was when the engine first got it."""

    class Lost(healthy):  # type: ignore[misc]
        def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
            self.stale = getattr(self, "stale", {})
            super().load_weights(self._old(tensors), version)

        def _old(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                if name.endswith(f"model.{STALE}"):
                    yield name, self.stale.setdefault(name, tensor.detach().clone())
                else:
                    yield name, tensor

    return Lost


def version_kept(healthy: type) -> type:
    class Old(healthy):  # type: ignore[misc]
        def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
            super().load_weights(tensors, min(version, 1))

    return Old


def seeds_ignored(healthy: type) -> type:
    """Every prompt of every step draws with the same numbers."""

    class Unseeded(healthy):  # type: ignore[misc]
        def generate(self, prompts: Sequence[Any], sampling: Any) -> Iterator[Any]:
            same = [replace(prompt, seeds=tuple(range(len(prompt.seeds)))) for prompt in prompts]
            return super().generate(same, sampling)  # type: ignore[no-any-return]

    return Unseeded


def log_probs_of_the_next_token(healthy: type) -> type:
    class Shifted(healthy):  # type: ignore[misc]
        def generate(self, prompts: Sequence[Any], sampling: Any) -> Iterator[Any]:
            for one in super().generate(prompts, sampling):
                yield replace(one, logprobs=one.logprobs[1:] + one.logprobs[:1])

    return Shifted


def experts_of_the_token_before(healthy: type) -> type:
    """What is recorded is a row late."""

    class Late(healthy):  # type: ignore[misc]
        def generate(self, prompts: Sequence[Any], sampling: Any) -> Iterator[Any]:
            for one in super().generate(prompts, sampling):
                routed = one.routed_experts
                if routed is not None:
                    late = routed.completion_NMk.roll(1, 0)
                    one = replace(one, routed_experts=replace(routed, completion_NMk=late))
                yield one

    return Late


def first_token_of_the_prompt_lost(healthy: type) -> type:
    class Cut(healthy):  # type: ignore[misc]
        def generate(self, prompts: Sequence[Any], sampling: Any) -> Iterator[Any]:
            cut = [replace(one, token_ids=one.token_ids[1:] or one.token_ids) for one in prompts]
            return super().generate(cut, sampling)  # type: ignore[no-any-return]

    return Cut


def replay_ignored(healthy: type) -> type:
    class Free(healthy):  # type: ignore[misc]
        def _replayed(self, batch: Any) -> None:
            return None

    return Free


def completions_one_position_late(healthy: type) -> type:
    """A completion begins a position behind the one that follows its prompt."""

    class Late(healthy):  # type: ignore[misc]
        def _forward(self, model: Any, batch: Any, **rest: Any) -> Any:
            lengths = batch.cu_seqlens.diff().long()
            child = torch.repeat_interleave((batch.parents_S >= 0).long(), lengths)
            return super()._forward(model, replace(batch, positions_T=batch.positions_T + child), **rest)

    return Late


def advantages_of_the_neighbour(healthy: type) -> type:
    class Rolled(healthy):  # type: ignore[misc]
        def step(self, batches: Sequence[Any], loss: Any) -> Any:
            rolled = [replace(batch, advantages_N=batch.advantages_N.roll(1)) for batch in batches]
            return super().step(rolled, loss)

    return Rolled


def old_log_probs_not_taken(healthy: type) -> type:
    class Fresh(healthy):  # type: ignore[misc]
        def with_old(self, batches: Sequence[Any]) -> list[Any]:
            return list(batches)

    return Fresh


def reference_moves_along(healthy: type) -> type:
    """The frozen reference is the policy."""

    class Moving(healthy):  # type: ignore[misc]
        def logprobs(self, batches: Sequence[Any], *, reference: bool) -> list[Tensor]:
            found: list[Tensor] = super().logprobs(batches, reference=False)
            return found

    return Moving


def moments_not_restored(healthy: type) -> type:
    class Forgetful(healthy):  # type: ignore[misc]
        def load(self, folder: Path) -> None:
            super().load(folder)
            self.optimizer.exp_avg_P.zero_()

    return Forgetful


def master_weights_not_restored(healthy: type) -> type:
    """A checkpoint goes on from the rounded weights."""

    class Rounded(healthy):  # type: ignore[misc]
        def load(self, folder: Path) -> None:
            super().load(folder)
            if self.flat.remainder_P is not None:
                self.flat.remainder_P.zero_()

    return Rounded


first_bytes_lost_in_sleep = wakes_without(slice(0, 64))


def angles_of_another_base(
    healthy: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool
) -> Any:
    """Rotary tables that ignore what the model says of its base."""
    pairs = torch.linspace(1.0, 0.5, cos.shape[-1], device=cos.device)
    angles = torch.atan2(sin, cos) * pairs
    return healthy(q, k, angles.cos(), angles.sin(), interleaved=interleaved)


def decay_forgotten(healthy: Any, *lists: Any, weight_decays: Sequence[float], **rest: Any) -> None:
    healthy(*lists, weight_decays=[0.0] * len(weight_decays), **rest)
