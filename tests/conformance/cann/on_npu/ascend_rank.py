"""One rank of two of the collectives of the plugin: HCCL through the real torch-npu, findings as JSON.

ascend_rank.py RANK STORE OUT [bereft]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from grpo_ascend.collectives import Hccl
from grpo_ascend.device import ASCEND
from grpo_core.errors import GrpoError

TIMEOUT = 600.0
"""Seconds; busy machines stop for a while."""


def reductions(group: Any, rank: int, device: torch.device) -> dict[str, Any]:
    """Each dtype that is reduced natively, and what HCCL lacks."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.float64):
        x = torch.tensor([[1, 2], [3, 4]], dtype=dtype).to(device).t() * (rank + 1)
        group.all_reduce(x, op="sum")
        found[f"sum {dtype}"] = x.cpu().tolist()
    for op in ("avg", "max", "min"):
        x = torch.tensor([0.5 + rank, -1.0 - rank], device=device)
        group.all_reduce(x, op=op)
        found[op] = x.cpu().tolist()
    wide = torch.tensor([rank + 0.1], dtype=torch.float64).to(device)
    group.all_reduce(wide, op="avg")
    found["avg float64"] = wide.cpu().tolist()
    group.all_reduce(torch.empty(0, device=device), op="sum")
    rows = torch.arange(4.0, device=device) * (rank + 1)
    found["scatter"] = group.reduce_scatter(rows, op="avg").cpu().tolist()
    return found


def moves(group: Any, rank: int, device: torch.device) -> dict[str, Any]:
    """Dtypes that HCCL does not move as they are, and uneven rows."""
    found: dict[str, Any] = {"gather": group.all_gather(torch.tensor([rank == 1], device=device)).tolist()}
    flags = torch.tensor([[rank, 255]], dtype=torch.uint8, device=device)
    group.broadcast(flags, src=1)
    found["broadcast"] = flags.tolist()
    wide = torch.tensor([rank + 0.1], dtype=torch.float64).to(device)
    found["gather float64"] = group.all_gather(wide).cpu().tolist()
    sends, receives = ([2, 1], [2, 0]) if rank == 0 else ([0, 3], [1, 3])
    x = torch.arange(float(sum(sends)), device=device) + 10 * rank
    found["uneven"] = group.all_to_all(x, send_counts=sends, recv_counts=receives).cpu().tolist()
    group.barrier()
    found["objects"] = group.gather_objects({"rank": rank})
    return found


def native_float64(group: Any, device: torch.device) -> str:
    """What HCCL itself says of a sum in float64: if it took it, no emulation would be needed."""
    try:
        group._handle.allreduce([torch.ones(1, dtype=torch.float64).to(device)]).wait()
    except RuntimeError as error:
        return str(error)
    return ""


def bereft(group: Any, rank: int, device: torch.device) -> dict[str, Any]:
    """Rank 1 dies before the first call of anybody; what rank 0 is told, and after how many seconds."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        group.all_reduce(torch.ones(4, device=device), op="sum")
    except GrpoError as error:
        return {"raised": error.what, "seconds": time.monotonic() - began}
    return {"raised": ""}


def main(rank: int, store: str, out: str, how: str = "") -> None:
    torch.set_num_threads(1)
    device = ASCEND.open(rank)
    comm = Hccl()
    comm.init(rank=rank, world=2, store=store, timeout=TIMEOUT)
    group = comm.group([0, 1])
    if how == "bereft":
        Path(f"{out}.{rank}").write_text(json.dumps(bereft(group, rank, device)))
        comm.close()
        return
    found = reductions(group, rank, device) | moves(group, rank, device)
    alone = torch.tensor([rank + 1.0], device=device)
    comm.group([rank]).all_reduce(alone, op="sum")
    found["alone"] = alone.cpu().tolist()
    found["native float64"] = native_float64(group, device)
    group.barrier()
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    comm.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
