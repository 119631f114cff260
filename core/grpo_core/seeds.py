"""Seeds derived from what they are for, so that nothing random has to be saved or shared."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else (BLAKE2b of their text)."""
    return _number(_hash(parts))


def derive_seeds(*parts: int | str, count: int) -> tuple[int, ...]:
    """`derive_seed(*parts, i)` for i = 0..count - 1; the common parts are read once."""
    base = _hash((*parts, ""))
    seeds = []
    for index in range(count):
        own = base.copy()
        own.update(str(index).encode())
        seeds.append(_number(own))
    return tuple(seeds)


def _hash(parts: tuple[int | str, ...]) -> hashlib.blake2b:
    return hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8)


def _number(hashed: hashlib.blake2b) -> int:
    return int.from_bytes(hashed.digest(), "little") >> 1
