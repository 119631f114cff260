"""Rewards in processes that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_core.config import RewardConfig
from grpo_core.data.reward_runner import RewardRunner
from grpo_core.errors import ConfigError, GrpoError, RewardError
from grpo_core.registry import Registry
from grpo_core.types import Sample

FUNCTIONS = """
import asyncio, math, os, sys, time

calls = 0

def length(text, sample, *, scale=1.0): return len(text) * scale
def truth(text, sample): return text == sample.answer
def column(text, sample): return sample.extra["level"]
def many(text, sample): raise KeyError("no such thing\\nat all")
def nan(text, sample): return math.nan
def infinite(text, sample): return -math.inf
def nothing(text, sample): return None
def word(text, sample): return "1"
def hang(text, sample):
    while text == "bad": pass
    return 1.0
def sleep(text, sample): time.sleep(600)
def die(text, sample): os._exit(3) if text == "bad" else None; return 1.0
def leave(text, sample): sys.exit(4)
def noisy(text, sample): print("noise " * 1000); sys.stdout.flush(); return 2.0
def torch_loaded(text, sample): return "torch" in sys.modules
def pid(text, sample): return os.getpid()
async def slow(text, sample): await asyncio.sleep(0.2); return 1.0
async def never(text, sample): await asyncio.sleep(600 if text == "bad" else 0); return 1.0
async def blocking(text, sample):
    while text == "bad": pass
    return 1.0
async def wrong(text, sample): raise ValueError("wrong " + text)
class Judge:
    async def __call__(self, text, sample): return 3.0
judge = Judge()
def numpy(text, sample):
    import numpy
    return numpy.float32(0.5)
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def reward(name: str, **values: object) -> RewardConfig:
    full = (
        name
        if name in ("exact", "number", "math", "regex", "reasoning_gym") or ":" in name
        else f"user_rewards:{name}"
    )
    return RewardConfig(name=full, **values)  # type: ignore[arg-type]


Runners = Iterator[object]


@pytest.fixture
def make(registry: Registry, user: None) -> Iterator[object]:
    made: list[RewardRunner] = []

    def build(*configs: RewardConfig, workers: int = 2) -> RewardRunner:
        made.append(RewardRunner(configs, registry, workers=workers))
        return made[-1]

    yield build
    for runner in made:
        runner.close()


def pair(text: str, answer: str | None = "12", **extra: object) -> tuple[str, Sample]:
    return text, Sample(id="row:7", answer=answer, extra=extra)


def failure(runner: RewardRunner, *texts: str) -> RewardError:
    with pytest.raises(RewardError) as caught:
        runner.score([pair(text) for text in texts])
    assert len(str(caught.value).splitlines()) == 3
    return caught.value


def test_values_come_in_the_order_of_the_pairs(make) -> None:  # type: ignore[no-untyped-def]
    runner = make(reward("exact"), reward("length", weight=0.5, options={"scale": 2}), reward("column"))
    rows = runner.score([pair("12" * n, level=n) for n in range(20)])
    assert rows == [
        {"exact": float(n == 1), "user_rewards:length": 4.0 * n, "user_rewards:column": float(n)}
        for n in range(20)
    ]
    assert runner.total(rows[3]) == 0 + 0.5 * 12 + 3
    assert runner.score([]) == []


def test_two_rewards_of_one_name_get_labels_of_their_own(make) -> None:  # type: ignore[no-untyped-def]
    runner = make(
        reward("regex", options={"pattern": "a"}), reward("regex", options={"pattern": "b"}, weight=3)
    )
    assert runner.labels == ("regex", "regex_2")
    (row,) = runner.score([pair("b")])
    assert row == {"regex": 0.0, "regex_2": 1.0}
    assert runner.total(row) == 3


@pytest.mark.parametrize("name", ["truth", "numpy", "slow", "judge", "noisy"])
def test_kinds_of_functions(make, name: str) -> None:  # type: ignore[no-untyped-def]
    expected = {"truth": 1.0, "numpy": 0.5, "slow": 1.0, "judge": 3.0, "noisy": 2.0}[name]
    assert make(reward(name)).score([pair("12")] * 3) == [{f"user_rewards:{name}": expected}] * 3


def test_async_functions_run_side_by_side(make) -> None:  # type: ignore[no-untyped-def]
    runner = make(reward("slow"), workers=1)
    runner.check()
    start = time.monotonic()
    assert len(runner.score([pair("x")] * 40)) == 40
    # One after the other they take 8 s.
    assert time.monotonic() - start < 6


def test_workers_do_not_import_torch_and_are_kept(make) -> None:  # type: ignore[no-untyped-def]
    runner = make(reward("torch_loaded"), reward("pid"), workers=1)
    first, second = runner.score([pair("x")]), runner.score([pair("y")])
    assert first == second
    assert first[0]["user_rewards:torch_loaded"] == 0.0
    assert first[0]["user_rewards:pid"] != os.getpid()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("many", "KeyError: 'no such thing"),
        ("nan", "it returned nan"),
        ("infinite", "it returned -inf"),
        ("nothing", "it returned 'None' (NoneType), not a number"),
        ("word", "it returned '1' (str), not a number"),
        ("die", "its process ended with exit code 3"),
        ("leave", "its process ended with exit code 4"),
        ("wrong", "ValueError: wrong bad"),
    ],
)
def test_what_fails_is_told_with_reward_sample_and_completion(make, name: str, told: str) -> None:  # type: ignore[no-untyped-def]
    error = failure(make(reward(name), workers=1), "bad", "good")
    assert f"user_rewards:{name}" in error.what
    assert "row:7" in error.what
    assert told in error.why
    assert "'bad'" in error.why


