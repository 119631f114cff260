from __future__ import annotations

from grpo_core.seeds import derive_seed, derive_seeds


def test_many_seeds_are_those_derived_one_by_one() -> None:
    found = derive_seeds(7, "rollout", 3, count=1001)
    assert found == tuple(derive_seed(7, "rollout", 3, index) for index in range(1001))
    assert len(set(found)) == 1001 and all(0 <= seed < 1 << 63 for seed in found)


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert derive_seed(0, "order") == 1152760118607444429
