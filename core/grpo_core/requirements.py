"""PEP 508 requirements held against installed metadata; nothing that is asked about is imported."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement


@functools.cache
def _parse(requirement: str) -> Requirement | str:
    # A tenth of the time of `grpo --help`, and most offers require nothing.
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(requirement)
    except InvalidRequirement as error:
        return str(error).splitlines()[0]


def requirement_problem(requirement: str) -> str | None:
    """Why the text is not a PEP 508 requirement, or None."""
    parsed = _parse(requirement)
    return parsed if isinstance(parsed, str) else None


def required_name(requirement: str) -> str | None:
    """The distribution that a requirement is about, or None for a text that is none."""
    parsed = _parse(requirement)
    return None if isinstance(parsed, str) else parsed.name


@functools.cache
def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None; looked up once in a process."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def unmet(requirement: str) -> str | None:
    """Why an installed-package requirement does not hold, or None where it does.

    A marker that is false here (another system, another Python) means there is nothing to hold.
    Pre-releases count: vendors ship their torch backends as such.
    """
    parsed = _parse(requirement)
    if isinstance(parsed, str):
        return f"requirement {requirement!r} cannot be read: {parsed}"
    if parsed.marker is not None and not parsed.marker.evaluate():
        return None
    version = installed_version(parsed.name)
    if version is None:
        return f"needs {requirement}, not installed"
    if not parsed.specifier.contains(version, prereleases=True):
        return f"needs {requirement}, {version} is installed"
    return None


def forget() -> None:
    """Drop what was looked up; for a process that installs packages while it runs, such as a test."""
    installed_version.cache_clear()
    unmet.cache_clear()
