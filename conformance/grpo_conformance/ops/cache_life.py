"""The life of a cache: sequences come, fork, grow and go, and are read on the way."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .buffers import damage, guard_all
from .cache_kits import Heads, Kit, Stepped
from .question import normal, of_draw, seeded

READ = 1
"""The layer that is read; the other one holds the same numbers with the other sign."""


class Broken(Exception):
    """A promise of the contract that is not about numbers."""


class Life:
    """A cache with its readers, and what each of its sequences should hold."""

    def __init__(
        self, kit: Kit, cache: Any, readers: Mapping[str, Callable[..., Tensor]], device: torch.device
    ) -> None:
        self.kit, self.cache, self.readers, self.device = kit, cache, readers, device
        self.generator = seeded(71)
        self.slots: dict[int, int] = {}
        self.rows: dict[int, Tensor] = {}
        self.sick: set[int] = set()
        self.got: dict[str, Tensor] = {}
        self.wanted: dict[str, Tensor] = {}

    def open(self, length: int) -> int:
        """A sequence with room for `length` tokens."""
        return self._adopt(self.cache.allocate(length), f"allocate({length})", self._none())

    def fork(self, parent: int, prefix: int, length: int) -> int:
        """A sequence that starts with the first tokens of another."""
        slot = self.cache.fork(self.slots[parent], prefix=prefix, length=length)
        return self._adopt(slot, f"fork(prefix={prefix}, length={length})", self.rows[parent][:prefix])

    def free(self, *sequences: int) -> None:
        """Give sequences back; their numbers here are not used again."""
        for one in sequences:
            self.cache.free(self.slots.pop(one))

    def write(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Append tokens to several sequences in one call for each layer."""
        rows = normal(self.generator, sum(counts), self.kit.width, dtype=self.kit.dtype)
        pairs = [(s, len(self.rows[s]) + i) for s, n in zip(sequences, counts, strict=True) for i in range(n)]
        at = 0
        for sequence, count in zip(sequences, counts, strict=True):
            new = rows[at : at + count]
            self.rows[sequence] = torch.cat([self.rows[sequence], new.double()])
            if sequence in self.sick:
                new.fill_(torch.nan)
            at += count
        slots = torch.tensor([self.slots[s] for s, _ in pairs], dtype=torch.int64)
        positions = torch.tensor([p for _, p in pairs], dtype=torch.int64)
        for layer, sign in ((1 - READ, -1), (READ, 1)):
            parts = self.kit.parts(sign * rows)
            given = {"first": parts[0], "second": parts[1], "slots": slots, "positions": positions}
            self._guarded("write", given, lambda x, layer=layer: self.cache.layers[layer].write(
                x["first"], x["second"], slots_T=x["slots"], positions_T=x["positions"]))  # fmt: skip

    def ask(
        self, sequences: Sequence[int], counts: Sequence[int] | None = None, window: int | None = None
    ) -> None:
        """Prefill with the last `counts` tokens of each, or decode with the last one, if that is offered."""
        op = self.readers.get("decode" if counts is None else "prefill")
        each = [1] * len(sequences) if counts is None else list(counts)
        q = normal(self.generator, sum(each), *self.kit.queries, dtype=self.kit.dtype)
        if op is None:
            return
        lengths = torch.tensor([len(self.rows[s]) for s in sequences])
        given = {"q": q, "seqlens_k": lengths, "slots": torch.tensor([self.slots[s] for s in sequences])}
        if counts is not None:
            ends = [sum(each[:i]) for i in range(len(each) + 1)]
            given["cu_seqlens_q"] = torch.tensor(ends, dtype=torch.int32)

        def read(x: Mapping[str, Tensor]) -> Tensor:
            rest = {name: x[name] for name in x if name != "q"}
            return self.kit.read(op, x["q"], self.cache.layers[READ], window, **rest)

        name = "decode" if counts is None else "prefill"
        o = self._guarded(name, given, read)
        self._compare(name, o, sequences, each, torch.split(q, each), window)

    def step(self, sequences: Sequence[int], window: int | None = None) -> None:
        """Append and read one token each in a single call."""
        assert isinstance(self.kit, Heads)
        kit = self.kit
        positions = [len(self.rows[s]) for s in sequences]
        drawn = Stepped.draw(kit, self.generator, positions, [self.slots[s] for s in sequences])
        rows, q = drawn.truth(kit)
        for sequence, row in zip(sequences, rows, strict=True):
            self.rows[sequence] = torch.cat([self.rows[sequence], row[None]])
        layer, op = self.cache.layers[READ], self.readers["step"]
        rest = drawn.rest(kit, window)
        o = self._guarded("step", drawn.tensors, lambda x: op(x["qkv_BW"], layer, **rest,
                          **{name: x[name] for name in x if name != "qkv_BW"}))  # fmt: skip
        heads = kit.queries[0]
        each = [1] * len(sequences)
        self._compare("step", o.unflatten(1, (heads, -1)), sequences, each, torch.split(q, each), window)

    def _guarded(self, what: str, given: Mapping[str, Tensor], call: Callable[..., Any]) -> Any:
        guarded = guard_all(given, self.device)
        with torch.no_grad():
            answer = call({name: one.tensor for name, one in guarded.items()})
        wrong = damage(guarded, ())
        if wrong:
            raise Broken(f"{what}: {wrong}")
        return answer

    def _compare(
        self, name: str, o: Tensor, sequences: Sequence[int], counts: Sequence[int],
        queries: Sequence[Tensor], window: int | None,
    ) -> None:  # fmt: skip
        """Keep what came and what should have come, but for sequences of NaN."""
        parts = torch.split(o.detach().cpu(), list(counts)) if len(o) == sum(counts) else None
        if parts is None:
            raise Broken(f"{name} gives {len(o)} rows for {sum(counts)} queries")
        well = [i for i, s in enumerate(sequences) if s not in self.sick]
        label = f"{name} {len(self.got)}, lengths {[len(self.rows[s]) for s in sequences]}, window {window}"
        self.got[label] = torch.cat([parts[i] for i in well])
        self.wanted[label] = torch.cat(
            [self.kit.expect(self.rows[sequences[i]], queries[i], window) for i in well]
        )

    def _none(self) -> Tensor:
        return torch.empty(0, self.kit.width, dtype=torch.float64)

    def _adopt(self, slot: int | None, what: str, rows: Tensor) -> int:
        if slot is None:
            raise Broken(f"{what} is refused although the cache has the room")
        if slot in self.slots.values():
            raise Broken(f"{what} gives slot {slot}, which is in use")
        number = len(self.rows)
        self.slots[number], self.rows[number] = slot, rows
        return number


