"""Single ops: every offer that runs here against the reference, and against what the machine can do.

    python benchmarks/bench_ops.py [--op attention] [--threads 1] [--seconds 0.3] [--json]

Sizes are those of SmolLM2-135M. A ratio above 1 is faster than the reference; a share is of a copy or of a
bfloat16 matrix product that is measured on the spot. Offers of an op take turns, the best time counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from common import emit, machine
from limits import best_time, copy_bandwidth, matmul_rate
from op_cases import CASES, Case

from grpo_core.backend import import_pointer
from grpo_core.catalogue import Catalogue, Offer
from grpo_core.devices.cpu import Cpu
from grpo_core.impl import Need
from grpo_core.plugins import load
from grpo_core.requirements import unmet

ROUNDS = 3


def usable(offer: Offer, facts: dict[str, Any]) -> bool:
    """Whether an offer serves these facts on this CPU; a cache is not a fact here."""
    impl, need = offer.impl, Need(op=offer.impl.op, facts=facts)
    fits = all(facts[fact] in allowed for fact, allowed in impl.limits.items() if fact in facts)
    wanted = impl.device in ("cpu", "*") and fits and not any(unmet(text) for text in impl.requires)
    return wanted and (impl.when is None or impl.when(Cpu().probe().info, need) is None)


def cache_of(catalogue: Catalogue, offer: Offer) -> Any:
    """The cache class that an offer of attention reads, or None."""
    ids = offer.impl.limits.get("cache")
    for cache in catalogue.offers.get("attention.cache", ()):
        reads = cache.id in ids if ids is not None else cache.id == "core:reference"
        if reads:
            return import_pointer(cache.impl.load)
    return None


def measure(case: Case, catalogue: Catalogue, seconds: float) -> dict[str, float]:
    """Best seconds of each offer, by id."""
    calls: dict[str, Callable[[], object]] = {}
    for offer in catalogue.offers.get(case.op, ()):
        if usable(offer, case.facts):
            calls[offer.id] = case.make(import_pointer(offer.impl.load), cache_of(catalogue, offer))
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            best[name] = min(best[name], best_time(call, seconds / ROUNDS))
    return best


def rows_of(case: Case, best: dict[str, float], copy: float, product: float) -> list[dict[str, Any]]:
    """One row for each offer; work per second is of the scarcer resource that the case names."""
    base = best.get(case.against)
    rate, limit, unit = (case.flops, product, "GFLOP/s") if case.flops else (case.bytes, copy, "GB/s")
    return [
        {
            "case": case.name, "op": case.op, "offer": name, "ms": round(seconds * 1e3, 4),
            "ratio": round(base / seconds, 2) if base else None,
            "rate": round(rate / seconds / 1e9, 2), "unit": unit, "share": round(rate / seconds / limit, 3),
        }
        for name, seconds in sorted(best.items(), key=lambda item: item[1])
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person to read."""
    head = f"{'case':<34}{'offer':<16}{'ms':>10}{'ratio':>8}{'rate':>10} {'unit':<8}{'share':>6}"
    lines = [head]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"{row['case']:<34}{row['offer']:<16}{row['ms']:>10.3f}{ratio:>8}{row['rate']:>10.1f} "
            f"{row['unit']:<8}{row['share']:>6.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each offer of each case")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    catalogue = load()
    copy, product = copy_bandwidth(0.5), matmul_rate("bfloat16", 0.5)
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if args.op in case.op:
            rows += rows_of(case, measure(case, catalogue, args.seconds), copy, product)
    if args.json:
        limits = {"copy_bytes_per_s": copy, "bfloat16_flops_per_s": product}
        emit({"rows": rows, "threads": torch.get_num_threads(), "limits": limits, "machine": machine()})
        return
    print(f"copy {copy / 1e9:.1f} GB/s, bfloat16 product {product / 1e9:.0f} GFLOP/s, "
          f"{torch.get_num_threads()} thread(s)")  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
