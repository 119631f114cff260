"""Checks of a host that are the same for every maker of chips: limits, shared memory, network interfaces."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from .doctor import ADVICE, MISSING, OK, UNKNOWN, WRONG, Check

SHARED = Path("/dev/shm")
INTERFACES = Path("/sys/class/net")
LOOPBACK = "lo"
GIB = 2**30


def system_check(machines: tuple[str, ...], pythons: tuple[tuple[int, int], tuple[int, int]]) -> Check:
    """Whether there are wheels for this system: Linux on one of `machines`, Python from .. to `pythons`."""
    name, machine, version = platform.system(), platform.machine(), sys.version_info[:2]
    said = f"{name} {machine}, Python {platform.python_version()}"
    libc = " ".join(platform.libc_ver())
    if libc:
        said += f", {libc}"
    if name != "Linux" or machine not in machines:
        return Check(
            part="system", status=MISSING,
            why=f"{said}: the vendor has packages for Linux on {' and '.join(machines)}",
            fix="use such a host, or its container; plans on paper work here",
        )  # fmt: skip
    if not pythons[0] <= version <= pythons[1]:
        first, last = (".".join(map(str, one)) for one in pythons)
        return Check(
            part="system", status=WRONG, why=f"{said}: the vendor has packages for Python {first} to {last}",
            fix=f"make the environment with Python {last}",
        )  # fmt: skip
    return Check(part="system", status=OK, why=said)


def open_files(at_least: int) -> Check:
    """Whether a process may open enough files: collectives open a few for each pair of processes."""
    limit = _limit("RLIMIT_NOFILE")
    if limit is None:
        return Check(part="open files", status=UNKNOWN, why="this system has no such limit to ask for")
    said = f"ulimit -n is {'unlimited' if limit < 0 else limit}"
    if 0 <= limit < at_least:
        return Check(
            part="open files", status=ADVICE, why=f"{said}; many ranks and workers need more",
            fix=f"ulimit -n {at_least} (in a container: --ulimit nofile={at_least}:{at_least})",
        )  # fmt: skip
    return Check(part="open files", status=OK, why=said)


def locked_memory() -> Check:
    """Whether memory can be pinned without a limit, as network cards that read memory themselves want it."""
    limit = _limit("RLIMIT_MEMLOCK")
    if limit is None:
        return Check(part="locked memory", status=UNKNOWN, why="this system has no such limit to ask for")
    if limit < 0:
        return Check(part="locked memory", status=OK, why="ulimit -l is unlimited")
    return Check(
        part="locked memory", status=ADVICE,
        why=f"ulimit -l is {limit // 1024} KiB; RDMA between hosts registers whole buffers",
        fix="ulimit -l unlimited (in a container: --ulimit memlock=-1)",
    )  # fmt: skip


def shared_memory(at_least: int, folder: Path = SHARED) -> Check:
    """Whether /dev/shm is large enough; containers get 64 MiB of it unless told otherwise."""
    try:
        facts = os.statvfs(folder)
    except (OSError, AttributeError):
        return Check(part="shared memory", status=UNKNOWN, why=f"{folder} is not here")
    size = facts.f_blocks * facts.f_frsize
    said = f"{folder} has {size / GIB:.1f} GiB"
    if size < at_least:
        return Check(
            part="shared memory", status=ADVICE, why=f"{said}; ranks of one host exchange data through it",
            fix=f"in a container: --shm-size={at_least // GIB}g or --ipc=host",
        )  # fmt: skip
    return Check(part="shared memory", status=OK, why=said)


def network(variable: str, environment: Mapping[str, str], folder: Path = INTERFACES) -> Check:
    """Whether the interface that `variable` names is here and up; without it, which ones there are.

    The value is a list of beginnings of names, split at commas; a leading "^" takes them out instead, "="
    asks for the whole name.
    """
    up = sorted(path.name for path in folder.glob("*") if path.name != LOOPBACK and _is_up(path))
    said = f"up: {', '.join(up) or 'none but the loopback'}"
    value = environment.get(variable, "")
    if not value:
        if len(up) <= 1:
            return Check(part="network", status=OK, why=f"{said}; one host needs no more")
        return Check(
            part="network", status=ADVICE, why=f"{said}; between hosts the library may take the wrong one",
            fix=f"export {variable}=<the interface that the hosts reach each other by>",
        )  # fmt: skip
    if not _chosen(value, [*up, LOOPBACK]):
        return Check(
            part="network", status=WRONG, why=f"{variable}={value} leaves no interface; {said}",
            fix=f"unset {variable}, or name one that is up",
        )  # fmt: skip
    return Check(part="network", status=OK, why=f"{variable}={value}; {said}")


def _chosen(value: str, names: list[str]) -> list[str]:
    inverted, exact = value.startswith("^"), value.lstrip("^").startswith("=")
    listed = [item for item in value.lstrip("^").lstrip("=").split(",") if item]

    def named(name: str) -> bool:
        return any(name == item if exact else name.startswith(item) for item in listed)

    return [name for name in names if named(name) != inverted]


def _is_up(interface: Path) -> bool:
    try:
        return (interface / "operstate").read_text().strip() in ("up", "unknown")
    except OSError:
        return False


def _limit(name: str) -> int | None:
    """The soft limit of this process, -1 for unlimited, None where the system has none."""
    try:
        import resource
    except ImportError:
        return None
    soft = resource.getrlimit(getattr(resource, name))[0]
    return -1 if soft == resource.RLIM_INFINITY else soft
