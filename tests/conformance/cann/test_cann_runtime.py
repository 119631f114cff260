"""Memory, streams and the few operators of the simulated CANN, without torch-npu."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from grpo_conformance.cann.build import SOURCES, defined, stand_ins

DTYPES = {
    torch.float32: 0, torch.float16: 1, torch.int8: 2, torch.int32: 3, torch.uint8: 4, torch.int64: 9,
    torch.float64: 11, torch.bool: 12, torch.bfloat16: 27,
}  # fmt: skip


def tensor_of(cann: ctypes.CDLL, x: torch.Tensor) -> ctypes.c_void_p:
    """The library's tensor over torch's memory."""
    rank = x.dim()
    made = cann.aclCreateTensor(
        (ctypes.c_int64 * rank)(*x.shape), ctypes.c_uint64(rank), DTYPES[x.dtype],
        (ctypes.c_int64 * rank)(*x.stride()), ctypes.c_int64(x.storage_offset()), 2,
        (ctypes.c_int64 * 1)(x.untyped_storage().nbytes()), ctypes.c_uint64(1),
        ctypes.c_void_p(x.untyped_storage().data_ptr()),
    )  # fmt: skip
    return ctypes.c_void_p(made)


def carried_out(cann: ctypes.CDLL, name: str, *words: object) -> int:
    """Both halves of an operator's call."""
    need, executor = ctypes.c_uint64(), ctypes.c_void_p()
    status: int = getattr(cann, f"{name}GetWorkspaceSize")(*words, ctypes.byref(need), ctypes.byref(executor))
    return status or getattr(cann, name)(None, need, executor, None)


def test_memory_has_a_capacity_and_holds_nan_until_written(
    cann: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_CANN_MEMORY", str(1 << 20))
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cann.aclrtGetMemInfo(0, ctypes.byref(free), ctypes.byref(total))
    before = free.value
    pointer, second = ctypes.c_void_p(), ctypes.c_void_p()
    assert cann.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(700_000), 0) == 0
    assert cann.aclrtMalloc(ctypes.byref(second), ctypes.c_size_t(700_000), 0) == 207001
    assert b"do not fit" in cann.aclGetRecentErrMsg()
    assert math.isnan(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))[0])
    assert pointer.value is not None and pointer.value % 512 == 0
    cann.aclrtFree(pointer)
    cann.aclrtGetMemInfo(0, ctypes.byref(free), ctypes.byref(total))
    assert (free.value, total.value) == (before, 1 << 20)


def test_physical_memory_keeps_its_content_between_two_addresses(cann: ctypes.CDLL) -> None:
    size = ctypes.c_size_t(2 << 20)
    first, second, block = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    for at in (first, second):
        assert cann.aclrtReserveMemAddress(ctypes.byref(at), size, 0, None, ctypes.c_uint64(0)) == 0
    assert cann.aclrtMallocPhysical(ctypes.byref(block), size, None, ctypes.c_uint64(0)) == 0
    assert cann.aclrtMapMem(first, size, ctypes.c_size_t(0), block, ctypes.c_uint64(0)) == 0
    ctypes.memset(first, 7, 100)
    assert cann.aclrtUnmapMem(first) == 0
    assert cann.aclrtMapMem(second, size, ctypes.c_size_t(0), block, ctypes.c_uint64(0)) == 0
    assert ctypes.string_at(second, 100) == b"\x07" * 100
    assert cann.aclrtUnmapMem(second) == 0 and cann.aclrtUnmapMem(second) != 0
    assert cann.aclrtFreePhysical(block) == 0
    assert cann.aclrtReleaseMemAddress(first) == 0 and cann.aclrtReleaseMemAddress(second) == 0


