"""Signatures, classes and gradients are read out of archives of Python sources, and of installed ones."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from grpo_conformance.audit.extract import main, sort
from grpo_conformance.audit.python import Found, look_up
from grpo_conformance.audit.sources import Sources, read_archive, read_installed
from grpo_conformance.audit.surface import RULES, SCHEMA, SURFACE, load

INIT = """
from .ops import attend, decode, merge as join, refuse, attend_compiled
from .nn import *
from acme.nn import Base as Parent
from .conv import conv
try:
    from acme.fast import choose
except ImportError:
    def choose(x): ...
VERSION = "1.0"
"""
OPS = """
import functools
import typing
import torch
import acme_cuda_kernels as kernels
import flash_attn_2_cuda as raw

class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, scale=None, causal=False):
        return raw.fwd(q, k)

    @staticmethod
    def backward(ctx, grad):
        return raw.bwd(grad), None, None, None

class Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return raw.fwd(x)

    @staticmethod
    def backward(ctx, grad):
        '''Never.'''
        raise NotImplementedError("no backward pass yet")

@typing.overload
def attend(q: int) -> int: ...

def attend(q: torch.Tensor, k: torch.Tensor, *rest, scale: float = 1.0, window=(-1, -1), **more):
    return Attend.apply(q, k, scale)

attend_compiled = torch.compile(attend, dynamic=True)
merge = Attend.apply

def refuse(x):
    return Refuse.apply(x)

def decode(q, cache, /, *, pages=None):
    if pages is None:
        return launch(q)
    return helper(q)

def helper(q):
    return raw.decode(q)

def quiet(q):
    with torch.no_grad():
        raw.decode(q)
    return q * 2

def launch(q):
    kernel[(1,)](q)

@torch.library.custom_op("acme::op", mutates_args=())
def registered(x): ...

@torch.library.custom_op("acme::bare", mutates_args=())
def bare(x): ...

registered.register_autograd(None)

def through(x):
    return registered(x)

def stuck(x):
    return bare(x)
"""
NN = """
import dataclasses
import torch
from acme.ops import attend, helper

class Base(torch.nn.Module):
    def __init__(self, size, *, eps=1e-5):
        super().__init__()

    def reset(self, x): ...

class Layer(Base):
    def forward(self, q, k, lengths=None):
        return self.inner(q, k)

    def inner(self, q, k):
        return attend(q, k)

    @property
    def weight(self): ...

class Raw(Base):
    def forward(self, q):
        return helper(q)

@dataclasses.dataclass
class Options:
    size: int
    kind: str = "plain"
    names: list = dataclasses.field(default_factory=list)
"""
CONV = """
import acme.compiled as compiled

class Mode:
    FAST: int = 1
    SLOW = 2

def conv(x, *, mode=Mode.FAST, **more):
    return compiled.conv(x)
