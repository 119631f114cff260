"""A rank of a group on the simulated device: sim_rank.py RANK WORLD STORE; prints what it got as JSON."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

import grpo_conformance.sim.runtime  # noqa: F401  (registers the device)
from grpo_conformance.sim.collectives import SimCollectives
from grpo_core.errors import GrpoError


def refused(call: object, error: type[Exception]) -> bool:
    try:
        call()  # type: ignore[operator]
    except error:
        return True
    return False


def main(rank: int, world: int, store: str) -> dict[str, object]:
    collectives = SimCollectives()
    collectives.init(rank=rank, world=world, store=store, timeout=8.0)
    group = collectives.group(range(world))
    found: dict[str, object] = {"reduce_ops": sorted(collectives.reduce_ops), "size": group.size}

    def on(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values).to(dtype).to("sim")

    for op in ("sum", "max", "min", "avg"):
        for dtype in (torch.float32, torch.bfloat16):
            x = on(1.0 + rank, -2.0 * rank, 0.5, dtype=dtype)
            group.all_reduce(x, op=op)
            found[f"{op} {dtype}"] = x.cpu().tolist()
    strided = torch.zeros(3, 2, device="sim")
    strided[:, 0] = 1.0 + rank
    group.all_reduce(strided[:, 0], op="sum")
    found["strided"] = strided.cpu().tolist()
    found["all_gather"] = group.all_gather(on(rank, 10.0 + rank)).cpu().tolist()
    found["empty gather"] = list(group.all_gather(torch.empty(0, 3, device="sim")).shape)
    found["reduce_scatter"] = group.reduce_scatter(on(*range(2 * world)), op="sum").cpu().tolist()
    x = on(5.0 + rank)
    group.broadcast(x, src=world - 1)
    found["broadcast"] = x.cpu().tolist()
    # Rank r sends r rows to rank 0, none to rank 1 and one to each later rank.
    sends = [rank if to == 0 else min(to - 1, 1) for to in range(world)]
    receives = [source if rank == 0 else min(rank - 1, 1) for source in range(world)]
    rows = torch.full((sum(sends), 2), 1.0 * rank, device="sim")
    swapped = group.all_to_all(rows, send_counts=sends, recv_counts=receives)
    found["all_to_all"] = swapped.cpu().tolist()
    found["objects"] = group.gather_objects({"rank": rank})
    found["on device"] = swapped.device.type
    found["host refused"] = refused(lambda: group.all_reduce(torch.ones(1), op="sum"), ValueError)
    found["unknown op refused"] = refused(lambda: group.all_reduce(on(1.0), op="product"), ValueError)
    if rank > 0:
        pair = collectives.group(range(1, world))
        x = on(1.0)
        pair.all_reduce(x, op="sum")
        found["part"] = x.cpu().tolist()
    group.barrier()
    if rank == world - 1:
        collectives.close()
        return found
    found["lost peer is told"] = refused(lambda: group.all_reduce(on(1.0), op="sum"), GrpoError)
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
