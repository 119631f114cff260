"""Faults of a device and of its memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from grpo_core.devices.base import Probe
from grpo_core.devices.torch_device import TorchDevice

from ..mutant import NAME

PAGE_BYTES = 2 << 20


def _as(kind: type, healthy: TorchDevice, **changed: Any) -> Any:
    facts = {field.name: getattr(healthy, field.name) for field in dataclasses.fields(TorchDevice)}
    return kind(**{**facts, "name": NAME, **changed})


class _Unseeded(TorchDevice):
    def seed(self, seed: int) -> None:
        """Leaves the device's own generators as they are."""


class _Unsaved(TorchDevice):
    def set_rng_state(self, state: Tensor) -> None:
        """Does not restore anything."""


class _HostState(TorchDevice):
    def rng_state(self) -> Tensor:
        """The host's."""
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        """The host's."""
        torch.set_rng_state(state)


class _Hasty(TorchDevice):
    def synchronize(self) -> None:
        """Waits for nothing."""


class _OnlyFirst(TorchDevice):
    def open(self, index: int) -> torch.device:
        """Whatever is asked for, the first one is opened."""
        return super().open(0)


class _Restless(TorchDevice):
    def probe(self) -> Probe:
        """Its figures are of the moment."""
        found = super().probe()
        now = time.monotonic_ns()
        return dataclasses.replace(found, info=dataclasses.replace(found.info, memory_bytes=now))


def seed_ignored(healthy: TorchDevice) -> Any:
    return _as(_Unseeded, healthy)


def state_not_restored(healthy: TorchDevice) -> Any:
    return _as(_Unsaved, healthy)


def state_of_the_host(healthy: TorchDevice) -> Any:
    return _as(_HostState, healthy)


def synchronises_nothing(healthy: TorchDevice) -> Any:
    return _as(_Hasty, healthy)


def opens_any_index(healthy: TorchDevice) -> Any:
    return _as(_OnlyFirst, healthy)


def probe_of_the_moment(healthy: TorchDevice) -> Any:
    return _as(_Restless, healthy)


def dtype_that_is_not_there(healthy: TorchDevice) -> Any:
    return _as(TorchDevice, healthy, dtypes=healthy.dtypes | {"float64"})


def wakes_without(lost: slice | Callable[[Tensor], slice]) -> Callable[[type], type]:
    """An allocator or engine whose storages wake with some of their bytes zero."""

    def faulty(healthy: type) -> type:
        class Lossy(healthy):  # type: ignore[misc]
            def wake(self, *tags: str) -> None:
                asleep = [tag for tag in tags if tag in self.tags.asleep]
                super().wake(*tags)
                for tag in asleep:
                    for row in self.tags.held[tag]:
                        row.bytes_view()[lost if isinstance(lost, slice) else lost(row.bytes_view())].zero_()

        return Lossy

    return faulty


page_lost_in_sleep = wakes_without(slice(PAGE_BYTES, 2 * PAGE_BYTES))
"""The second page of every storage wakes empty."""
last_element_lost = wakes_without(lambda held: slice(held.numel() // 8 * 8, None))
"""Sizes are rounded down to eight bytes on the way to the host."""


def sleep_frees_nothing(healthy: type) -> type:
    class Awake(healthy):  # type: ignore[misc]
        def sleep(self, *tags: str, keep: Any) -> None:
            """Keeps every storage."""

        def wake(self, *tags: str) -> None:
            """Nothing sleeps."""

    return Awake


def wakes_with_other_tensors(healthy: type) -> type:
    """What "none" gives up comes back with whatever lay there."""

    class Dirty(healthy):  # type: ignore[misc]
        def wake(self, *tags: str) -> None:
            empty = [tag for tag in tags if self.tags.asleep.get(tag) == "none"]
            super().wake(*tags)
            for tag in empty:
                for row in self.tags.held[tag]:
                    row.bytes_view().fill_(1)

    return Dirty


def all_tags_sleep(healthy: type) -> type:
    class Drowsy(healthy):  # type: ignore[misc]
        def sleep(self, *tags: str, keep: Any) -> None:
            for tag in tags:
                self.tags._rows(tag)
            super().sleep(*self.tags.held, keep=keep)

        def wake(self, *tags: str) -> None:
            super().wake(*tags)

    return Drowsy


def counts_views_twice(healthy: type) -> type:
    class Twice(healthy):  # type: ignore[misc]
        def hold(self, tag: str, tensors: Iterable[Tensor]) -> None:
            self.extra = getattr(self, "extra", {})
            kept = list(tensors)
            super().hold(tag, kept)
            self.extra[tag] = self.extra.get(tag, 0) + sum(x.nbytes for x in kept)

        def stats(self) -> Any:
            return dataclasses.replace(super().stats(), by_tag=dict(getattr(self, "extra", {})))

    return Twice


def unknown_tags_pass(healthy: type) -> type:
    class Lenient(healthy):  # type: ignore[misc]
        def wake(self, *tags: str) -> None:
            super().wake(*(tag for tag in tags if tag in self.tags.held))

    return Lenient


def rounds_are_kept(healthy: type) -> type:
    """A copy on the device for every sleep."""

    class Kept(healthy):  # type: ignore[misc]
        def sleep(self, *tags: str, keep: Any) -> None:
            self.kept = getattr(self, "kept", [])
            self.kept += [row.bytes_view()[: 1 << 16].clone() for tag in tags for row in self.tags._rows(tag)]
            super().sleep(*tags, keep=keep)

    return Kept