"""
FILES = {
    "acme/conv.py": CONV,
    "acme/compiled.cpython-311.so": "",
    "acme/__init__.py": INIT,
    "acme/ops.py": OPS,
    "acme/nn.py": NN,
    "acme/csrc/flash.cu": "int x;",
}


def wheel(folder: Path, version: str, files: dict[str, str] = FILES) -> Path:
    path = folder / f"acme_kernels-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def sdist(folder: Path, version: str, files: dict[str, str] = FILES) -> Path:
    path = folder / f"acme_kernels-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"acme_kernels-{version}/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.fixture(params=[wheel, sdist])
def sources(request: pytest.FixtureRequest, tmp_path: Path) -> Sources:
    return read_archive(request.param(tmp_path, "1.0"))


def one(sources: Sources, name: str) -> Found:
    return look_up(sources, ["acme"], [name])[name]


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("attend", "def attend(q, k, *rest, scale=1.0, window=(-1, -1), **more): ..."),
        ("attend_compiled", "def attend(q, k, *rest, scale=1.0, window=(-1, -1), **more): ..."),
        ("ops.decode", "def decode(q, cache, /, *, pages=None): ..."),
        ("join", "def forward(q, k, scale=None, causal=False, /): ..."),
        ("Layer", "def Layer(size, *, eps=1e-05): ..."),
        ("Layer.forward", "def forward(q, k, lengths=None): ..."),
        ("Layer.reset", "def reset(x): ..."),
        # A function that stands before the module it lies in.
        ("conv", "def conv(x, *, mode=Mode.FAST, **more): ..."),
        ("Options", "def Options(size, kind='plain', names=...): ..."),
    ],
)
def test_signatures(sources: Sources, name: str, signature: str) -> None:
    assert one(sources, name).signatures == (signature,)
    assert one(sources, name).is_class == (name in ("Layer", "Options"))


@pytest.mark.parametrize("name", ["VERSION", "nn", "Layer.weight", "Layer.named_parameters"])
def test_what_is_there_and_has_no_signature(sources: Sources, name: str) -> None:
    assert one(sources, name).signatures == ()


@pytest.mark.parametrize("name", ["attendd", "ops.nothing", "Layer.forwards", "Raw.nothing", "later.attend"])
def test_what_is_not_there(sources: Sources, name: str) -> None:
    assert not look_up(sources, ["acme"], [name])


@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        ("attend", True), ("attend_compiled", True), ("join", True), ("Layer", True), ("Layer.forward", True),
        ("ops.through", True), ("ops.quiet", True),
        ("refuse", False), ("decode", False), ("ops.helper", False), ("Raw", False), ("ops.stuck", False),
        ("conv", False),
    ],
)  # fmt: skip
def test_gradients(sources: Sources, name: str, gradient: bool) -> None:
    assert one(sources, name).gradient is gradient


def test_values_of_a_class() -> None:
    text = "class Mode:\n    FAST: int = 1\n    SLOW = 2\n"
    sources = Sources({"acme.py": lambda: text})
    assert set(look_up(sources, ["acme"], ["Mode.FAST", "Mode.SLOW", "Mode.LATE"])) == {
        "Mode.FAST",
        "Mode.SLOW",
    }


def test_a_name_that_a_version_makes_up_when_it_is_imported(sources: Sources) -> None:
    assert not look_up(sources, ["acme"], ["old.attend"])
    found = look_up(sources, ["acme"], ["old.attend"], {"old.attend": "ops.attend"})
    assert found["old.attend"] == one(sources, "ops.attend")


def test_a_fallback_beside_what_another_package_brings(sources: Sources) -> None:
    assert one(sources, "choose").signatures == ("def choose(x): ...",)


def test_the_installed_torch_is_read_and_not_imported() -> None:
    attend = "nn.functional.scaled_dot_product_attention"
    names = [attend, "cuda.synchronize", "_foreach_copy_", "cuda.nothing", "_grouped_mm"]
    found = look_up(read_installed(metadata.distribution("torch")), ["torch"], names)
    assert "cuda.nothing" not in found
    assert "is_causal=False" in found[attend].signatures[0]
    assert found[attend].gradient
    assert found["cuda.synchronize"].signatures == ("def synchronize(device=None): ...",)
    assert not found["_foreach_copy_"].gradient and found["_grouped_mm"].gradient


def write_plugin(folder: Path) -> Path:
    package = folder / "plugin"
    package.mkdir()
    (package / "ops.py").write_text(
        "from acme import attend\nfrom acme.nn import Layer\n"
        "def run(q):\n    return Layer(4)(attend(q, q))\n",
        encoding="utf-8",
    )
    entry = {"distribution": "acme-kernels", "also": ["acme-core"], "roots": ["acme"], "python": True}
    content = {"schema": SCHEMA, "packages": [entry]}
    (package / SURFACE).write_text(json.dumps(content), encoding="utf-8")
    (package / RULES).write_text('{"rules": {}}', encoding="utf-8")
    return package


def test_a_surface_from_two_kinds_of_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = write_plugin(tmp_path)
    newer = {**FILES, "acme/ops.py": OPS.replace("scale: float = 1.0", "scale: float = 2.0")}
    assert main([str(package), str(sdist(tmp_path, "1.0")), str(wheel(tmp_path, "1.1"))]) == 0
    assert main([str(package), str(wheel(tmp_path, "2.0", newer))]) == 0
    assert "3 versions" in capsys.readouterr().out
    (surface,) = load(package)
    assert surface.versions == ("1.0", "1.1", "2.0") and set(surface.ops["1.0"]) == {
        "attend", "nn.Layer", "nn.Layer.forward"
    }  # fmt: skip
    assert surface.ops["1.1"]["attend"].signatures[0].defaults["scale"] == 1.0
    assert surface.ops["2.0"]["attend"].signatures[0].defaults["scale"] == 2.0
    rows = json.loads((package / SURFACE).read_text(encoding="utf-8"))["packages"][0]["ops"]["attend"]
    assert [row["versions"] for row in rows] == [["1.0", "1.1"], ["2.0"]]


def test_two_distributions_of_one_package_are_read_together(tmp_path: Path) -> None:
    package = write_plugin(tmp_path)
    half = {"acme/ops.py": OPS, "acme/__init__.py": "from .ops import attend\n"}
    core = wheel(tmp_path, "1.0", half)
    rest = tmp_path / "acme_core-1.0-py3-none-any.whl"
    with zipfile.ZipFile(rest, "w") as archive:
        archive.writestr("acme/nn.py", NN)
    assert main([str(package), str(core), str(rest)]) == 0
    assert set(load(package)[0].ops["1.0"]) == {"attend", "nn.Layer", "nn.Layer.forward"}


def test_a_name_that_no_archive_has_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = write_plugin(tmp_path)
    lesser = {**FILES, "acme/__init__.py": "", "acme/nn.py": ""}
    assert main([str(package), str(wheel(tmp_path, "1.0", lesser))]) == 1
    assert "in none of them: attend, nn.Layer" in capsys.readouterr().out


def test_an_archive_of_another_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no package other"):
        sort([tmp_path / "other-1.0.tar.gz"], [{"distribution": "acme-kernels"}])
