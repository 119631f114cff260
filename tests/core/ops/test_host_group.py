"""Groups of processes on the host, between processes that really meet."""

from __future__ import annotations

import math
import multiprocessing
import socket
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from grpo_core.errors import GrpoError
from grpo_core.ops.reference.collective_checks import check_counts
from grpo_core.ops.reference.host_group import HostGroup, finish, join, leave

WORLD = 3
PATIENCE = 60.0


def unlike_numbers_of_groups(link: Connection, rank: int, store: str) -> None:
    """Ranks 0 and 2 meet twice, rank 2 after having been in a group of its own and in one with rank 1."""
    torch.set_num_threads(1)
    world = join(rank=rank, world=WORLD, store=store, timeout=PATIENCE)
    made = [world.group(ranks) for ranks in ([0, 2], [2], [1, 2], [0, 2]) if rank in ranks]
    found = []
    for group in made:
        x = torch.tensor([10.0**rank])
        group.all_reduce(x, op="sum")
        found.append((group.rank, group.size, x.item(), group.gather_objects((rank, "x" * rank))))
    leave()
    link.send(found)


def test_members_that_were_in_unlike_numbers_of_groups_meet(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    links, processes = [], []
    for rank in range(WORLD):
        ours, theirs = context.Pipe()
        words = (theirs, rank, f"file://{tmp_path}/store")
        processes.append(context.Process(target=unlike_numbers_of_groups, args=words, daemon=True))
        links.append(ours)
        processes[-1].start()
    try:
        assert all(link.poll(2 * PATIENCE) for link in links)
        found = [link.recv() for link in links]
    finally:
        for process in processes:
            process.kill()
            process.join()
    both = [(0, ""), (2, "xx")]
    assert found[0] == [(0, 2, 101.0, both)] * 2
    assert found[1] == [(0, 2, 110.0, [(1, "x"), (2, "xx")])]
    assert found[2] == [
        (1, 2, 101.0, both), (0, 1, 100.0, [(2, "xx")]), (1, 2, 110.0, [(1, "x"), (2, "xx")]),
        (1, 2, 101.0, both),
    ]  # fmt: skip


def test_nobody_listening_is_an_error_at_the_timeout_and_not_at_twice_of_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(GrpoError, match="joining through"):
        join(rank=1, world=2, store=f"tcp://127.0.0.1:{port}", timeout=3.0)
    assert 2.5 < time.monotonic() - began < 5.5


@pytest.mark.parametrize(
    ("sends", "receives"),
    [([2], [1, 1]), ([1, 1], [2]), ([2, 1], [1, 1]), ([3, -1], [1, 1]), ([1, 1], [3, -1])],
)
def test_counts_that_do_not_fit_are_refused(sends: list[int], receives: list[int]) -> None:
    check_counts(torch.ones(2), [2, 0], [0, 5], 2)
    with pytest.raises(ValueError, match="counts"):
        check_counts(torch.ones(2), sends, receives, 2)


class Work:
    """Of a device's library: done after some looks, if ever."""

    def __init__(self, looks: float) -> None:
        self.looks = looks

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks <= 0

    def wait(self) -> None:
        if self.looks == -1:
            raise RuntimeError("an error on the device")


def test_a_call_that_is_never_done_is_given_up_after_the_timeout() -> None:
    group, given_up, begun = HostGroup([1, 4], 4, None), [], time.monotonic()
    with pytest.raises(GrpoError, match="all_reduce failed") as raised:
        finish(
            lambda: Work(math.inf), "all_reduce", group, timedelta(seconds=0.2), lambda: given_up.append(1)
        )
    assert "rank 1 of 2 waited" in raised.value.why and given_up == [1]
    assert 0.2 <= time.monotonic() - begun < 5


def test_a_call_that_is_done_is_waited_for_and_its_error_told() -> None:
    group, limit = HostGroup([0], 0, None), timedelta(seconds=60)
    finish(lambda: Work(40), "broadcast", group, limit)
    with pytest.raises(GrpoError) as raised:
        finish(lambda: Work(0), "broadcast", group, limit)
    assert raised.value.why == "an error on the device"
