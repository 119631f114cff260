"""Planted errors that only several versions, several packages or classes can have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_conformance.audit.check import Audit, audit
from grpo_conformance.audit.surface import RULES, SCHEMA, SURFACE, load
from grpo_core.impl import Impl

ALL = ["1.0", "1.1", "2.0"]


def row(versions: list[str], *signatures: str, gradient: bool = True, **more: Any) -> dict[str, Any]:
    return {"versions": versions, "signatures": list(signatures), "gradient": gradient, **more}


ACME = {
    "distribution": "acme-kernels",
    "also": ["acme-core"],
    "roots": ["acme"],
    "python": True,
    "before": ["0.8", "0.9"],
    "archives": {version: {} for version in ALL},
    "ops": {
        "attend": [
            row(["1.0"], "def attend(q, k, ends, scale=None, window=(-1, -1), slopes=None): ..."),
            row(["1.1"], "def attend(q, k, ends, scale=None, window=(-1, -1), cap=0.0, slopes=None): ..."),
            row(["2.0"], "def attend(query, k, ends, scale=None, window=None, cap=0, slopes=None): ..."),
        ],
        "apply": [
            row(["1.0"], "def forward(x, n=1, /): ..."),
            row(["1.1", "2.0"], "def apply(x, n=1): ..."),
        ],
        "decode": [row(ALL, "def decode(q, cache): ...", gradient=False)],
        "nn": [row(ALL)],
        "nn.Layer": [row(ALL, "def Layer(size, *, eps=1e-05): ...", **{"class": True})],
        "nn.Layer.forward": [row(ALL, "def forward(q, splits): ...")],
        "nn.Raw": [row(ALL, "def Raw(size): ...", **{"class": True})],
        "nn.Raw.forward": [row(ALL, "def forward(q): ...", gradient=False)],
        "VERSION": [row(ALL)],
    },
}
HOST = {
    "distribution": "host",
    "roots": ["host"],
    "only": ["fast", "_grouped*"],
    "always": ">=1.1",
    "python": True,
    "undeclared": ["fast"],
    "archives": {version: {} for version in ALL},
    "ops": {"fast.sync": [row(ALL, "def sync(device=None): ...")],
            "_grouped_mm": [row(["2.0"], "def _grouped_mm(a, b): ...")]},
}  # fmt: skip
RULES_OF = {
    "acme.attend": {"harmless": ["window"], "forbidden": {"slopes": "read as logits by some versions"}},
    "acme.decode": {
        "together": [
            {"when": {"cache": "thd"}, "values": {"q": ["padding"]}, "why": "packed"},
            {"when": {"q": "thd"}, "without": ["cache"], "why": "one of the two"},
        ],
    },
    "acme.nn.Layer.forward": {"changed": {"splits": {"at": "2.0", "why": "a list before, a tensor since"}}},
}
FITS = "attend(q, q, q, None)"


def run(folder: Path, body: str, *offers: Impl, rules: dict[str, Any] = RULES_OF) -> Audit:
    package = folder / "plugin"
    package.mkdir()
    text = f"from acme import attend, apply, decode\nimport acme.nn\nimport host\ndef run(q):\n    {body}\n"
    (package / "ops.py").write_text(text, encoding="utf-8")
    content = {"schema": SCHEMA, "packages": [ACME, HOST]}
    (package / SURFACE).write_text(json.dumps(content), encoding="utf-8")
    (package / RULES).write_text(json.dumps({"rules": rules}), encoding="utf-8")
    return audit(package, offers, load(package))


def offer(*symbols: str, requires: tuple[str, ...] = ("acme-kernels>=1.0",), **rest: Any) -> Impl:
    return Impl(op="mlp.swiglu", name="acme", device="acme", load="plugin.ops:run", requires=requires,
                symbols=symbols, **rest)  # fmt: skip


def kinds(result: Audit) -> list[str]:
    return [finding.kind for finding in result.findings]


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        ("attend(q, q, q, None, (-1, -1), None)", "position", "argument 6 is cap in 2.0 and slopes in 1.0"),
        ("attend(q, q, q, scales=1)", "unknown keyword", "scales"),
        ("attend(q, q, q, slopes=q)", "forbidden", "read as logits"),
        ("apply(x=q)", "positional only", "x cannot be given by keyword"),
        ("acme.nn.Layer(4, 1e-6)", "too many positionals", "2 given"),
        ("acme.nn.Layer(4).forward(q)", "missing argument", "splits"),
        ("acme.nn.Raw(4)(q, m=1)", "unknown keyword", "m"),
        ("acme.nn.Layer(4).nothing(q)", "unknown op", "nn.Layer.nothing"),
        ("acme.nn.Layers(4)", "unknown op", "nn.Layers"),
        ("host._grouped_mm(q, q)", "unknown op", "_grouped_mm"),
        ("host.fast.sync(device=0, all=1)", "unknown keyword", "all"),
        ("decode('causal', cache='thd')", "value", "packed: q='causal'"),
        ("decode('thd', cache=q)", "goes together", "one of the two: cache given"),
        ("return acme.nn.Layers", "unknown op", "acme.nn.Layers"),
        ("from acme import missing", "unknown op", "acme.missing"),
    ],
)
def test_a_planted_error_is_found(tmp_path: Path, body: str, kind: str, says: str) -> None:
    result = run(tmp_path, body)
    assert set(kinds(result)) == {kind}
    assert any(says in str(finding) and "plugin.ops:" in str(finding) for finding in result.findings)


@pytest.mark.parametrize(
    "body",
    [
        FITS,
        "attend(q, q, q, scale=2, window=(-1, 0))",
        "attend(*q)",
        "attend(q, q, q, **q)",
        "acme.nn.Layer(4, eps=1)",
        "decode(q, cache=q).view(1)",
        "return acme.VERSION, acme.nn.Layer",
        "host.fast.sync()",
        "decode('padding', cache='thd')",
        "decode('causal', cache='bshd')",
        "host.elsewhere(1, 2)",
    ],
)
def test_no_finding_where_there_is_no_error(tmp_path: Path, body: str) -> None:
    assert not run(tmp_path, body).findings


def test_a_default_that_versions_disagree_in(tmp_path: Path) -> None:
    result = run(tmp_path, "acme.nn.Layer(4)\n    attend(q, q, q)")
    assert not result.findings, "0.0 and 0 are one default, and the window's is declared harmless"
    again = tmp_path / "again"
    again.mkdir()
    (finding,) = run(again, "attend(q, q, q)", rules={}).findings
    assert finding.kind == "default" and "(-1, -1) in 1.0, None in 2.0" in finding.what


def test_an_argument_that_changed_its_meaning(tmp_path: Path) -> None:
    body = "return acme.nn.Layer(4)(q, splits=q)"
    symbols = ("acme.nn.Layer",)
    assert kinds(run(tmp_path, body, offer(*symbols))) == ["meaning"]
    for number, requires in enumerate(("acme-kernels>=1,<2", "acme-core>=2")):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert not run(folder, body, offer(*symbols, requires=(requires,))).findings


@pytest.mark.parametrize(
    ("requires", "says"),
    [
        (("acme-kernels",), "admit acme-kernels 0.8"),
        (("acme-kernels>=0.9",), "admit acme-kernels 0.9"),
        (("acme-kernels>=3",), "admit no known version"),
        ((), "admit no known version"),
        (("acme>=1",), "admit no known version"),
    ],
)
def test_a_wrong_range_of_versions(tmp_path: Path, requires: tuple[str, ...], says: str) -> None:
    (finding,) = run(tmp_path, FITS, offer("acme.attend", requires=requires)).findings
    assert finding.kind == "versions" and says in finding.what


def test_an_op_that_a_version_of_the_range_lacks(tmp_path: Path) -> None:
    grouped = "host._grouped_mm(q, q)"
    (finding,) = run(tmp_path, grouped, offer("host._grouped_mm", requires=())).findings
    assert finding.kind == "unknown op" and finding.versions == ("1.1",), "1.0 is never admitted"
    folder = tmp_path / "newer"
    folder.mkdir()
    assert not run(folder, grouped, offer("host._grouped_mm", requires=("host>=2",))).findings


def test_an_op_that_is_asked_for_before_it_is_called(tmp_path: Path) -> None:
    body = "(host._grouped_mm if hasattr(host, '_grouped_mm') else print)(q, q)"
    assert not run(tmp_path, body, offer("host._grouped_mm", requires=())).findings
    for number, text in enumerate(("{}host._grouped_mm(q)", "{}host._grouped_mm2(q)")):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = run(folder, text.format("if hasattr(host, 'x'):\n        ")).findings
        assert [one.kind for one in found] == [["missing argument"], ["unknown op"]][number]


def test_no_gradient_through_a_method_or_a_function(tmp_path: Path) -> None:
    (finding,) = run(tmp_path, "return decode(q, q)", offer("acme.decode", backward=True)).findings
    assert finding.kind == "no gradient"
    for number, (layer, expected) in enumerate(
        (("Raw(4)(q)", ["no gradient"]), ("Layer(4)(q, q)", ["meaning"]))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        symbol = f"acme.nn.{layer.partition('(')[0]}"
        assert kinds(run(folder, f"return acme.nn.{layer}", offer(symbol, backward=True))) == expected


def test_symbols_of_several_packages(tmp_path: Path) -> None:
    both = f"host.fast.sync()\n    host._grouped_mm(q, q)\n    return {FITS}"
    requires = ("acme-kernels>=1", "host>=2")
    result = run(tmp_path, both, offer("acme.attend", "host._grouped_mm", requires=requires))
    assert not result.findings and result.calls == 3
    assert [row[1] for row in result.offers] == [("acme.attend",), ("host._grouped_mm", "host.fast.sync")]
    folder = tmp_path / "wrong"
    folder.mkdir()
    found = run(
        folder, both, offer("acme.decode", "host._grouped_mm", "elsewhere.op", requires=requires)
    ).findings
    assert [finding.what for finding in found] == [
        "attend is called and not declared",
        "decode is declared and not called",
        "elsewhere.op is of no package with a surface",
    ]


def test_a_rule_that_can_never_speak(tmp_path: Path) -> None:
    rules = {"acme.attend": {"explicit": ["scales"], "harmless": ["window"]}, "acme.attention": {}}
    found = [one for one in run(tmp_path, FITS, rules=rules).findings if one.kind == "rule"]
    assert [finding.what.split()[-1] for finding in found] == ["scales", "attention"]
