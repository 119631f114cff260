"""What the layers of a pass have in common: lists made when they are read, and things made once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import bounds, parent_list


def test_lengths_are_lists_of_ints_whatever_they_were_given_as() -> None:
    for given in ([0, 3, 5], (0, 3, 5), np.array([0, 3, 5]), lambda: np.array([0, 3, 5])):
        found = Common(cu_seqlens=given).cu_seqlens
        assert found == [0, 3, 5] and all(type(one) is int for one in found)
    empty = Common()
    assert (empty.cu_seqlens, empty.parents, empty.seqlens_k, empty.max_seqlen_k) == (None, None, None, 0)


def test_a_list_is_made_at_the_first_reading_and_once() -> None:
    made = []

    def lengths() -> list[int]:
        made.append(1)
        return [4, 2]

    common = Common(seqlens_k=lengths)
    assert made == []
    assert common.seqlens_k is common.seqlens_k and len(made) == 1


def test_what_offers_keep_is_made_once_for_each_key() -> None:
    common, made = Common(), []

    def make() -> None:
        made.append(1)

    for key in ("a", "a", ("a", 1), "a", ("a", 1)):
        assert common.once(key, make) is None
    assert len(made) == 2


def test_references_read_the_host_and_check_what_it_says() -> None:
    # A meta tensor has no values: reading one would raise.
    nothing = torch.empty(3, dtype=torch.int32, device="meta")
    assert bounds(nothing, 5, Common(cu_seqlens=[0, 3, 5])) == [0, 3, 5]
    with pytest.raises(ValueError, match="must rise"):
        bounds(nothing, 6, Common(cu_seqlens=[0, 3, 5]))
    assert parent_list(nothing[:2], 2, Common(parents=[-1, 0])) == [-1, 0]
    with pytest.raises(ValueError, match="earlier segment"):
        parent_list(nothing[:2], 2, Common(parents=[1, -1]))
