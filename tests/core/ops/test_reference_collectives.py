from __future__ import annotations

import pytest
import torch

from grpo_core.errors import ConfigError
from grpo_core.ops.reference.collectives import SingleProcess


def test_a_group_of_one_rank_gives_back_what_it_got() -> None:
    comm = SingleProcess()
    comm.init(rank=0, world=1, store="", timeout=1.0)
    group = comm.group([0])
    x = torch.arange(6.0).view(3, 2)
    for op in ("sum", "max", "min", "avg"):
        y = x.clone()
        group.all_reduce(y, op=op)
        assert torch.equal(y, x)
        assert torch.equal(group.reduce_scatter(x, op=op), x)
    for y in (group.all_gather(x), group.all_to_all(x, send_counts=[3], recv_counts=[3])):
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr()
    group.broadcast(x, src=0)
    group.barrier()
    assert group.gather_objects("a") == ["a"]
    assert (group.rank, group.size, comm.backend) == (0, 1, "none")
    comm.close()


def test_what_one_process_cannot_do_is_refused() -> None:
    comm = SingleProcess()
    for rank, world in ((0, 2), (1, 2), (1, 1)):
        with pytest.raises(ConfigError, match="cannot join"):
            comm.init(rank=rank, world=world, store="", timeout=1.0)
    for ranks in ([1], [], [0, 1]):
        with pytest.raises(ValueError, match="rank 0 only"):
            comm.group(ranks)
    group, x = comm.group([0]), torch.ones(2)
    for call in (
        lambda: group.all_reduce(x, op="product"),
        lambda: group.reduce_scatter(x, op="mean"),
        lambda: group.broadcast(x, src=1),
        lambda: group.all_to_all(x, send_counts=[1], recv_counts=[2]),
    ):
        with pytest.raises(ValueError):
            call()