@pytest.mark.parametrize("name", ["hang", "sleep", "never", "blocking"])
def test_what_hangs_is_killed_and_told(make, name: str) -> None:  # type: ignore[no-untyped-def]
    runner = make(reward(name, timeout=0.5), workers=1)
    runner.check()
    start = time.monotonic()
    assert "it was not done after 0.5 s" in failure(runner, "bad").why
    assert time.monotonic() - start < 8


@pytest.mark.parametrize("name", ["hang", "die", "never"])
def test_the_runner_goes_on_after_an_error(make, name: str) -> None:  # type: ignore[no-untyped-def]
    runner = make(reward(name, timeout=0.5))
    failure(runner, "good", "bad", "good", "good")
    assert runner.score([pair("good")] * 5) == [{f"user_rewards:{name}": 1.0}] * 5


def test_a_regex_that_blows_up_is_killed(make) -> None:  # type: ignore[no-untyped-def]
    runner = make(reward("regex", timeout=0.5, options={"pattern": r"^(a+)+$"}), workers=1)
    assert "it was not done after 0.5 s" in failure(runner, "a" * 60 + "b").why


HOSTILE = ["$9!!!!!!$", "$10^{10^{10^{10}}}$", "\\boxed{99999999^{99999999}}", "9!!!!!!", "10**10**10"]


def test_math_survives_hostile_completions(make) -> None:  # type: ignore[no-untyped-def]
    runner = make(reward("math", timeout=2.0))
    runner.check()
    start = time.monotonic()
    rows = runner.score([pair(text) for text in [*HOSTILE, "\\boxed{12}", "\\boxed{13}"]])
    assert [row["math"] for row in rows] == [0.0] * len(HOSTILE) + [1.0, 0.0]
    # At worst each runs into its limit, and its worker is started again, on two workers.
    assert time.monotonic() - start < 60
    assert runner.failures["math"] >= 1


def test_math_with_a_bad_answer_is_an_error_of_the_data(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RewardError, match="cannot read the answer"):
        make(reward("math")).score([pair("3", answer="")])


def test_direct_rewards_fail_with_the_same_words(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RewardError) as caught:
        make(reward("number")).score([pair("3"), pair("x" * 200, answer="even")])
    assert "has no number" in caught.value.why
    assert "x" * 77 + "..." in caught.value.why


def test_registered_functions(registry: Registry) -> None:
    registry.reward("local", lambda text, sample: len(text))
    registry.reward("bad", lambda text, sample: None)
    with RewardRunner([RewardConfig(name="local")], registry) as runner:
        assert runner.score([pair("abc")]) == [{"local": 3.0}]
    with (
        RewardRunner([RewardConfig(name="bad")], registry) as runner,
        pytest.raises(RewardError, match="'bad'"),
    ):
        runner.score([pair("abc")])


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (RewardConfig(name="exakt"), "did you mean 'exact'?"),
        (RewardConfig(name="regex"), "pattern"),
        (RewardConfig(name="regex", options={"pattern": "("}), "not a regular expression"),
        (RewardConfig(name="regex", options={"pattern": 3}), "not a regular expression"),
        (RewardConfig(name="exact", options={"cse": True}), "cse"),
    ],
)
def test_mistakes_in_the_config_are_found_before_anything_runs(
    registry: Registry, config: RewardConfig, told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RewardRunner([config], registry)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere_at_all:f", "ModuleNotFoundError"),
        ("user_rewards:absent", "AttributeError"),
        ("user_rewards:calls", "is a int, not a function"),
        ("broken_rewards:f", "RuntimeError: at import"),
    ],
)
def test_functions_that_cannot_be_loaded_are_told_by_check(make, name: str, told: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(GrpoError) as caught:
        make(reward(name)).check()
    assert told in caught.value.why
    assert name in caught.value.what


def test_unknown_options_are_told_by_check(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RewardError, match="scael"):
        make(reward("length", options={"scael": 1})).check()


def test_missing_math_verify_tells_what_to_install(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        RewardRunner([RewardConfig(name="math")], registry)
    assert caught.value.fix == 'pip install "grpo-core[math]"'


PARENT = """
import os, signal, sys
from grpo_core.config import RewardConfig
from grpo_core.data.reward_runner import RewardRunner
from grpo_core.registry import Registry
from grpo_core.types import Sample
if __name__ == "__main__":
    runner = RewardRunner([RewardConfig(name="user_rewards:pid")], Registry())
    print(int(runner.score([("x", Sample(id="1"))])[0]["user_rewards:pid"]), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_the_run_is_killed(tmp_path: Path, user: None) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    done = subprocess.run(
        [sys.executable, "parent.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
