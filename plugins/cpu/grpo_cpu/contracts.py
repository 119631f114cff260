"""Versions of the contracts that the offers of this plugin were written for, as data."""

from __future__ import annotations

from collections.abc import Mapping

WRITTEN_FOR: Mapping[str, int] = {"loss.logprob": 1, "moe.experts": 1}
"""Other ops: version 0."""