def generation(life: Life, windows: Sequence[int | None]) -> None:
    """Prompts, forks, freed parents, forks of forks and shuffled batches, as an engine makes them."""
    shuffle = random.Random(of_draw(3))
    long, short, alone = life.open(7), life.open(5), life.open(12)
    life.write([long, short, alone], [7, 5, 3])
    for window in windows:
        life.ask([long, short, alone], [7, 5, 3], window)
        life.ask([alone, long, short], [1, 0, 2], window)
        life.ask([short, alone, long], None, window)
    children = [life.fork(long, 7, 8) for _ in range(3)]
    children += [life.fork(short, 4, 8) for _ in range(2)]
    children.append(life.fork(long, 6, 8))
    life.free(long)
    live, grandchild = [*children, alone], alone
    for step in range(6):
        shuffle.shuffle(live)
        batch = live[: shuffle.randint(2, len(live))] if step % 2 else list(live)
        life.write(batch, [1] * len(batch))
        for window in windows:
            life.ask(batch, None, window)
        if step == 2:
            grandchild = life.fork(children[0], len(life.rows[children[0]]), 6)
            live = [s for s in live if s not in children[:2]] + [grandchild]
            life.free(children[0], children[1])
    life.write([alone, grandchild], [2, 2])
    for window in windows:
        life.ask([grandchild, alone], [2, 2], window)


