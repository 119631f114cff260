"""The page of a report: the worst case, errors beside tolerances, verdicts by offer and level, speed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from grpo_conformance import html_tables
from grpo_conformance.case import Case, Outcome
from grpo_conformance.html import page
from grpo_conformance.report import build
from grpo_conformance.target import open_target

GOOD = Outcome(status="pass", error=1e-6, tolerance=1e-5, worst={"shape": "ragged", "seed": 7})
CLOSE = replace(GOOD, error=9e-6, worst={"shape": "windows", "seed": 8})
BAD = Outcome(status="fail", message="scale forgotten", error=0.5, tolerance=0.1, worst={"index": [1, 2]})
RATES = {
    "seconds": 2e-3, "bytes": 4e6, "flops": 0.0, "bytes_per_second": 2e9, "flops_per_second": 0.0,
    "copy_bytes_per_second": 8e9, "matmul_flops_per_second": 1e11, "share_of_copy": 0.25,
    "share_of_matmul": 0.0, "share_of_bound": 0.25,
}  # fmt: skip
SIZES = {"dtype": "float32", "tokens": 64}


def row(level: int, subject: str, name: str, outcome: Outcome) -> tuple[Case, Outcome]:
    kind, _, offer = subject.partition(" ")
    label = ("plugin", "device", "ops", "memory", "collectives", "system", "speed")[level]
    return Case(id=f"{label}/{kind}/{offer}/{name}", level=level, subject=subject, run="m:f"), outcome


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    fast = Outcome(status="pass", figures=RATES, worst=SIZES)
    slow = replace(fast, figures={**RATES, "seconds": 6e-3})
    rows = [
        row(2, "norm.rms acme:fused", "float32/ragged", GOOD),
        row(2, "norm.rms acme:fused", "float32/windows", CLOSE),
        row(2, "mlp.swiglu acme:slow", "float32/ragged", BAD),
        row(2, "mlp.swiglu acme:fused", "served", Outcome(status="not_declared", message="no such size")),
        row(6, "norm.rms acme:fused", "float32", fast),
        row(6, "norm.rms core:reference", "float32", slow),
        row(6, "norm.rms acme:other", "float32", replace(fast, worst={**SIZES, "tokens": 32})),
    ]
    return build(open_target("cpu"), rows, levels=[2, 3, 6], quick=False, command="grpo conformance acme")


def cells(text: str, marker: str) -> list[str]:
    """The cells of the first row that holds the marker, without their tags."""
    (found,) = [part for part in text.split("<tr")[1:] if marker in part][:1]
    return [re.sub("<[^>]*>", "", cell).strip() for cell in re.findall("<td.*?</td>", found, re.DOTALL)]


def test_the_worst_case_is_shown_with_its_inputs_and_its_share(content: dict[str, Any]) -> None:
    text = "".join(html_tables.level_tables(content))
    subject, verdict, counts, worst, errors = cells(text, "norm.rms acme:fused")
    assert (subject, verdict, counts) == ("norm.rms acme:fused", "pass", "2 pass")
    assert worst == "float32/windowsshape windows, seed 8"
    assert errors == "9e-06 / 1e-05"
    assert 'class="share near"><i style="width:90%"' in text
    assert 'class="share over"><i style="width:100%"' in text


def test_failures_come_with_everything_that_is_known(content: dict[str, Any]) -> None:
    text = "".join(html_tables.broken_table(content))
    assert "What failed (1)" in text and "scale forgotten" in text and "index [1, 2]" in text
    assert "0.5 / 0.1" in text


def test_many_failures_are_folded_after_the_first(content: dict[str, Any]) -> None:
    bad = next(row for row in content["cases"] if row["status"] == "fail")
    worst = {"inputs": {"q": [55, 4]}, "got": -1.6453796625}
    many = {"cases": [{**bad, "id": f"ops/x/{i}", "worst": worst} for i in range(html_tables.OPEN + 3)]}
    text = "".join(html_tables.broken_table(many))
    shown, _, folded = text.partition("<details><summary>3 more</summary>")
    assert shown.count("ops/x/") == html_tables.OPEN and folded.count("ops/x/") == 3
    assert "inputs (q [55, 4]), got -1.64538" in shown


def test_offers_have_one_verdict_a_level(content: dict[str, Any]) -> None:
    text = "".join(html_tables.offer_table(content))
    # A level that asks about no offer has no column.
    assert [row["level"] for row in content["levels"]] == [2, 3, 6]
    assert cells(text, "acme:fused") == ["acme:fused", "pass", "pass"]
    assert cells(text, "acme:slow") == ["acme:slow", "fail", "-"]


def test_speed_is_a_table_with_the_fastest_first(content: dict[str, Any]) -> None:
    text = "".join(html_tables.speed_table(content))
    assert text.index("acme:fused") < text.index("core:reference")
    first = cells(text, "acme:fused")
    assert first[0] == "norm.rmstokens 64"
    assert first[1:] == ["acme:fused", "float32", "2 ms", "2.00", "25 %", "-", "-", "25 %", "3.00"]
    # Other sizes than the reference's: nothing to compare with.
    assert cells(text, "acme:other")[-1] == "-"
    assert not "".join(html_tables.speed_table({"cases": []}))


def test_what_was_not_asked_is_listed(content: dict[str, Any]) -> None:
    assert "no such size" in "".join(html_tables.absent_list(content))


def test_the_page_holds_all_of_it_and_loads_nothing(content: dict[str, Any]) -> None:
    text = page(content)
    for title in ("What failed", "By offer and level", "By subject", "Speed", "Not declared"):
        assert title in text
    assert "default-src 'none'" in text and "prefers-color-scheme:dark" in text
    assert "<script" not in text and not re.search(r"(src|href)=", text)
    assert text.count("<table") == text.count("</table>") and text.count("<td") == text.count("</td>")


def test_a_report_of_a_model_is_called_by_its_family(content: dict[str, Any]) -> None:
    model = {"family": "qwen3", "architectures": ["Qwen3ForCausalLM"], "folder": "/models/<mine>"}
    text = page({**content, "model": model})
    assert "<h1>qwen3 " in text and "computed on" in text and "of /models/&lt;mine&gt;" in text
