"""`grpo bench op`: the figures behind a rank, the reasons of refusals, and three lines for mistakes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from grpo_conformance import bench
from grpo_conformance.target import open_target
from grpo_core.catalogue import Offer
from grpo_core.cli.main import main
from grpo_core.impl import Impl

SMALL = ["--device", "cpu", "--quick", "--size", "tokens=8", "intermediate_size=64"]


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["bench", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_all_admissible_offers_are_timed_beside_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(capsys, "op", "mlp.swiglu", *SMALL, "--dtype", "float64", "--json")
    content = json.loads(out)
    assert code == 0 and content["dtype"] == "float64" and content["sizes"]["tokens"] == 8
    rows = {row["offer"]: row for row in content["offers"]}
    reference = rows["core:reference"]
    assert reference["rank"] == 0 and reference["times_reference"] == 1.0
    for row in rows.values():
        assert row["status"] == "pass" and row["seconds"] > 0
        assert row["times_reference"] == pytest.approx(reference["seconds"] / row["seconds"])
    # 3 tensors of 8 rows of 64 float64 numbers; see the formula of mlp.swiglu.
    assert reference["bytes"] == 3 * 8 * 64 * 8
    refused = {row["offer"]: row["reason"] for row in content["refused"]}
    assert "sim:plain" in refused and "not cpu" in refused["sim:plain"]
    assert "dtype=float64 not in" in refused["cpu:native"]
    offered = open_target("cpu").catalogue.offers["mlp.swiglu"]
    assert rows.keys() | refused.keys() == {one.id for one in offered}


def test_the_table_shows_ranks_rates_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(capsys, "op", "mlp.swiglu", *SMALL, "--dtype", "float32", "--backward")
    assert code == 0
    head, _, refusals = out.partition("refused")
    assert "forward and backward" in head and "intermediate_size=64" in head
    for word in ("rank", "GB/s", "GFLOP/s", "of copy", "of matmul", "x reference", "core:reference", "1.00"):
        assert word in head
    assert "sim:plain" in refusals and "for sim, not cpu" in refusals


def test_an_offer_that_breaks_is_told_and_the_others_are_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of a benchmark finds only what is installed: an unknown offer ends in an error there."""
    target = open_target("cpu")
    impl = Impl(op="mlp.swiglu", name="broken", device="cpu", load="m:f", rank=90)
    broken = Offer(plugin="acme", impl=impl)
    offers = {**target.catalogue.offers, "mlp.swiglu": (broken, *target.catalogue.offers["mlp.swiglu"])}
    more = replace(target, catalogue=replace(target.catalogue, offers=offers))
    monkeypatch.setattr("grpo_conformance.target.open_target", lambda name: more)
    code, out, _ = told(capsys, "op", "mlp.swiglu", *SMALL, "--dtype", "float64")
    assert code == 1
    assert "acme:broken (rank 90): error: raised StopIteration" in out and "core:reference" in out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["op", "norm.rmss"], "did you mean 'norm.rms'?"),
        (["op", "memory.allocator"], "cannot be timed"),
        (["ops", "norm.rms"], "did you mean 'op'?"),
        (["op"], "there is no benchmark"),
        (["op", "norm.rms", "--size", "tokns=3"], "did you mean 'tokens'?"),
        (["op", "norm.rms", "--size", "tokens"], "has no size"),
        (["op", "norm.rms", "--size", "tokens=0"], "cannot be '0'"),
        (["op", "norm.rms", "--size", "zero_centered=3"], "cannot be '3'"),
        (["op", "norm.rms", "--dtype", "bfloat"], "did you mean 'bfloat16'?"),
        (["op", "sample.token", "--backward"], "has no backward pass"),
        (["op", "norm.rms", "--device", "cpuu"], "there is no device"),
    ],
)
def test_mistakes_are_three_lines(capsys: pytest.CaptureFixture[str], words: list[str], what: str) -> None:
    code, out, err = told(capsys, *words, *([] if "--device" in words else ["--device", "cpu"]))
    assert code == 2 and not out and what in err
    lines = err.strip().splitlines()
    assert len(lines) == 3 and lines[1].startswith("  why: ") and lines[2].startswith("  fix: ")


def test_a_switch_takes_true_and_false() -> None:
    usual = {"zero_centered": False, "score": "softmax", "tokens": 3}
    changes = bench._changes(["zero_centered=true", "score=sigmoid", "tokens=9"], usual, "norm.rms")
    assert changes == {"zero_centered": True, "score": "sigmoid", "tokens": 9}


def test_durations_and_shares_are_readable() -> None:
    assert [bench.duration(x) for x in (2.5, 0.0321, 4.2e-5)] == ["2.5 s", "32.1 ms", "42 us"]
    assert [bench.percent(x) for x in (0.374, 1.2, 0.0042)] == ["37 %", "120 %", "0.4 %"]