def test_devices_follow_the_variable_that_limits_them(
    cann: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_CANN_DEVICES", "4")
    count = ctypes.c_uint32()
    for visible, want in ((None, 4), ("2,3", 2), ("0", 1), ("", 0), ("1,9,2", 1)):
        if visible is not None:
            monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
        cann.aclrtGetDeviceCount(ctypes.byref(count))
        assert count.value == want, visible


def test_copies_go_between_strides_dtypes_and_broadcasts(cann: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    source = torch.randn(3, 1, 5)[:, :, ::2]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool):
        into = torch.zeros(2, 3, 4, 3).to(dtype).transpose(1, 2)
        assert (
            carried_out(
                cann, "aclnnInplaceCopy", tensor_of(cann, into), tensor_of(cann, source[:, 0][None, None])
            )
            == 0
        )
        want = torch.zeros(2, 3, 4, 3).to(dtype).transpose(1, 2)
        want.copy_(source[:, 0][None, None])
        assert torch.equal(into, want), dtype


def test_zero_divide_cat_and_pad(cann: ctypes.CDLL) -> None:
    x = torch.arange(12.0).view(3, 4)
    part = x[:, 1:3]
    assert carried_out(cann, "aclnnInplaceZero", tensor_of(cann, part)) == 0
    assert x[:, 1:3].eq(0).all() and x[:, 3].tolist() == [3.0, 7.0, 11.0]
    half = (ctypes.c_double * 1)(2.0)
    scalar = ctypes.c_void_p(cann.aclCreateScalar(half, 11))
    assert carried_out(cann, "aclnnInplaceDivs", tensor_of(cann, x), scalar) == 0
    assert x[:, 3].tolist() == [1.5, 3.5, 5.5]
    parts = [torch.ones(2, 1), torch.full((2, 2), 2.0), torch.empty(0)]
    out = torch.empty(2, 3)
    pointers = (ctypes.c_void_p * 3)(*[tensor_of(cann, p).value for p in parts])
    listed = ctypes.c_void_p(cann.aclCreateTensorList(pointers, ctypes.c_uint64(3)))
    assert carried_out(cann, "aclnnCat", listed, ctypes.c_int64(-1), tensor_of(cann, out)) == 0
    assert out.tolist() == [[1.0, 2.0, 2.0]] * 2
    small, wide = torch.arange(4.0).view(2, 2), torch.empty(3, 5)
    pads = ctypes.c_void_p(cann.aclCreateIntArray((ctypes.c_int64 * 4)(1, 2, 0, 1), ctypes.c_uint64(4)))
    assert (
        carried_out(cann, "aclnnConstantPadNd", tensor_of(cann, small), pads, scalar, tensor_of(cann, wide))
        == 0
    )
    assert torch.equal(wide, torch.nn.functional.pad(small, (1, 2, 0, 1), value=2.0))


def test_calls_are_recorded_on_request(cann: ctypes.CDLL) -> None:
    cann.grpo_cann_record(1)
    x = torch.ones(2)
    carried_out(cann, "aclnnInplaceZero", tensor_of(cann, x))
    assert cann.grpo_cann_recorded() == b"aclnnInplaceZero\n"
    cann.grpo_cann_record(0)
    assert cann.grpo_cann_recorded() == b""


def test_stand_ins_refuse_what_they_do_not_compute() -> None:
    text = stand_ins(
        ["aclnnFoo", "aclnnFooGetWorkspaceSize", "HcclFoo", "aclmdlRIFoo", "aclrtFoo", "aclCreateFoo"]
    )
    refused = [line for line in text.splitlines() if "cann_refuse" in line]
    assert len(refused) == 4 and sum("aclnnFoo is not computed" in line for line in refused) == 2
    assert 'long aclrtFoo(void) { cann_record("aclrtFoo"); return 0; }' in text


def test_functions_of_our_sources_are_found() -> None:
    found = defined(SOURCES)
    assert {
        "aclrtMalloc",
        "HcclAllReduce",
        "aclnnCatGetWorkspaceSize",
        "aclCreateTensor",
        "aclGetRecentErrMsg",
    } <= found
    assert not found & {"take", "copy", "walk", "await"}
