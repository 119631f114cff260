"""Decode steps through recorded graphs: the same completions as without. The graph here calls what it
recorded once more, on the host; what a device's graph must not do is asked of the simulated device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from grpo_core.errors import ConfigError
from grpo_core.rollout.graphs import rows_of_graph

FAMILIES = [
    "llama-tied", "qwen3-qk-norm", "qwen2-window", "qwen3_moe-dense-first", "deepseek_v3", "qwen3_next",
    "qwen3_next-recurrent",
]  # fmt: skip


class Again:
    """A graph that calls what it recorded; the tensors that it returned stay the same."""

    def __init__(self, call: Callable[[], Any], result: torch.Tensor) -> None:
        self.call, self.result, self.replays, self.released = call, result, 0, False
        result.fill_(float("nan"))

    def replay(self, common: Any) -> None:
        assert not self.released
        self.replays += 1
        self.result.copy_(self.call())

    def nbytes(self) -> int:
        return 0 if self.released else 1000

    def release(self) -> None:
        self.released = True


class Recorder:
    """`capture` of a device, with what it was asked."""

    def __init__(self) -> None:
        self.graphs: list[Again] = []
        self.beside: list[Any] = []

    def __call__(self, call: Callable[[], Any], *, beside: Any) -> tuple[Any, Again]:
        self.beside.append(beside)
        call()
        result = call()
        self.graphs.append(Again(call, result))
        return result, self.graphs[-1]


def whole(found: dict[Any, Any]) -> dict[Any, Any]:
    """All of the completions that must be equal."""

    def experts(c: Any) -> Any:
        held = c.routed_experts
        return None if held is None else (held.prompt_PMk.tolist(), held.completion_NMk.tolist())

    return {
        key: (c.token_ids, c.text, c.logprobs, c.logprobs_t1, c.finish_reason, experts(c))
        for key, c in found.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_give_the_bits_of_plain_ones(
    family: str, tiny: Any, engine: Any, toolbox: Any
) -> None:
    # Up to eight rows no row is added, so that the very same calls are made.
    prompts, capture = toolbox.prompts_of([3, 11, 1, 7], 3), Recorder()
    plain = toolbox.run(engine(tiny(family), record_experts=True), prompts, temperature=0.9)
    made = engine(tiny(family), record_experts=True, capture=capture)
    assert whole(toolbox.run(made, prompts, temperature=0.9)) == whole(plain)
    described = made.describe()["graphs"]
    assert described["captures"] == len(capture.graphs) == len(described["rows"])
    assert sum(graph.replays for graph in capture.graphs) == made.describe()["counters"]["decode_steps"]
    assert capture.beside == [None] + [capture.graphs[0]] * (len(capture.graphs) - 1)
    # A second call meets the same graphs, with other slots for the rows that are not filled.
    again = toolbox.run(made, prompts, temperature=0.9)
    assert whole(again) == whole(plain) and made.describe()["graphs"] == described


@pytest.mark.parametrize("family", ["qwen3-qk-norm", "qwen3_moe-dense-first", "qwen3_next"])
def test_rows_that_are_not_filled_change_nothing(family: str, tiny: Any, engine: Any, toolbox: Any) -> None:
    prompts, capture = toolbox.prompts_of([3, 11, 1, 7, 5, 2, 9], 3), Recorder()
    plain = toolbox.run(engine(tiny(family), max_sequences=21), prompts)
    made = engine(tiny(family), max_sequences=21, capture=capture)
    found = toolbox.run(made, prompts)
    assert set(made.describe()["graphs"]["rows"]) - set(range(1, 9)), "no graph had rows to spare"
    for key, completion in plain.items():
        assert found[key].token_ids == completion.token_ids
        # A product of more rows may sum in another order: logits of some 10 in float32.
        assert found[key].logprobs == pytest.approx(completion.logprobs, abs=1e-4)


def test_new_weights_need_no_new_graphs_unless_they_move(tiny: Any, engine: Any, toolbox: Any) -> None:
    first, other = tiny("llama-tied"), tiny("llama-tied", 1)
    prompts, capture = toolbox.prompts_of([5, 2], 2), Recorder()
    made = engine(first, capture=capture)
    toolbox.run(made, prompts)
    recorded = len(capture.graphs)
    made.load_weights(other.tensors(), 2)
    found = toolbox.run(made, prompts)
    assert whole(found) == whole(toolbox.run(engine(other), prompts))
    assert len(capture.graphs) == recorded
    norm = made._weights.plain["norm.weight"]
    with torch.inference_mode():
        norm.set_(norm.clone())
    made.load_weights(first.tensors(), 3)
    assert all(graph.released for graph in capture.graphs)
    assert whole(toolbox.run(made, prompts)) == whole(toolbox.run(engine(first), prompts))
    assert len(capture.graphs) == 2 * recorded


def test_sleep_gives_the_memory_of_graphs_back(tiny: Any, engine: Any, toolbox: Any) -> None:
    model, prompts, capture = tiny("llama-tied"), toolbox.prompts_of([5, 2], 2), Recorder()
    made = engine(model, capture=capture)
    before = toolbox.run(made, prompts)
    held = made.describe()["graphs"]
    assert held["bytes"] > 1000 * held["captures"] > 0
    made.sleep()
    assert made.describe()["graphs"] is None and all(graph.released for graph in capture.graphs)
    made.load_weights(model.tensors(), 2)
    assert [c.token_ids for c in toolbox.run(made, prompts).values()] == [
        c.token_ids for c in before.values()
    ]
    made.close()
    assert all(graph.released for graph in capture.graphs)


def test_the_slot_of_unfilled_rows_takes_no_room_from_sequences(tiny: Any, engine: Any, toolbox: Any) -> None:
    options = {"cache_tokens": 24}
    prompts = toolbox.prompts_of([16], 1)
    for capture in (None, Recorder()):
        made = engine(tiny("llama-tied"), capture=capture, max_sequences=1, options=options)
        assert len(toolbox.run(made, prompts, max_tokens=8)) == 1
    with pytest.raises(ConfigError, match="cannot hold"):
        toolbox.run(made, toolbox.prompts_of([17], 1), max_tokens=8)


def test_sizes_of_graphs_are_few_and_near() -> None:
    sizes = [rows_of_graph(rows) for rows in range(1, 513)]
    assert sizes[:8] == list(range(1, 9)) and sizes[8:16] == [10, 10, 12, 12, 14, 14, 16, 16]
    assert all(rows <= size < 1.25 * rows for rows, size in enumerate(sizes, start=1))
    assert len(set(sizes)) == 8 + 4 * 6 and sizes[-1] == 512
