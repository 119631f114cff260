"""The work of all ops that can be timed alone."""

from __future__ import annotations

from collections.abc import Mapping

from . import attention, caches, experts, pointwise, recurrent
from .work import Load

LOADS: Mapping[str, Load] = {
    **attention.LOADS,
    **caches.LOADS,
    **recurrent.LOADS,
    **experts.LOADS,
    **pointwise.LOADS,
}
"""Op -> work. `memory.*`, `comm.*` and `engine.*` are not calls of a function on tensors."""
