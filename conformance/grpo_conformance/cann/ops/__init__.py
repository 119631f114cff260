"""References of torch_npu's own operations, on the CPU: the documented formulas, and what the kernels refuse.

Written from torch_npu's operator documentation; each takes the arguments of the operation's schema. The
gradients are closed forms. `npu_grouped_matmul` and the attention for inference have none, as in torch_npu:
autograd loses them in silence there, and so it does here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def references() -> Mapping[str, Callable[..., Any]]:
    """Operation of the namespace `npu` -> its reference."""
    from . import casts, experts, fusion, fusion_v3, paged, pointwise

    return {
        **casts.TABLE,
        **experts.TABLE,
        **fusion.TABLE,
        **fusion_v3.TABLE,
        **paged.TABLE,
        **pointwise.TABLE,
    }
