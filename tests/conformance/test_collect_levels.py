"""Which levels a run has."""

from __future__ import annotations

import pytest

from grpo_conformance.collect import pick_levels
from grpo_core.errors import ConfigError


def test_levels_by_name_number_and_range() -> None:
    assert pick_levels(["ops"]) == (2,)
    assert pick_levels(["0-2", "memory"]) == (0, 1, 2, 3)
    assert pick_levels(["3", "0"]) == (0, 3)


def test_without_a_choice_a_run_has_every_level_of_the_release() -> None:
    assert pick_levels([])[:4] == (0, 1, 2, 3)


@pytest.mark.parametrize("name", ["opps", "9", "0-9", "a-b"])
def test_a_level_that_does_not_exist_is_refused_with_the_list(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no level") as raised:
        pick_levels([name])
    assert "2 ops" in raised.value.why
