"""AdamW in one Triton launch for all parameters with copies of one dtype.

Algorithm 2 of Loshchilov and Hutter 2019 in float32; the gradient's scale and the copy in the compute dtype
are part of the same pass. Memory: 16 bytes of each parameter are read, 12 written, 2 more for a bfloat16
copy; torch's fused step moves 34 for the same, and 42 with a scale. Some 15 operations for a parameter:
bound by memory. No sums, so equal bits from equal inputs.

Programs find their tensors by a table of addresses, as multi-tensor kernels do (NVIDIA apex's
`multi_tensor_apply` is the model): addresses change with the gradients, lists of pieces only with the sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 1 << 15
"""Parameters of one program: 32 of its tiles."""
BLOCK = 1024
ALIGNED = 16
"""Bytes: addresses that are multiples of it are read in vectors."""
_NAMES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@torch.no_grad()
def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], *, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decays: Sequence[float], grad_scale: float, copies: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """See `grpo_core.ops.fused.AdamW`. Gradients stay as they are.

    Raises ValueError for a tensor that is not contiguous, which could not be stepped in place, and for one
    of parameters, gradients or moments that is not float32.
    """
    rows = list(zip(params, grads, exp_avgs, exp_avg_sqs, copies, weight_decays, strict=True))
    by_dtype: dict[torch.dtype | None, list[tuple[tuple[Tensor, ...], float]]] = {}
    for *state, copy, weight_decay in rows:
        tensors = (*state, *(() if copy is None else (copy,)))
        _check(tensors)
        if state[0].numel():
            dtype = None if copy is None else copy.dtype
            by_dtype.setdefault(dtype, []).append((tensors, 1 - lr * weight_decay))
    rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    for dtype, chosen in by_dtype.items():
        device = chosen[0][0][0].device
        addresses = [x.data_ptr() for tensors, _ in chosen for x in tensors]
        table = torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)
        keeps = torch.tensor([keep for _, keep in chosen], dtype=torch.float32).to(device, non_blocking=True)
        owners, places, sizes = _pieces(tuple(tensors[0].numel() for tensors, _ in chosen), device)
        step_kernel[(owners.numel(),)](
            table, keeps, owners, places, sizes, beta1, 1 - beta1, beta2, 1 - beta2, rate, 1 / root, eps,
            grad_scale, COPY=None if dtype is None else _NAMES[dtype],
            ALIGNED=all(address % ALIGNED == 0 for address in addresses), PIECE=PIECE, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip


def _check(tensors: Sequence[Tensor]) -> None:
    for x in tensors:
        if not x.is_contiguous():
            raise ValueError(f"AdamW steps contiguous tensors in place, not one of strides {x.stride()}")
    for x in tensors[:4]:
        if x.dtype != torch.float32:
            raise ValueError(f"AdamW steps float32 parameters and moments, not {x.dtype}")


@functools.lru_cache(maxsize=16)
def _pieces(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(tensor, place in it) of each piece, int32; sizes of the tensors, int64."""
    pieces = [(i, place) for i, size in enumerate(sizes) for place in range(triton.cdiv(size, PIECE))]
    owners = torch.tensor([i for i, _ in pieces], dtype=torch.int32)
    places = torch.tensor([place for _, place in pieces], dtype=torch.int32)
    return owners.to(device), places.to(device), torch.tensor(sizes, dtype=torch.int64).to(device)


@triton.jit
def _address(table, place, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + place).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _step(
    param, grad, exp_avg, exp_avg_sq, copy, at, inside, keep, beta1, rest1, beta2, rest2, rate, inverse_root,
    eps, grad_scale, COPY: tl.constexpr,
):  # fmt: skip
    """BLOCK parameters; `inside` is None where all of them are."""
    g = tl.load(grad + at, mask=inside) * grad_scale
    m = tl.load(exp_avg + at, mask=inside)
    v = tl.load(exp_avg_sq + at, mask=inside)
    p = tl.load(param + at, mask=inside)
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    p = p * keep - rate * tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + eps)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(param + at, p, mask=inside)
    if COPY is not None:
        tl.store(copy + at, p.to(COPY), mask=inside)


@triton.jit
def step_kernel(
    table, keeps, owners, places, sizes, beta1, rest1, beta2, rest2, rate, inverse_root, eps, grad_scale,
    COPY: tl.constexpr, ALIGNED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One piece of one tensor: its parameter, gradient and moments, and the copy where COPY is a dtype.

    Only the last tile of a tensor is masked: a mask keeps loads from being vectors.
    """
    piece = tl.program_id(0)
    owner = tl.load(owners + piece).to(tl.int64)
    start = tl.load(places + piece).to(tl.int64) * PIECE
    rest = tl.load(sizes + owner) - start
    keep = tl.load(keeps + owner)
    first = owner * (4 if COPY is None else 5)
    param = _address(table, first, tl.float32, ALIGNED) + start
    grad = _address(table, first + 1, tl.float32, ALIGNED) + start
    exp_avg = _address(table, first + 2, tl.float32, ALIGNED) + start
    exp_avg_sq = _address(table, first + 3, tl.float32, ALIGNED) + start
    copy = param
    if COPY is not None:
        copy = _address(table, first + 4, COPY, ALIGNED) + start
    whole = min(rest, PIECE) // BLOCK * BLOCK
    for block in range(0, whole, BLOCK):
        at = block + tl.arange(0, BLOCK)
        _step(param, grad, exp_avg, exp_avg_sq, copy, at, None, keep, beta1, rest1, beta2, rest2, rate,
              inverse_root, eps, grad_scale, COPY)  # fmt: skip
    if whole < min(rest, PIECE):
        at = whole + tl.arange(0, BLOCK)
        _step(param, grad, exp_avg, exp_avg_sq, copy, at, at < rest, keep, beta1, rest1, beta2, rest2, rate,
              inverse_root, eps, grad_scale, COPY)  # fmt: skip
