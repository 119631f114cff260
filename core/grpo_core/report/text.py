"""Values as HTML text."""

from __future__ import annotations

import re
from html import escape
from typing import Any

MAX_TEXT = 3000
"""Characters shown of a prompt or completion."""

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def text(value: object, limit: int = MAX_TEXT) -> str:
    """Any value as HTML text; what a model wrote may hold anything."""
    plain = CONTROL.sub("\ufffd", str(value))
    if len(plain) > limit:
        plain = f"{plain[:limit]} ... ({len(plain) - limit} more characters)"
    return escape(plain, quote=True)


def number(value: Any, form: str = ".3g") -> str:
    """A number in a format, a dash for anything else."""
    return format(value, form) if isinstance(value, int | float) else "-"
