"""A change of the public surface is a visible diff."""

from __future__ import annotations

import difflib
from pathlib import Path

from public_surface import surface

from grpo_core.hookspecs import grpo_register

GOLDEN = Path(__file__).with_name("public_surface.txt")
REGENERATE = "python tests/golden/public_surface.py > tests/golden/public_surface.txt"


def test_the_public_surface_is_the_golden_one() -> None:
    difference = "\n".join(
        difflib.unified_diff(
            GOLDEN.read_text(encoding="utf-8").splitlines(),
            surface().splitlines(),
            "golden",
            "now",
            lineterm="",
        )
    )
    assert not difference, f"the public surface changed:\n{difference}\n\nIf that is meant:\n  {REGENERATE}"


def test_the_surface_holds_hooks_ops_and_records() -> None:
    lines = surface().splitlines()
    assert sum(line.startswith("hook grpo_") for line in lines) == 12
    assert "op attention.varlen" in lines and "record Impl" in lines and "protocol Device" in lines
    assert any(line.startswith("  __call__(self, q_THD: Tensor") for line in lines)


def test_no_hook_has_a_default() -> None:
    # pluggy 1.6 refuses implementations that name an argument with a default; 1.7 fills it.
    assert all("=" not in line for line in surface().splitlines() if line.startswith("hook "))
    assert grpo_register.__defaults__ is None
