"""The static audit finds a planted error of each kind, and nothing in code without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_conformance.audit.calls import UNKNOWN
from grpo_conformance.audit.check import Audit, audit
from grpo_conformance.audit.extract import extend
from grpo_conformance.audit.libraries import python_names, schemas
from grpo_conformance.audit.read import read_module
from grpo_conformance.audit.signatures import parse
from grpo_conformance.audit.surface import RULES, SCHEMA, SURFACE, load
from grpo_core.errors import ConfigError
from grpo_core.impl import Impl

OPS = {
    "attend": [
        {"versions": ["1.0"], "gradient": True,
         "signatures": ["attend(Tensor q, Tensor k, str layout, *, int[]? ends=None, float scale=1.) "
                        "-> Tensor"]},
        {"versions": ["1.1", "2.0"], "gradient": True,
         "signatures": ["attend(Tensor q, Tensor k, str layout, *, int[]? ends=None, float scale=1., "
                        "int mode=0) -> Tensor"]},
    ],
    "product": [{"versions": ["1.0", "1.1", "2.0"], "gradient": False,
                 "signatures": ["product(Tensor[] x, Tensor[] w, *, int kind=0) -> Tensor[]",
                                "product.List(Tensor[] x, int[] w) -> Tensor[]"]}],
    "fresh": [{"versions": ["2.0"], "gradient": True, "signatures": ["fresh(Tensor x) -> Tensor"]}],
    "acme.set_device": [{"versions": ["1.0", "1.1", "2.0"], "gradient": False,
                         "signatures": ["def set_device(device): ..."]}],
    "_C.Options": [{"versions": ["1.0", "1.1", "2.0"], "gradient": False, "signatures": []}],
}  # fmt: skip
RULES_OF = {
    "attend": {
        "values": {"layout": ["TND", "BSND"]},
        "together": [{"when": {"layout": "TND"}, "given": ["ends"], "why": "TND is cut by its ends"}],
    },
    "product": {"explicit": ["kind"]},
}
HEAD = "import torch\nimport torch_acme\nfrom torch import Tensor\n"
GOOD = (
    HEAD
    + """
LAYOUT = "TND"

def run(q, k, ends):
    return torch_acme.attend(q, k, LAYOUT, ends=ends, scale=0.5)
