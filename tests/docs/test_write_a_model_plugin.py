"""docs/write-a-model-plugin.md, followed to the letter: its commands run and its changes apply."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from followed_page import ROOT, blocks, follow

NAME = "write-a-model-plugin.md"
PAGE = (ROOT / "docs" / NAME).read_text()


@pytest.mark.slow
def test_the_page_can_be_followed(tmp_path: Path) -> None:
    here, ran = follow(NAME, tmp_path, "grpo-mistral")
    assert ran == 5 and here == tmp_path / "grpo-mistral"
    assert len(list((here / "dist").glob("grpo_mistral-*.whl"))) == 1


def test_the_renamed_tensor_of_the_page_is_renamed() -> None:
    from grpo_core.plugins import load

    (text,) = [text for kind, text in blocks(NAME) if kind == "python" and text.startswith("# names.py")]
    space: dict[str, object] = {}
    exec(compile(text, "names.py", "exec"), space)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    }  # fmt: skip
    arch = load().model_plugin_for(config["architectures"]).arch(config)  # type: ignore[arg-type]
    table = space["weights"](arch)  # type: ignore[operator]
    assert table.hf_names()["model.final_norm.weight"] == (8,)
    assert "model.norm.weight" not in table.hf_names() and "model.embed_tokens.weight" in table.hf_names()


def test_every_check_has_its_row() -> None:
    from grpo_conformance.model_case import MODEL_CHECKS

    assert [check.__name__ for check in MODEL_CHECKS] == re.findall(
        r"^\| `(check_\w+)` \|", PAGE, re.MULTILINE
    )


def test_every_part_of_a_layer_has_its_row() -> None:
    from grpo_core.model import arch

    parts = re.findall(r"^\| `([A-Z]\w+)` \|", PAGE, re.MULTILINE)
    named = str(arch.Layer.__annotations__)
    assert parts and all(part in named for part in parts)
    assert len(parts) == named.count("|") + 2, "a part of Layer has no row"
