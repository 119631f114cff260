"""A process in which Triton interprets its kernels in numpy on CPU tensors, and what is asked of it there.

Triton reads TRITON_INTERPRET when a kernel is defined, its own library's included: the variable must stand
before triton is first imported. So the functions of a test run in a process of their own, started with it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest

from grpo_conformance.case import Case, Outcome, Target, check_of
from grpo_conformance.levels import ops
from grpo_conformance.target import open_target
from grpo_core.backend import import_pointer
from grpo_core.catalogue import Offer
from grpo_cuda import offers_moe, offers_triton


@contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """Submit functions of importable modules; what they raise is raised by the future's `result`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=mend)
        pool.submit(os.getpid).result()
    try:
        yield pool
    finally:
        pool.shutdown()


def mend() -> None:
    """What Triton's interpreter needs to be true to hardware, and quick enough for tests."""
    _mend_bfloat16()
    _patch_once()


def _patch_once() -> None:
    """Let the language be patched once in a launch.

    As of 3.9 each call of a function from within a kernel (`tl.sum` is one) patches all of it again, on top
    of the patches that are there, which takes milliseconds.
    """
    from triton.runtime import interpreter as module

    launch, done, languages = module.GridExecutor.__call__, set[frozenset[int]](), dict[Any, frozenset[int]]()

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return launch(self, *args, **kwargs)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in languages:
            known = {id(module.tl), id(module.tl.core)}
            languages[self.fn] = frozenset(known & {id(value) for value in self.fn.__globals__.values()})
        if languages[self.fn] not in done:
            done.add(languages[self.fn])
            module._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    module.GridExecutor.__call__ = launched
    module.InterpretedFunction.__call__ = called


def _mend_bfloat16() -> None:
    """Give Triton's interpreter the bfloat16 of a GPU.

    As of 3.9 it keeps bfloat16 as 16-bit integers: it multiplies them as such in `tl.dot`, and it truncates
    where hardware rounds to the nearest, ties to even.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def mended_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return widened(src)
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(src.data, order="C")).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    def mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.cast_impl = mended_cast
    InterpreterBuilder.create_dot = mended_dot


@functools.cache
def host_target() -> Target:
    """The host, with the CUDA plugin's own kernels as if they were for it; captured in no graph there."""
    chosen: dict[str, tuple[Offer, ...]] = {}
    for impl in (*offers_triton.OFFERS, *offers_moe.OFFERS):
        # Pages are read by the kernel for them.
        if impl.name != "triton" and impl.op != "mla.cache":
            continue
        here = replace(impl, device="cpu", graph=False)
        chosen[impl.op] = (*chosen.get(impl.op, ()), Offer(plugin="cuda", impl=here))
    return replace(open_target("cpu"), offers=chosen)


def cases() -> list[Case]:
    """What the conformance suite asks of them."""
    return list(ops.cases(host_target(), quick=False))


def ask(case: Case) -> Outcome:
    """One case, in this process."""
    return check_of(case)(host_target(), **case.args)


def check(function: str, kernel: str, *args: Any, **rest: Any) -> None:
    """Call "module:function" on the plugin's "module:function", in this process."""
    import_pointer(function)(import_pointer(f"grpo_cuda.{kernel}"), *args, **rest)