"""
)


def plugin(folder: Path, text: str, name: str = "ops") -> Path:
    package = folder / "acme_plugin"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / f"{name}.py").write_text(text, encoding="utf-8")
    archives = {version: {} for version in ("1.0", "1.1", "2.0")}
    acme = {"distribution": "torch-acme", "roots": ["torch_acme", "torch.ops.acme"], "undeclared": ["acme."],
            "archives": archives, "ops": OPS}  # fmt: skip
    content = {"schema": SCHEMA, "packages": [acme]}
    (package / SURFACE).write_text(json.dumps(content), encoding="utf-8")
    (package / RULES).write_text(
        json.dumps({"rules": {f"torch_acme.{op}": rule for op, rule in RULES_OF.items()}}), encoding="utf-8"
    )
    return package


def offer(load: str = "ops:run", *symbols: str, requires: str = "torch-acme>=1.0", **rest: Any) -> Impl:
    return Impl(op="mlp.swiglu", name="acme", device="acme", load=f"acme_plugin.{load}",
                requires=(requires,), symbols=tuple(f"torch_acme.{name}" for name in symbols),
                **rest)  # fmt: skip


def run(folder: Path, text: str, *offers: Impl) -> Audit:
    package = plugin(folder, text)
    return audit(package, offers, load(package))


def kinds(result: Audit) -> list[str]:
    return [finding.kind for finding in result.findings]


def test_sound_code_has_no_findings(tmp_path: Path) -> None:
    result = run(tmp_path, GOOD, offer("ops:run", "attend", backward=True))
    assert not result.findings and result.calls == 1
    assert result.offers == (("mlp.swiglu acme", ("torch_acme.attend",), ("1.0", "1.1", "2.0")),)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        ("torch_acme.attend(q, k, 'TND', ends=ends, sclae=1.0)", "unknown keyword", "sclae"),
        ("torch_acme.attend(q, k, 'THD', ends=ends)", "value", "layout='THD'"),
        ("torch_acme.attend(q, k, 'TND')", "goes together", "ends"),
        ("torch_acme.attend(q, k, 'TND', ends=None)", "goes together", "ends"),
        ("torch_acme.attend(q, k, 'TND' if q else 'THD', ends=ends)", "value", "layout='THD'"),
        ("torch_acme.attend(q, k)", "missing argument", "layout"),
        ("torch_acme.attend(q, k, 'BSND', ends)", "too many positionals", "4 given"),
        ("torch_acme.attend(q, k, 'BSND', q=k)", "given twice", "q"),
        ("torch_acme.product([q], [k])", "not explicit", "kind"),
        ("torch_acme.atend(q)", "unknown op", "atend"),
        ("torch.ops.acme.atend(q)", "unknown op", "atend"),
        ("torch_acme.acme.set_device(0, 1)", "too many positionals", "2 given"),
    ],
)
def test_a_planted_error_is_found(tmp_path: Path, call: str, kind: str, says: str) -> None:
    result = run(tmp_path, f"{HEAD}\ndef run(q, k, ends):\n    return {call}\n")
    assert kinds(result) == [kind]
    assert says in str(result.findings[0]) and "acme_plugin.ops:6" in str(result.findings[0])


def test_an_argument_of_newer_versions_only(tmp_path: Path) -> None:
    text = GOOD.replace("scale=0.5", "mode=1")
    result = run(tmp_path, text, offer("ops:run", "attend"))
    assert kinds(result) == ["unknown keyword"] and result.findings[0].versions == ("1.0",)
    assert not run(tmp_path, text, offer("ops:run", "attend", requires="torch-acme>=1.1")).findings


def test_an_op_that_a_declared_version_lacks(tmp_path: Path) -> None:
    text = HEAD + "\ndef run(x):\n    return torch_acme.fresh(x)\n"
    result = run(tmp_path, text, offer("ops:run", "fresh"))
    assert kinds(result) == ["unknown op"] and result.findings[0].versions == ("1.0", "1.1")
    assert not run(tmp_path, text, offer("ops:run", "fresh", requires="torch-acme>=2")).findings
    assert kinds(run(tmp_path, text, offer("ops:run", "fresh", requires="torch-acme>=3"))) == ["versions"]


LOST = HEAD + "\ndef run(x, w):\n    return helper(x, w)\n\ndef helper(x, w):\n"


def test_a_backward_pass_through_an_op_without_one(tmp_path: Path) -> None:
    text = LOST + "    return torch_acme.product([x], [w], kind=0)[0]\n"
    result = run(tmp_path, text, offer("ops:run", "product", backward=True))
    assert kinds(result) == ["no gradient"] and "product" in str(result.findings[0])
    assert not run(tmp_path, text, offer("ops:run", "product")).findings
    quiet = LOST + "    with torch.no_grad():\n        return torch_acme.product([x], [w], kind=0)[0]\n"
    assert not run(tmp_path, quiet, offer("ops:run", "product", backward=True)).findings


FUNCTION = """
class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        return torch_acme.product([x], [w], kind=0)[0]

    @staticmethod
    def backward(ctx, g):
        return torch_acme.product([g], [g], kind=2)[0], None

def run(x, w):
    apply = Product.apply
    return apply(x, w)
