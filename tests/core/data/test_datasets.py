"""Files, registered names and what is wrong with their rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from grpo_core.config import DataConfig
from grpo_core.data.datasets import open_dataset
from grpo_core.errors import ConfigError, DataError, GrpoError
from grpo_core.registry import Registry
from grpo_core.types import Sample


def config(**values: object) -> DataConfig:
    return DataConfig(train="x", **values)  # type: ignore[arg-type]


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def failure(spec: str, registry: Registry, **values: object) -> GrpoError:
    with pytest.raises(GrpoError) as caught:
        open_dataset(spec, config(**values), registry, "train")
    assert len(str(caught.value).splitlines()) == 3
    return caught.value


def test_jsonl_rows_become_samples(tmp_path: Path, registry: Registry) -> None:
    chat = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
    ]
    spec = lines(
        tmp_path / "sums.jsonl",
        {"prompt": "1+2", "answer": "3", "level": 1},
        "",
        {"prompt": chat, "answer": 4},
    )
    samples = open_dataset(spec, config(), registry, "train")
    assert len(samples) == 2
    assert samples[0] == Sample(
        id="sums.jsonl:1",
        messages=({"role": "user", "content": "1+2"},),
        answer="3",
        source="sums",
        extra={"level": 1},
    )
    assert samples[1].messages == tuple(chat)
    assert (samples[1].id, samples[1].answer) == ("sums.jsonl:3", "4")
    assert [sample.id for sample in samples] == ["sums.jsonl:1", "sums.jsonl:3"]
    assert samples[-1] == samples[1]
    assert list(samples[1:]) == [samples[1]]
    with pytest.raises(IndexError):
        samples[2]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b\x85c", "answer": "x"}\r\n', encoding="utf-8")
    (sample,) = open_dataset(str(path), config(), registry, "train")
    assert sample.messages[0]["content"] == "a\u2028b\x85c"


def test_system_and_suffix(tmp_path: Path, registry: Registry) -> None:
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    spec = lines(tmp_path / "a.jsonl", {"prompt": "p", "answer": "x"}, {"prompt": own, "answer": "x"})
    samples = open_dataset(spec, config(system="be short", suffix=" now"), registry, "train")
    assert samples[0].messages == (
        {"role": "system", "content": "be short"}, {"role": "user", "content": "p now"},
    )  # fmt: skip
    assert samples[1].messages == ({"role": "system", "content": "own"}, {"role": "user", "content": "q now"})


def test_plain_prompts_stay_text(tmp_path: Path, registry: Registry) -> None:
    spec = lines(tmp_path / "a.jsonl", {"prompt": "2+2=", "answer": "4"})
    (sample,) = open_dataset(spec, config(options={"plain": True}, suffix="?"), registry, "train")
    assert (sample.text, sample.messages) == ("2+2=?", ())


def test_limit(tmp_path: Path, registry: Registry) -> None:
    spec = lines(tmp_path / "a.jsonl", *[{"prompt": str(i), "answer": str(i)} for i in range(9)], "not json")
    assert len(open_dataset(spec, config(options={"limit": 3}), registry, "train")) == 3


def test_options_of_the_split(tmp_path: Path, registry: Registry) -> None:
    spec = lines(tmp_path / "a.jsonl", *[{"prompt": str(i), "answer": str(i)} for i in range(9)])
    both = config(options={"limit": 3}, eval_options={"limit": 5})
    assert len(open_dataset(spec, both, registry, "train")) == 3
    assert len(open_dataset(spec, both, registry, "eval")) == 5


def test_columns_by_key_and_inside_objects(tmp_path: Path, registry: Registry) -> None:
    row = {"question": "q", "reward_model": {"ground_truth": [1, 2]}, "answer": None}
    spec = lines(tmp_path / "a.jsonl", row)
    keys = config(prompt_key="question", answer_key="reward_model.ground_truth")
    (sample,) = open_dataset(spec, keys, registry, "train")
    assert sample.answer == "[1, 2]"
    assert sample.extra == {"reward_model": {"ground_truth": [1, 2]}, "answer": None}


def test_no_answer_column_when_no_reward_needs_one(tmp_path: Path, registry: Registry) -> None:
    (sample,) = open_dataset(
        lines(tmp_path / "a.jsonl", {"prompt": "q"}), config(answer_key=""), registry, "train"
    )
    assert sample.answer is None


GOOD = {"prompt": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{'prompt': 1}", "a.jsonl:2 is not valid JSON"),
        ('{"prompt": "q", "answer"', "a.jsonl:2 is not valid JSON"),
        ("[" * 100_000, "a.jsonl:2 is not valid JSON"),
        ([1, 2], "it is a list"),
        ({"promt": "q", "answer": "a"}, "did you mean data.prompt_key=promt?"),
        ({"prompt": "q"}, "a.jsonl:2 has no column 'answer'"),
        ({"prompt": "q", "answer": None}, "its answer is null"),
        ({"prompt": " ", "answer": "a"}, "its prompt is empty"),
        ({"prompt": 3, "answer": "a"}, "neither a text nor a list"),
        ({"prompt": [], "answer": "a"}, "neither a text nor a list"),
        ({"prompt": ["q"], "answer": "a"}, "a chat message of its prompt is"),
        ({"prompt": [{"role": "human", "content": "q"}], "answer": "a"}, "needs a role"),
        ({"prompt": [{"role": "user", "content": None}], "answer": "a"}, "needs a role"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "answer": "a"},
            "ends with the assistant's turn",
        ),
    ],
)
def test_unusable_rows_are_told_with_file_and_line(
    tmp_path: Path, registry: Registry, row: object, told: str
) -> None:
    error = failure(lines(tmp_path / "a.jsonl", GOOD, row), registry)
    assert isinstance(error, DataError)
    assert f"{tmp_path / 'a.jsonl'}:2" in error.what
    assert told in str(error)


def test_empty_and_absent(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert "is empty" in failure(str(tmp_path / "a.jsonl"), registry).what
    assert "does not exist" in failure(str(tmp_path / "b.jsonl"), registry).what
    (tmp_path / "c.jsonl").mkdir()
    assert "is not a file" in failure(str(tmp_path / "c.jsonl"), registry).what


def test_wrong_options(tmp_path: Path, registry: Registry) -> None:
    spec = lines(tmp_path / "a.jsonl", GOOD)
    assert "did you mean limit?" in str(failure(spec, registry, options={"limt": 3}))
    assert isinstance(failure(spec, registry, options={"limit": 0}), ConfigError)
    assert isinstance(failure(spec, registry, options={"plain": 1}), ConfigError)


def test_parquet_is_read_like_jsonl(tmp_path: Path, registry: Registry) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "answer": i, "level": i} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    samples = open_dataset(str(tmp_path / "a.parquet"), config(), registry, "train")
    assert [sample.answer for sample in samples] == ["0", "1", "2"]
    assert samples[2].messages == ({"role": "user", "content": "q2"},)
    assert samples[2].extra == {"level": 2}
    assert samples[2].id == "a.parquet:2"


def test_bad_parquet(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut")
    assert "not a usable .parquet file" in failure(str(tmp_path / "a.parquet"), registry).what
    rows = [{"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert "b.parquet, row 1," in failure(str(tmp_path / "b.parquet"), registry).what


def test_missing_pyarrow_tells_what_to_install(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert failure(str(tmp_path / "a.parquet"), registry).fix == 'pip install "grpo-core[parquet]"'


def test_registered_datasets(registry: Registry) -> None:
    seen = []

    def opener(spec: str, data: DataConfig) -> Sequence[Sample]:
        seen.append((spec, dict(data.options)))
        return [Sample(id="1", messages=({"role": "user", "content": "q"},))]

    registry.dataset("mine", opener)
    (sample,) = open_dataset("mine:easy", config(eval_options={"n": 1}, suffix="!"), registry, "eval")
    assert seen == [("mine:easy", {"n": 1})]
    assert sample.messages[0]["content"] == "q!"
    registry.dataset("nothing", lambda spec, data: [])
    assert "is empty" in failure("nothing", registry).what
    assert "mine" in failure("mien", registry).why
