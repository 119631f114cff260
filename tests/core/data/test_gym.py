"""Tasks of reasoning-gym."""

from __future__ import annotations

import pytest
import reasoning_gym

from grpo_core.config import DataConfig
from grpo_core.data.datasets import open_dataset
from grpo_core.data.gym import gym_score
from grpo_core.errors import GrpoError
from grpo_core.registry import Registry


def config(**options: object) -> DataConfig:
    return DataConfig(train="x", options=options)


def test_samples_are_those_of_the_task(registry: Registry) -> None:
    samples = open_dataset("reasoning-gym:chain_sum", config(size=7, seed=3, max_terms=2), registry, "train")
    oracle = reasoning_gym.create_dataset("chain_sum", size=7, seed=3, max_terms=2)
    assert len(samples) == 7
    for sample, entry in zip(samples, oracle, strict=True):
        assert sample.messages == ({"role": "user", "content": entry["question"]},)
        assert sample.answer == entry["answer"]
    assert samples[4].id == "chain_sum:4"
    assert samples[4].source == "chain_sum"


@pytest.mark.parametrize("task", ["chain_sum", "number_sorting", "spell_backward"])
def test_score_is_that_of_the_task(registry: Registry, task: str) -> None:
    samples = open_dataset(f"reasoning-gym:{task}", config(size=5, seed=1), registry, "train")
    oracle = reasoning_gym.create_dataset(task, size=5, seed=1)
    for index, sample in enumerate(samples):
        for text in (sample.answer or "", "7", "", "no idea"):
            assert gym_score(text, sample) == oracle.score_answer(text, oracle[index])
        assert gym_score(f"I think\n<answer> {sample.answer} </answer>", sample) == 1.0


@pytest.mark.parametrize(
    ("spec", "options", "told"),
    [
        ("reasoning-gym:chain_sums", {}, "did you mean reasoning-gym:chain_sum?"),
        ("reasoning-gym", {}, "has no task ''"),
        ("reasoning-gym:chain_sum", {"max_term": 3}, "did you mean max_terms?"),
        ("reasoning-gym:chain_sum", {"min_terms": -3}, "does not accept its options"),
        ("reasoning-gym:chain_sum", {"size": 0}, "does not accept its options"),
        ("reasoning-gym:chain_sum", {"size": "many"}, "does not accept its options"),
    ],
)
def test_mistakes(registry: Registry, spec: str, options: dict[str, object], told: str) -> None:
    with pytest.raises(GrpoError) as caught:
        open_dataset(spec, config(**options), registry, "train")
    assert told in str(caught.value)
