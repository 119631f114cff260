"""A rank of a group over torch_npu's own process group: npu_rank.py RANK STORE. Prints JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

STEPS = 3


def losses(device: str, rows: slice, wrap: Callable[[torch.nn.Module], Any]) -> list[float]:
    """Losses of a few steps on some rows of one batch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4)).to(device)
    wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7)
    x = torch.randn(16, 16)[rows].to(device)
    seen = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


def reduced(op: Any, dtype: torch.dtype = torch.float32) -> list[float]:
    # Numbers that an NPU is to turn into float64, torch_npu turns into float32.
    x = torch.tensor([dist.get_rank() + 1, 2], dtype=dtype).to("npu")
    dist.all_reduce(x, op=op)
    return x.tolist()


def uneven(rank: int) -> list[float]:
    sends, receives = ([1, 2], [1, 3]) if rank == 0 else ([3, 1], [2, 1])
    out = torch.empty(sum(receives), device="npu")
    dist.all_to_all_single(out, torch.arange(3.0 + rank, device="npu"), receives, sends)
    return out.tolist()


def neighbours(rank: int) -> float:
    mine, theirs = torch.tensor([float(rank)], device="npu"), torch.empty(1, device="npu")
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, theirs, 1 - rank)]
    ):
        work.wait()
    return theirs.item()


def listed(rank: int) -> list[list[float]]:
    rows = [torch.empty(2, device="npu") for _ in range(2)]
    dist.all_gather(rows, torch.full((2,), float(rank), device="npu"))
    return [row.tolist() for row in rows]


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def sharded(model: torch.nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer)
    fully_shard(model)


def main() -> None:
    rank = int(sys.argv[1])
    import torch_npu

    torch_npu.npu.set_device(rank)
    dist.init_process_group("hccl", rank=rank, world_size=2, init_method=f"file://{sys.argv[2]}")
    ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN,
           "prod": dist.ReduceOp.PRODUCT, "avg": dist.ReduceOp.AVG}  # fmt: skip
    told: dict[str, Any] = {name: reduced(op) for name, op in ops.items()}
    told["half"] = reduced(dist.ReduceOp.SUM, torch.bfloat16)
    told |= {"uneven": uneven(rank), "neighbour": neighbours(rank), "listed": listed(rank)}
    told["float64"] = refused(lambda: reduced(dist.ReduceOp.SUM, torch.float64))
    told["losses"] = losses("npu", slice(8 * rank, 8 * rank + 8), sharded)
    print(json.dumps(told), flush=True)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps({"alone": refused(lambda: reduced(dist.ReduceOp.SUM))}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