def slots_again(life: Life) -> None:
    """Freed rooms come back with other lengths and other parents; nothing of the old content is seen."""
    for length in (9, 3, 9, 5, 1):
        parent = life.open(length)
        life.write([parent], [length])
        life.ask([parent], [length])
        children = [life.fork(parent, length, 2) for _ in range(2)]
        life.write(children, [1, 1])
        life.ask(children)
        life.free(parent, *children)


def isolation(life: Life) -> None:
    """A sequence of NaN among others."""
    first, sick, last = life.open(6), life.open(9), life.open(4)
    life.sick.add(sick)
    life.write([first, sick, last], [6, 9, 4])
    life.ask([first, sick, last], [6, 9, 4])
    life.ask([last, sick, first])
    life.ask([first, last])


def length_one(life: Life) -> None:
    """One token alone, and again in a fork of nothing."""
    one = life.open(1)
    life.write([one], [1])
    life.ask([one], [1])
    life.ask([one])
    child = life.fork(one, 1, 1)
    life.write([child], [1])
    life.ask([child], [1])
    life.ask([child])


def long_sequences(life: Life) -> None:
    """Whole prompts, then many and few new tokens after prefixes, as chunked prefill has them."""
    first, second = life.open(300), life.open(140)
    life.write([first, second], [150, 130])
    life.ask([second, first], [130, 150])
    life.write([first, second], [150, 1])
    life.ask([first, second], [150, 1])
    life.ask([first, second], [300, 0])
    child = life.fork(first, 257, 20)
    life.write([child], [20])
    life.ask([child, second], [20, 2])
    life.ask([second, child])
    life.free(first)
    late = life.open(290)
    life.write([late], [290])
    life.ask([child, late], [1, 290])
    life.ask([late, child, second])


def released(life: Life) -> None:
    """Without its storage a cache holds nothing, and comes back as large and empty as it was."""
    full = life.cache.nbytes()
    if full <= 0:
        raise Broken(f"a cache of {full} bytes")
    slots_again(life)
    life.cache.release()
    if life.cache.nbytes() >= full:
        raise Broken(f"{life.cache.nbytes()} of {full} bytes are held after a release")
    life.cache.restore()
    if life.cache.nbytes() != full:
        raise Broken(f"{life.cache.nbytes()} bytes after a restore, {full} before")
    slots_again(life)


def room(life: Life) -> None:
    """All slots and tokens of the spec can be used at once; a refusal changes nothing; a reset frees all."""
    spec = life.cache.spec if hasattr(life.cache, "spec") else None
    slots, tokens = (spec.max_slots, spec.max_tokens) if spec else (16, 1200)
    for _ in range(3):
        each = tokens // slots
        full = [life.open(each) for _ in range(slots)]
        while life.cache.allocate(1) is not None:
            if len(full) > 100 * slots:
                raise Broken("a cache that is never full")
            full.append(-1)
        life.write(full[:2], [each, each])
        life.ask(full[:2], [each, each])
        life.ask(full[:2])
        life.cache.reset()
        life.slots.clear()
    parent = life.open(tokens // 2)
    life.write([parent], [5])
    children = [life.fork(parent, 5, tokens // 2 // (slots - 1)) for _ in range(slots - 1)]
    life.write(children[:3], [1, 2, 3])
    life.ask(children[:3])


def steps(life: Life, windows: Sequence[int | None]) -> None:
    """Prompts and forks that grow by fused steps in shuffled batches."""
    first, second = life.open(40), life.open(40)
    life.write([first, second], [5, 2])
    for window in windows:
        life.step([second, first], window)
    children = [life.fork(first, 6, 30), life.fork(second, 3, 30), life.fork(first, 4, 30)]
    life.free(first)
    for batch in (children, children[::-1], children[1:], [children[0], second]):
        for window in windows:
            life.step(batch, window)


def first_steps(life: Life) -> None:
    """A step into an empty sequence."""
    one, other = life.open(4), life.open(4)
    for batch in ([one], [other, one], [one, other]):
        life.step(batch)
