"""The pages that follow from the code are up to date, and what pages point at exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
HOST_OR_MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:root|tmp|work|opt)/|\.internal\b")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh(generate: ModuleType) -> None:
    assert generate.stale() == [], "run `python docs/generate.py`"


def test_a_stale_page_is_noticed(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generate.PAGES, "hooks.md", lambda: "something else")
    assert generate.stale() == ["hooks.md"]


def test_every_setting_is_explained(generate: ModuleType) -> None:
    bare = re.findall(r"^\| `([\w.\[\]]+)` \|.*\|  \|$", generate.configuration_page(), flags=re.MULTILINE)
    assert bare == [], "give these a docstring in config.py"


def test_the_configuration_page_has_every_key_of_the_schema(generate: ModuleType) -> None:
    from grpo_core.config_schema import leaf_keys

    page = generate.configuration_page()
    missing = [key for key in leaf_keys() if f"`{key.replace('.*.', '[].')}`" not in page]
    assert missing == []


def test_every_op_and_hook_has_a_section(generate: ModuleType) -> None:
    from grpo_core import hookspecs
    from grpo_core.ops.contract import CONTRACTS

    page = generate.hooks_page()
    assert [op for op in CONTRACTS if f"### `{op}`" not in page] == []
    assert [hook for hook in vars(hookspecs) if hook.startswith("grpo_") and f"`{hook}(" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_are_ascii_and_name_no_machine(page: Path) -> None:
    text = page.read_text()
    assert text.isascii(), [char for char in text if not char.isascii()][:5]
    assert HOST_OR_MACHINE_PATH.findall(text) == []
