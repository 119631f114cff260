"""The families of all ops that this level asks about."""

from __future__ import annotations

from collections.abc import Mapping

from . import attention, caches, delta, linear, mla, moe, pointwise, sample
from .family import Family

FAMILIES: Mapping[str, Family] = {
    **attention.FAMILIES,
    **caches.FAMILIES,
    **mla.FAMILIES,
    **delta.FAMILIES,
    **moe.FAMILIES,
    **pointwise.FAMILIES,
    **linear.FAMILIES,
    **sample.FAMILIES,
}
