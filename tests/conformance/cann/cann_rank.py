"""One rank of a group over the simulated HCCL, without torch: the library by ctypes, orders on stdin.

    python cann_rank.py LIBRARY NAME SIZE RANK

Each line of input is a Python expression in which `hccl` is a `Rank`; its value, or the error, is printed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from typing import Any

CODES = {"b": 0, "h": 1, "i": 2, "f": 4, "q": 5, "B": 7, "H": 8, "I": 9, "d": 10}
"""HCCL's data types by the type codes of `array`."""
OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3}


class HcclError(Exception):
    """A result that is not 0, with the library's text."""


class Item(ctypes.Structure):
    _fields_ = [
        ("receives", ctypes.c_int), ("data", ctypes.c_void_p), ("count", ctypes.c_uint64),
        ("dtype", ctypes.c_int), ("peer", ctypes.c_uint32),
    ]  # fmt: skip


class Rank:
    """The calls, on arrays of numbers."""

    def __init__(self, library: str, name: str, size: int, rank: int) -> None:
        self.lib = ctypes.CDLL(library)
        self.lib.aclGetRecentErrMsg.restype = ctypes.c_char_p
        self.size, self.rank = size, rank
        self.comm = ctypes.c_void_p()
        root = ctypes.create_string_buffer(name.encode(), 4108)
        self.check(self.lib.HcclCommInitRootInfo(size, root, rank, ctypes.byref(self.comm)))

    def check(self, result: int) -> None:
        if result:
            raise HcclError(f"{result}: {(self.lib.aclGetRecentErrMsg() or b'').decode()}")

    def all_reduce(self, numbers: list[Any], op: str, code: str = "f") -> list[Any]:
        given = array(code, numbers)
        self.check(self.lib.HcclAllReduce(
            place(given), place(given), ctypes.c_uint64(len(given)), CODES[code], OPS[op], self.comm, None
        ))  # fmt: skip
        return given.tolist()

    def raw_reduce(self, raw: bytes, dtype: int, op: str) -> str:
        """Sum 16-bit floats given as bytes; the result as hexadecimal digits."""
        given = array("B", raw)
        count = ctypes.c_uint64(len(raw) // 2)
        self.check(self.lib.HcclAllReduce(place(given), place(given), count, dtype, OPS[op], self.comm, None))
        return given.tobytes().hex()

    def reduce_scatter(self, numbers: list[Any], op: str) -> list[Any]:
        given, out = array("f", numbers), array("f", [0.0] * (len(numbers) // self.size))
        count = ctypes.c_uint64(len(out))
        self.check(self.lib.HcclReduceScatter(place(given), place(out), count, 4, OPS[op], self.comm, None))
        return out.tolist()

    def all_gather(self, numbers: list[Any]) -> list[Any]:
        given, out = array("q", numbers), array("q", [0] * (len(numbers) * self.size))
        self.check(self.lib.HcclAllGather(
            place(given), place(out), ctypes.c_uint64(len(given)), 5, self.comm, None
        ))  # fmt: skip
        return out.tolist()

    def broadcast(self, numbers: list[Any], root: int) -> list[Any]:
        given = array("i", numbers)
        count = ctypes.c_uint64(len(given))
        self.check(self.lib.HcclBroadcast(place(given), count, 2, root, self.comm, None))
        return given.tolist()

    def all_to_all(self, numbers: list[Any], counts: list[int], expected: list[int]) -> list[Any]:
        given, out = array("i", numbers), array("i", [0] * sum(expected))
        self.check(self.lib.HcclAlltoAllV(
            place(given), sizes(counts), starts(counts), 2, place(out), sizes(expected), starts(expected), 2,
            self.comm, None,
        ))  # fmt: skip
        return out.tolist()

    def exchange(self, numbers: list[Any], peer: int) -> list[Any]:
        """A send and a receive in one batch, the receive first."""
        given, out = array("i", numbers), array("i", [0] * len(numbers))
        items = (Item * 2)(
            Item(1, place(out).value, len(out), 2, peer), Item(0, place(given).value, len(given), 2, peer)
        )
        self.check(self.lib.HcclBatchSendRecv(items, 2, self.comm, None))
        return out.tolist()

    def send(self, numbers: list[Any], peer: int) -> None:
        given = array("i", numbers)
        self.check(self.lib.HcclSend(place(given), ctypes.c_uint64(len(given)), 2, peer, self.comm, None))

    def receive(self, count: int, peer: int) -> list[Any]:
        out = array("i", [0] * count)
        self.check(self.lib.HcclRecv(place(out), ctypes.c_uint64(count), 2, peer, self.comm, None))
        return out.tolist()

    def group(self, numbers: list[Any], peer: int) -> list[Any]:
        """A receive and then a send, as one group."""
        self.check(self.lib.HcclGroupStart())
        given, out = array("i", numbers), array("i", [0] * len(numbers))
        count = ctypes.c_uint64(len(out))
        self.check(self.lib.HcclRecv(place(out), count, 2, peer, self.comm, None))
        self.check(self.lib.HcclSend(place(given), count, 2, peer, self.comm, None))
        self.check(self.lib.HcclGroupEnd())
        return out.tolist()

    def barrier(self) -> None:
        self.check(self.lib.HcclBarrier(self.comm, None))


def place(numbers: array[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.buffer_info()[0])


def sizes(counts: list[int]) -> Any:
    return (ctypes.c_uint64 * len(counts))(*counts)


def starts(counts: list[int]) -> Any:
    return sizes([sum(counts[:i]) for i in range(len(counts))])


def main() -> None:
    library, name, size, rank = sys.argv[1:]
    try:
        hccl = Rank(library, name, int(size), int(rank))
    except HcclError as error:
        print(repr(f"HcclError {error}"), flush=True)
        return
    print(repr("ready"), flush=True)
    for line in sys.stdin:
        try:
            said = eval(line, {"hccl": hccl, "os": os})
        except HcclError as error:
            said = f"HcclError {error}"
        print(repr(said), flush=True)


if __name__ == "__main__":
    main()
