"""Calls are found whatever a vendor's function is called where it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_conformance.audit.calls import Call
from grpo_conformance.audit.read import parse_package, read_module, read_package

ROOTS = ("acme", "acme_core")


def calls(text: str) -> list[Call]:
    module = read_module("plugin.ops", text, ROOTS)
    return [call for scope in module.scopes.values() for call in scope.calls]


@pytest.mark.parametrize(
    "text",
    [
        "from acme import attend\ndef run(q):\n    return attend(q, n=1)\n",
        "from acme import attend as other\ndef run(q):\n    return other(q, n=1)\n",
        "def run(q):\n    from acme import attend\n    return attend(q, n=1)\n",
        "def run(q):\n    import acme\n    return acme.attend(q, n=1)\n",
        "import acme as a\nrun = lambda q: a.attend(q, n=1)\n",
        "import acme\nattend = acme.attend\ndef run(q):\n    return attend(q, n=1)\n",
        "import acme\ndef run(q):\n    f = acme.attend if q else None\n    return f(q, n=1)\n",
        "import acme, torch\nf = torch.compile(acme.attend)\ndef run(q):\n    return f(q, n=1)\n",
        "import importlib\na = importlib.import_module('acme')\ndef run(q):\n    return a.attend(q, n=1)\n",
        "import acme\ndef run(q):\n    return getattr(acme, 'attend')(q, n=1)\n",
        "import functools\n@functools.cache\ndef lazy():\n    import acme\n    return acme\n"
        "def run(q):\n    return lazy().attend(q, n=1)\n",
        "import acme\ndef pick(name):\n    return acme.attend if name else None\n"
        "def run(q):\n    return pick('x')(q, n=1)\n",
        "import acme\nclass Holder:\n    def __init__(self):\n        self.f = acme.attend\n"
        "    def run(self, q):\n        return self.f(q, n=1)\n",
        "try:\n    from acme import attend\nexcept ImportError:\n    attend = None\n"
        "def run(q):\n    return attend(q, n=1)\n",
        "import acme\ndef run(q):\n    return (f := acme.attend)(q, n=1)\n",
        "import acme\ndef outer():\n    f = acme.attend\n"
        "    def inner(q):\n        return f(q, n=1)\n    return inner\n",
    ],
)  # fmt: skip
def test_every_way_to_the_same_call(text: str) -> None:
    (call,) = [one for one in calls(text) if one.op == "attend"]
    assert call.keywords == {"n": (1,)} and len(call.positional) == 1 and not call.starred


@pytest.mark.parametrize(
    "text",
    [
        "layer = acme.nn.Layer(4)\n    return layer(q, n=1)",
        "return acme.nn.Layer(4)(q, n=1)",
        "return make()(q, n=1)",
        "with acme.nn.Layer(4) as layer:\n        return layer(q, n=1)",
        "layer, other = acme.nn.Layer(4), 3\n    return layer(q, n=1)",
        "holder = Holder()\n    return holder.layer(q, n=1)",
    ],
)
def test_a_call_of_what_a_class_made(text: str) -> None:
    head = (
        "import acme.nn\ndef make():\n    return acme.nn.Layer(4)\n"
        "class Holder:\n    layer: 'acme.nn.Layer | None'\n"
    )
    found = calls(f"{head}def run(q):\n    {text}\n")
    (call,) = [one for one in found if one.op == "nn.Layer().__call__"]
    assert call.keywords == {"n": (1,)}


def test_methods_of_what_a_class_made_fields_and_arguments() -> None:
    text = (
        "from acme.nn import Layer\n"
        "class Holder:\n    def __init__(self):\n        self.layer = Layer(4)\n"
        "    def run(self, q):\n        self.layer.reset(q)\n        return self.layer(q)\n"
        "def other(layer: Layer, q):\n    layer.reset(q, 2)\n"
    )
    assert [call.op for call in calls(text)] == [
        "nn.Layer", "nn.Layer().reset", "nn.Layer().__call__", "nn.Layer().reset",
    ]  # fmt: skip


def test_partial_arguments_come_later() -> None:
    text = (
        "import functools\nfrom acme import attend\nf = functools.partial(attend, n=1)\n"
        "def run(q):\n    return f(q, m=2)\n"
    )
    first, second = calls(text)
    assert first.keywords == {"n": (1,)} and first.starred and first.op == "attend"
    assert second.keywords == {"m": (2,)} and second.starred and second.op == "attend"


def test_a_module_that_is_called_with_weights_from_elsewhere() -> None:
    text = (
        "from acme.nn import Layer\nfrom torch.func import functional_call as lend\n"
        "def make() -> Layer:\n    return Layer(4)\n"
        "def run(weights, q):\n    return lend(make(), weights, (q, 3))\n"
    )
    (call,) = [one for one in calls(text) if one.op == "nn.Layer().__call__"]
    assert len(call.positional) == 2 and call.positional[1] == (3,) and not call.starred


@pytest.mark.parametrize(
    "text",
    [
        "import acme\ndef run(acme):\n    return acme.attend(1)\n",
        "from acme import attend\ndef run():\n    attend = 3\n    return attend(1)\n",
        "import acme\ndef run(items):\n    for acme in items:\n        acme.attend(1)\n",
        "import acme\ndef run(items):\n    return [acme.attend(1) for acme in items]\n",
        "from other import attend\nattend(1)\n",
        "import acmes\nacmes.attend(1)\n",
    ],
)
def test_names_that_are_something_else(text: str) -> None:
    assert not calls(text)


def test_names_that_are_imported_or_passed_on_are_mentioned() -> None:
    text = "from acme import attend\nimport acme.nn\ndef run(x):\n    return isinstance(x, acme.nn.Layer)\n"
    module = read_module("plugin.ops", text, ROOTS)
    assert [(one.op, one.line) for scope in module.scopes.values() for one in scope.mentions] == [
        ("attend", 1), ("nn.Layer", 4),
    ]  # fmt: skip


def test_only_some_names_of_a_large_package() -> None:
    text = (
        "import acme\nacme.attend(1)\nacme.attend_later(1)\nacme.nn.Layer()\nacme._fused_a()\nacme.zeros()\n"
    )
    module = read_module("plugin.ops", text, ROOTS, only=("attend", "nn", "_fused*"))
    assert [call.op for call in module.scopes[""].calls] == ["attend", "nn.Layer", "_fused_a"]


def test_names_of_other_modules_of_the_package(tmp_path: Path) -> None:
    package = tmp_path / "plugin"
    package.mkdir()
    (package / "__init__.py").write_text("from .lazy import kernels\n", encoding="utf-8")
    (package / "lazy.py").write_text(
        "def kernels():\n    import acme_core as core\n    return core\nfrom acme import attend as again\n",
        encoding="utf-8",
    )
    (package / "ops.py").write_text(
        "from . import kernels\nfrom .lazy import again\nfrom . import lazy\n"
        "def run(q):\n    kernels().matmul(q)\n    again(q)\n    lazy.again(q, 2)\n",
        encoding="utf-8",
    )
    modules = read_package(parse_package(package), ROOTS)
    assert [call.op for call in modules["plugin.ops"].scopes["run"].calls] == ["matmul", "attend", "attend"]
