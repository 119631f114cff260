from __future__ import annotations

import op_checks as check
import pytest
import torch

from grpo_core.ops.reference.attention import shared_prefix, varlen

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("case", check.LENGTHS)
def test_shared_prefix(case: str, window: int | None, dtype: torch.dtype) -> None:
    check.check_shared_prefix(shared_prefix, case, dtype, window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("case", check.LENGTHS)
def test_varlen(case: str, window: int | None, causal: bool) -> None:
    check.check_varlen(varlen, case, torch.float64, window, causal)
    check.check_varlen(varlen, case, torch.bfloat16, window, causal)


def test_packed_sequences_never_see_each_other() -> None:
    check.check_packed_isolation(varlen, shared_prefix)


def test_bad_packing_is_refused() -> None:
    check.check_bad_packing(varlen, shared_prefix)


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v = check.qkv(4, 3, 2, 4, 4, torch.float32)
    with pytest.raises(ValueError, match="3 query heads"):
        varlen(q, k, v, cu_seqlens=check.cumulative([4]), max_seqlen=4, scale=1.0, causal=True, window=None)
