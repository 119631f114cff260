"""HCCL of the simulated CANN between real processes, without torch."""

from __future__ import annotations

import ast
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

RANK = Path(__file__).with_name("cann_rank.py")


class Group:
    """Ranks as processes, told and heard one line at a time."""

    def __init__(self, library: Path, folder: Path, size: int, present: Sequence[int], **more: str) -> None:
        words = {**os.environ, "GRPO_CANN_FOLDER": str(folder), "HCCL_EXEC_TIMEOUT": "20", **more}
        self.ranks = {
            rank: subprocess.Popen(
                [sys.executable, "-S", str(RANK), str(library), "group", str(size), str(rank)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=words,
            )
            for rank in present
        }  # fmt: skip
        self.greetings = [self.hear(rank) for rank in present]

    def tell(self, rank: int, order: str) -> None:
        stream = self.ranks[rank].stdin
        assert stream is not None
        stream.write(order + "\n")
        stream.flush()

    def hear(self, rank: int) -> Any:
        stream = self.ranks[rank].stdout
        assert stream is not None
        line = stream.readline()
        return ast.literal_eval(line) if line else None

    def each(self, orders: Sequence[str]) -> list[Any]:
        for rank, order in enumerate(orders):
            self.tell(rank, order)
        return [self.hear(rank) for rank in range(len(orders))]

    def close(self) -> None:
        for process in self.ranks.values():
            process.kill()
            process.communicate()


@pytest.fixture
def group(cann_library: Path, tmp_path: Path) -> Iterator[Group]:
    made = Group(cann_library, tmp_path, 3, range(3))
    assert made.greetings == ["ready"] * 3
    yield made
    made.close()


LONG = (1 << 20) // 4 + 3
"""int32 or float32 numbers that take more than one chunk."""


def test_reductions_are_those_of_python(group: Group) -> None:
    draw = random.Random(0)
    ints = [[draw.randrange(-9, 9) for _ in range(5)] for _ in range(3)]
    for code in "bhiq":
        for op, of in (("sum", sum), ("max", max), ("min", min)):
            got = group.each([f"hccl.all_reduce({row}, {op!r}, {code!r})" for row in ints])
            assert got == [[of(column) for column in zip(*ints, strict=True)]] * 3, (code, op)  # type: ignore[operator]
    products = group.each([f"hccl.all_reduce({row}, 'prod', 'q')" for row in ints])
    assert products[0] == [a * b * c for a, b, c in zip(*ints, strict=True)]


def test_integers_wrap_as_the_hardware_does(group: Group) -> None:
    assert group.each(["hccl.all_reduce([100], 'sum', 'b')"] * 3) == [[300 - 256]] * 3


def test_half_sums_round_once_to_the_nearest(group: Group) -> None:
    values = [1.0, 2.0**-11, 2.0**-11]  # added one after the other in float16, both would be lost
    said = group.each(
        [f"hccl.raw_reduce(bytes.fromhex('{struct.pack('<e', x).hex()}'), 3, 'sum')" for x in values]
    )
    assert said == [struct.pack("<e", 1.0 + 2.0**-10).hex()] * 3
    bits = [struct.pack("<f", x)[2:].hex() for x in (1.0, 2.0**-8, 2.0**-8)]
    said = group.each([f"hccl.raw_reduce(bytes.fromhex('{x}'), 11, 'sum')" for x in bits])
    assert said == [struct.pack("<f", 1.0 + 2.0**-7)[2:].hex()] * 3


@pytest.mark.parametrize(("code", "op"), [("d", "sum"), ("B", "sum"), ("I", "max"), ("h", "prod")])
def test_what_hccl_does_not_reduce_is_refused(group: Group, code: str, op: str) -> None:
    said = group.each([f"hccl.all_reduce([1], {op!r}, {code!r})"] * 3)
    assert all(text.startswith("HcclError 5: simulated CANN: HCCL does not reduce") for text in said)


def test_long_messages_go_in_chunks(group: Group) -> None:
    said = group.each(
        [
            f"(lambda x: (x[0], x[-1], len(x), sum(x)))(hccl.all_reduce([{r}.0] * {LONG}, 'sum'))"
            for r in range(3)
        ]
    )
    assert said == [(3.0, 3.0, LONG, 3.0 * LONG)] * 3
    said = group.each(
        [f"(lambda x: (x[0], x[{LONG}], x[-1]))(hccl.all_gather([{r}] * {LONG}))" for r in range(3)]
    )
    assert said == [(0, 1, 2)] * 3


def test_shares_gathers_and_broadcasts(group: Group) -> None:
    rows = [[float(10 * r + i) for i in range(6)] for r in range(3)]
    got = group.each([f"hccl.reduce_scatter({row}, 'sum')" for row in rows])
    sums = [sum(column) for column in zip(*rows, strict=True)]
    assert got == [sums[0:2], sums[2:4], sums[4:6]]
    assert group.each([f"hccl.all_gather([{r}, {-r}])" for r in range(3)]) == [[0, 0, 1, -1, 2, -2]] * 3
    assert group.each([f"hccl.broadcast([{r}, 7], 2)" for r in range(3)]) == [[2, 7]] * 3


def test_uneven_all_to_all(group: Group) -> None:
    draw = random.Random(1)
    counts = [[draw.choice([0, 1, 5, LONG // 2]) for _ in range(3)] for _ in range(3)]
    sent = [[[100 * a + b] * counts[a][b] for b in range(3)] for a in range(3)]
    orders = [
        f"(lambda x: [x.count(v) for v in {[100 * a + r for a in range(3)]}] + [len(x)])"
        f"(hccl.all_to_all(sum(([100*{r}+b]*n for b, n in enumerate({counts[r]})), []), {counts[r]}, "
        f"{[counts[a][r] for a in range(3)]}))"
        for r in range(3)
    ]
    want = [[len(sent[a][r]) for a in range(3)] for r in range(3)]
    assert group.each(orders) == [[*row, sum(row)] for row in want]


def test_an_all_to_all_whose_counts_do_not_fit_is_an_error(group: Group) -> None:
    said = group.each(
        ["hccl.all_to_all([1, 2, 3], [1, 1, 1], [1, 2, 1])"]
        + ["hccl.all_to_all([1, 2, 3], [1, 1, 1], [1, 1, 1])"] * 2
    )
    assert said[0].startswith("HcclError 1") and said[1:] == [[2, 2, 2], [3, 3, 3]]


def test_ranks_in_different_calls_find_out(group: Group) -> None:
    said = group.each(
        ["hccl.all_reduce([1.0], 'sum')", "hccl.all_reduce([1.0, 2.0], 'sum')", "hccl.barrier()"]
    )
    assert all("are in different calls" in text for text in said)


def test_messages_from_one_to_another_keep_their_order(group: Group) -> None:
    group.tell(0, "[hccl.send([i] * n, 1) for i, n in enumerate((1, 400000, 2))] and None")
    assert group.hear(0) is None  # a sender waits for nobody
    group.tell(1, "[hccl.receive(n, 0)[-1] for n in (1, 400000, 2)]")
    assert group.hear(1) == [0, 1, 2]
    said = group.each(["hccl.exchange([5] * 300000, 1)[-1]", "hccl.exchange([6] * 300000, 0)[-1]"])
    assert said == [6, 5]
    assert group.each(["hccl.group([7, 8], 1)", "hccl.group([9, 1], 0)"]) == [[9, 1], [7, 8]]


@pytest.mark.parametrize("order", ["hccl.all_reduce([1.0], 'sum')", "hccl.barrier()", "hccl.receive(1, 2)"])
def test_a_peer_that_dies_is_an_error_at_once(group: Group, order: str) -> None:
    group.tell(2, "os.kill(os.getpid(), 9)")
    began = time.monotonic()
    for rank in (0, 1):
        group.tell(rank, order)
    said = [group.hear(rank) for rank in (0, 1)]
    assert all(text.startswith("HcclError 21") and "gone" in text for text in said)
    assert time.monotonic() - began < 10  # the timeout of a call is 20 seconds here
    # It stays that way, and costs no more time.
    assert "gone" in group.each(["hccl.barrier()"] * 2)[1]


def test_a_peer_that_never_calls_is_an_error_within_the_timeout(cann_library: Path, tmp_path: Path) -> None:
    group = Group(cann_library, tmp_path, 2, range(2), HCCL_EXEC_TIMEOUT="1")
    began = time.monotonic()
    group.tell(0, "hccl.barrier()")
    assert group.hear(0).startswith("HcclError 9: simulated CANN: not all ranks")
    assert 0.9 < time.monotonic() - began < 10
    group.close()


def test_ranks_that_never_come_are_an_error_within_the_connection_timeout(
    cann_library: Path, tmp_path: Path
) -> None:
    group = Group(cann_library, tmp_path, 2, [0], HCCL_CONNECT_TIMEOUT="1")
    assert group.greetings[0].startswith("HcclError 9")
    group.close()
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_nothing_is_left_of_a_group(group: Group, tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