"""


def test_a_function_of_autograd_around_it_mends_that(tmp_path: Path) -> None:
    wrapped = offer("ops:run", "product", backward=True)
    assert not run(tmp_path, HEAD + FUNCTION, wrapped).findings
    half = FUNCTION.replace("def backward(", "def backwards(")
    assert kinds(run(tmp_path, HEAD + half, wrapped)) == ["half a backward"]
    outside = FUNCTION.replace("return apply(x, w)", "return torch_acme.product([x], [w], kind=0)[0]")
    assert kinds(run(tmp_path, HEAD + outside, wrapped)) == ["no gradient"]


def test_a_function_that_is_handed_to_one_of_autograd(tmp_path: Path) -> None:
    text = FUNCTION.replace("torch_acme.product([x], [w], kind=0)[0]", "ctx.kernel(x, w)")
    text = text.replace("return apply(x, w)", "return apply(kernel, x)") + (
        "\n\ndef kernel(x, w):\n    return torch_acme.product([x], [w], kind=0)[0]\n"
    )
    given = offer("ops:run", "product", backward=True)
    assert not run(tmp_path, HEAD + text, given).findings
    straight = text.replace("return apply(kernel, x)", "f = kernel\n    return f(x, w)")
    assert kinds(run(tmp_path, HEAD + straight, given)) == ["no gradient"]


def test_symbols_are_what_is_called(tmp_path: Path) -> None:
    result = run(tmp_path, GOOD, offer("ops:run", "fresh"))
    assert [finding.what for finding in result.findings] == [
        "attend is called and not declared",
        "fresh is declared and not called",
    ]


def test_calls_are_followed_through_imports_methods_and_bases(tmp_path: Path) -> None:
    plugin(
        tmp_path,
        HEAD + "class Base:\n    def write(self, x):\n        torch_acme.product([x], [x], kind=1)\n",
        "base",
    )
    text = HEAD + (
        "from .base import Base as Parent\n\nclass Layer(Parent):\n    pass\n\n"
        "def run(cache, x):\n    if isinstance(cache, Layer):\n        cache.write(x)\n"
        "    make(x)\n\ndef make(x):\n    return Layer()\n"
    )
    result = run(tmp_path, text, offer("ops:run", "product"), offer("ops:Layer", "product"))
    assert not result.findings


def test_calls_are_followed_through_modules_and_tables(tmp_path: Path) -> None:
    plugin(tmp_path, HEAD + "def write(x):\n    torch_acme.product([x], [x], kind=1)\n", "base")
    text = HEAD + (
        "from . import base\n\nTABLE = {'write': base.write}\n\n"
        "def run(x):\n    TABLE['write'](x)\n\ndef straight(x):\n    base.write(x)\n"
    )
    result = run(tmp_path, text, offer("ops:run", "product"), offer("ops:straight", "product"))
    assert not result.findings


def test_what_is_no_literal_is_left_alone(tmp_path: Path) -> None:
    text = f"{HEAD}\ndef run(q, k, layout, rest, more):\n    torch_acme.attend(q, k, layout)\n"
    assert not run(tmp_path, text + "    torch_acme.attend(*rest, **more)\n").findings


def test_names_imported_from_the_vendor() -> None:
    text = "from torch_acme import attend as a\nimport torch_acme.acme as n\na(1, n=None)\nn.set_device(0)\n"
    calls = read_module("plugin.ops", text, ("torch_acme",)).scopes[""].calls
    assert [(call.op, call.positional) for call in calls] == [
        ("attend", ((1,),)),
        ("acme.set_device", ((0,),)),
    ]
    assert calls[0].keywords == {"n": (None,)}
    (call,) = read_module("p", "import torch_acme\ntorch_acme.f(x + 1)", ("torch_acme",)).scopes[""].calls
    assert call.positional == ((UNKNOWN,),)


def test_a_plugin_without_a_surface(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no surface"):
        load(tmp_path)


def test_a_schema_with_brackets_and_commas_in_its_defaults() -> None:
    text = (
        "op.out(Tensor(a!) x, int[2] r=[], str s='a,b)', *, Scalar? e=1e-8, Tensor[] out) -> (Tensor, Tensor)"
    )
    found = parse(text)
    assert found.positional == ("x", "r", "s") and found.keywords == ("e", "out")
    assert found.required == {"x", "out"}
    with pytest.raises(ValueError):
        parse("no schema")


def test_schemas_are_found_among_the_strings_of_a_library() -> None:
    blob = (
        b"\x01npu_op(Tensor x, *, int n=1) -> Tensor\x00\x7fnpu::other(Tensor x) -> ()\x00"
        b"expects f(x) -> y here\x00error in call(wrong thing) -> none\x00plain text\x00"
    )
    assert list(schemas(blob)) == ["npu_op(Tensor x, *, int n=1) -> Tensor", "other(Tensor x) -> ()"]


def test_python_names_as_the_package_exports_them() -> None:
    modules = {
        "__init__": "from .memory import *\nfrom .utils import hidden\ndef own(a: int = 1): pass\n",
        "memory": "def empty_cache() -> None: pass\n",
        "utils": "def now(x, *, y): pass\ndef other(): pass\n",
    }
    found = python_names(modules)
    assert found["npu.empty_cache"] == found["npu.memory.empty_cache"] == "def empty_cache(): ..."
    assert found["npu.own"] == "def own(a=1): ..." and "npu.other" not in found
    assert parse(found["npu.utils.now"]).required == {"x", "y"}


def test_a_surface_made_from_wheels(tmp_path: Path) -> None:
    import zipfile

    wheels: list[Path] = []
    for version, text in (("1.0", "npu_op(Tensor x)"), ("2.0", "npu_op(Tensor x, int n=1)")):
        path = tmp_path / f"torch_acme-{version}-cp311-cp311-manylinux_2_28_aarch64.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            blob = b"\x00" + text.encode() + b" -> Tensor\x00"
            newer = b"NpuOpBackward0\x00Options\x00" if version == "2.0" else b""
            wheel.writestr("torch_acme/lib/lib.so", blob + newer)
        wheels.append(path)
    made = {"distribution": "torch-acme", "roots": ["torch_acme"]}
    extend(made, {"1.0": wheels[:1]}, ["npu_op", "gone", "_C.Options"])
    extend(made, {"2.0": wheels[1:]}, ["npu_op"])
    assert [(row["versions"], row["gradient"]) for row in made["ops"]["npu_op"]] == [
        (["1.0"], False),
        (["2.0"], True),
    ]
    assert "gone" not in made["ops"] and "_C.Options" not in made["ops"]
    extend(made, {"2.0": wheels[1:]}, ["_C.Options"])
    assert made["ops"]["_C.Options"][0]["versions"] == ["2.0"]
    assert list(made["archives"]) == ["1.0", "2.0"] and wheels[0].name in made["archives"]["1.0"]
