"""Questions to `linear.*`, `loss.logprob` and `optim.adamw`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import oracles
from .facts import Facts
from .family import Family
from .question import DTYPES, Question, Tensors, normal, seeded

SIZES: Mapping[str, tuple[int, int, int]] = {
    "usual": (9, 64, 96), "one row": (1, 64, 96), "no rows": (0, 64, 96), "odd sizes": (7, 33, 19),
    "one feature": (5, 64, 1), "above 2^16 elements": (513, 64, 130), "without bias": (9, 64, 96),
    "long sums": (5, 8192, 33), "main gradient": (9, 64, 96), "main gradient without bias": (70, 48, 32),
}  # fmt: skip
"""Rows, inputs, outputs."""
LINEAR_QUICK = ("usual", "above 2^16 elements", "main gradient", "long sums")
LOGPROB_AXES: Mapping[str, Sequence[Any]] = {
    "hidden_size": (64, 128, 256), "vocab_size": (300, 1024, 32000),
}  # fmt: skip
LOGPROB_ENDS: Mapping[str, Any] = {
    "hidden size": (("hidden_size",), (8, 320)), "vocabulary": (("vocab_size",), (2, 5000)),
}  # fmt: skip
LOGPROB_SHAPES: Mapping[str, Facts] = {
    "usual": {}, "one token": {}, "no tokens": {}, "large logits": {}, "temperature": {},
    "above 2^16 elements": {}, "vocabulary above 2^16": {"vocab_size": 65600}, "isolation": {},
    "main gradient": {},
}  # fmt: skip
STEPS = 3
ADAMW: dict[str, float] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
TENSORS: Mapping[str, Sequence[tuple[int, ...]]] = {
    "usual": ((7, 5), (300,), (1,)), "scaled gradients": ((7, 5), (300,), (1,)),
    "above 2^16 elements": ((263, 257), (3,)), "small gradients": ((7, 5), (300,), (1,)),
}  # fmt: skip


def dense_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """With autograd's gradients; or with the weight's added to a float32 tensor."""
    T, K, N = SIZES[shape]
    tensors = _linear(T, K, N, DTYPES[dtype], bias="without bias" not in shape)
    tensors |= _of_one_sign(tensors) if shape == "long sums" else {}
    if not shape.startswith("main gradient"):
        yield Question(
            label=shape,
            tensors=tensors,
            call=lambda implementation, given: implementation(
                given["x"], given["weight"], given.get("bias"), main_grad_NK=None
            ),
            oracle=_affine,
            dtype=DTYPES[dtype],
            differentiable=tuple(tensors),
            seed=41,
        )
        return
    yield _accumulated(shape, tensors, DTYPES[dtype])


def _linear(T: int, K: int, N: int, dtype: torch.dtype, *, bias: bool) -> dict[str, Tensor]:
    generator = seeded(41)
    tensors = {
        "x": normal(generator, T, K, dtype=dtype),
        "weight": normal(generator, N, K, dtype=dtype, scale=K**-0.5),
    }
    return {**tensors, "bias": normal(generator, N, dtype=dtype)} if bias else tensors


def _of_one_sign(tensors: Tensors) -> dict[str, Tensor]:
    """A sum of such terms stands still half-way where it is kept in a dtype of few digits."""
    return {name: x.abs() for name, x in tensors.items() if name != "bias"}


def _affine(given: Tensors) -> Tensor:
    y_TN = torch.einsum("tk,nk->tn", given["x"], given["weight"])
    return y_TN + given["bias"] if "bias" in given else y_TN


def _accumulated(label: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> Question:
    (T, _), N = tensors["x"].shape, tensors["weight"].shape[0]
    tensors["main_grad"] = normal(seeded(42), *tensors["weight"].shape)
    tensors["g_y"] = normal(seeded(43), T, N, dtype=dtype)

    def call(implementation: Any, given: Tensors) -> Any:
        x, weight = (given[name].detach().requires_grad_() for name in ("x", "weight"))
        with torch.enable_grad():
            y = implementation(x, weight, given.get("bias"), main_grad_NK=given["main_grad"])
            y.backward(given["g_y"])
        rest = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return y, x.grad, rest

    def oracle(given: Tensors) -> Any:
        g_y = given["g_y"]
        main = given["main_grad"] + torch.einsum("tn,tk->nk", g_y, given["x"])
        return _affine(given), torch.einsum("tn,nk->tk", g_y, given["weight"]), 0 * given["weight"], main

    return Question(
        label=label, tensors=tensors, call=call, oracle=oracle, dtype=dtype, own_rounding=True, seed=41,
        names=("y", "gradient of x", "gradient of weight for autograd", "main gradient"),
        written=("main_grad",), magnitudes={"main gradient": float(T) ** 0.5},
    )  # fmt: skip


def packed_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """The layer as it was built, twice, and after new values."""
    T, K, N = SIZES[shape]
    tensors = _linear(T, K, N, DTYPES[dtype], bias=shape != "without bias")
    tensors["weight 2"] = normal(seeded(44), N, K, dtype=DTYPES[dtype], scale=K**-0.5)
    tensors |= _of_one_sign(tensors) if shape == "long sums" else {}
    if "bias" in tensors:
        tensors["bias 2"] = normal(seeded(45), N, dtype=DTYPES[dtype])

    def call(implementation: Any, given: Tensors) -> Any:
        bias = given["bias"].clone() if "bias" in given else None
        layer = implementation(given["weight"].clone(), bias)
        first, again = layer(given["x"]), layer(given["x"])
        layer.update(given["weight 2"], given.get("bias 2"))
        if layer.nbytes() < 0:
            raise ValueError(f"a layer that holds {layer.nbytes()} bytes")
        return first, again, layer(given["x"])

    def oracle(given: Tensors) -> Any:
        after = {name: given[f"{name} 2"] for name in ("weight", "bias") if f"{name} 2" in given}
        first = _affine(given)
        return first, first, _affine({"x": given["x"], **after})

    yield Question(
        label=shape, tensors=tensors, call=call, oracle=oracle, dtype=DTYPES[dtype], seed=44,
        names=("y", "y again", "y after an update"),
    )  # fmt: skip


def logprob_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Both results and the gradients through both, then through each alone."""
    C, V, generator = int(facts["hidden_size"]), int(facts["vocab_size"]), seeded(46)
    T = {"one token": 1, "no tokens": 0, "above 2^16 elements": 65536 // V + 2,
         "vocabulary above 2^16": 2}.get(shape, 6)  # fmt: skip
    temperature = 0.6 if shape == "temperature" else 1.0
    size = 30.0 if shape == "large logits" else 2.0
    tensors = {
        "hidden": normal(generator, T, C, dtype=DTYPES[dtype]),
        "head": normal(generator, V, C, dtype=DTYPES[dtype], scale=size * C**-0.5),
        "labels": torch.randint(0, V, (T,), generator=generator),
    }
    if T > 1:
        tensors["labels"][:2] = torch.tensor([0, V - 1])
    largest = 4 * size / temperature
    if shape == "main gradient":
        yield _main_head(shape, tensors, DTYPES[dtype], largest)
        return
    for chosen in ((0, 1), (0,), (1,)) if shape == "usual" else ((0, 1),):
        names = tuple(("log-probs", "entropies")[i] for i in chosen)

        def call(implementation: Any, given: Tensors, chosen: Sequence[int] = chosen) -> Any:
            hidden, head, labels = given["hidden"], given["head"], given["labels"]
            return _picked(implementation(hidden, head, labels, temperature=temperature, group=None), chosen)

        def oracle(given: Tensors, chosen: Sequence[int] = chosen) -> Any:
            hidden, head, labels = given["hidden"], given["head"], given["labels"]
            return _picked(oracles.logprob(hidden, head, labels, temperature), chosen)

        # Log-probs are differences of logits, which a product in the dtype may give rounded.
        yield Question(
            label=shape if len(chosen) == 2 else f"{shape}, {names[0]} alone", tensors=tensors, call=call,
            oracle=oracle, dtype=DTYPES[dtype], names=names, differentiable=("hidden", "head"), seed=46,
            magnitudes={"log-probs": largest, "entropies": largest}, **_sick(shape, names, T),
        )  # fmt: skip


def _main_head(label: str, inputs: Tensors, dtype: torch.dtype, largest: float) -> Question:
    """The head's gradient added to a float32 tensor."""
    tensors = {**inputs, "main_grad": normal(seeded(51), *inputs["head"].shape)}
    tensors["weights"] = normal(seeded(52), 2, inputs["labels"].shape[0])
    how = {"temperature": 1.0, "group": None}

    def call(implementation: Any, given: Tensors) -> Any:
        hidden, head = (given[name].detach().requires_grad_() for name in ("hidden", "head"))
        with torch.enable_grad():
            results = implementation(hidden, head, given["labels"], **how, main_grad_VC=given["main_grad"])
            torch.autograd.backward(results, tuple(given["weights"]))
        return *results, hidden.grad, torch.zeros_like(head) if head.grad is None else head.grad

    def oracle(given: Tensors) -> Any:
        hidden, head = (given[name].detach().requires_grad_() for name in ("hidden", "head"))
        with torch.enable_grad():
            results = oracles.logprob(hidden, head, given["labels"], 1.0)
        g_hidden, g_head = torch.autograd.grad(results, (hidden, head), tuple(given["weights"]))
        return (
            *(value.detach() for value in results),
            g_hidden,
            0 * given["head"],
            given["main_grad"] + g_head,
        )

    names = ("log-probs", "entropies", "gradient of hidden", "gradient of head for autograd", "main gradient")
    return Question(
        label=label, tensors=tensors, call=call, oracle=oracle, dtype=dtype, names=names,
        written=("main_grad",), own_rounding=dtype == torch.float64, seed=46,
        magnitudes={**dict.fromkeys(names[:2], largest), "main gradient": len(inputs["labels"]) ** 0.5},
    )  # fmt: skip


def _picked(results: Any, chosen: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(results[i] for i in chosen)


def _sick(shape: str, names: Sequence[str], T: int) -> dict[str, Any]:
    if shape != "isolation":
        return {}
    clean = torch.arange(T) != 3
    return {"poison": {"hidden": 3}, "judged": dict.fromkeys((*names, "gradient of hidden"), clean)}


def adamw_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Steps 1 to 3 from given states, bfloat16 copies of some parameters."""
    generator, sizes = seeded(47), TENSORS[shape]
    size, grad_scale = (1e-6 if shape == "small gradients" else 1.0), (0.25 if "scaled" in shape else 1.0)
    tensors: dict[str, Tensor] = {}
    for i, one in enumerate(sizes):
        tensors[f"param {i}"] = normal(generator, *one)
        tensors[f"exp_avg {i}"] = normal(generator, *one, scale=0.1 * size)
        tensors[f"exp_avg_sq {i}"] = normal(generator, *one, scale=size).square()
        if i != 1:
            tensors[f"copy {i}"] = normal(generator, *one, dtype=torch.bfloat16)
    written = tuple(tensors)
    for i, one in enumerate(sizes):
        for step in range(STEPS):
            tensors[f"grad {i} {step}"] = normal(generator, *one, scale=size)
    many = range(len(sizes))
    decays = [0.1 if i != 1 else 0.0 for i in many]

    def call(implementation: Any, given: Tensors) -> tuple[()]:
        for step in range(STEPS):
            implementation(
                [given[f"param {i}"] for i in many], [given[f"grad {i} {step}"] for i in many],
                [given[f"exp_avg {i}"] for i in many], [given[f"exp_avg_sq {i}"] for i in many],
                step=step + 1, weight_decays=decays, grad_scale=grad_scale,
                copies=[given.get(f"copy {i}") for i in many], **ADAMW,
            )  # fmt: skip
        return ()

    def oracle(given: Tensors) -> list[Tensor]:
        after: dict[str, Tensor] = {}
        for i in many:
            grads = [given[f"grad {i} {step}"] * grad_scale for step in range(STEPS)]
            state = (given[f"param {i}"], given[f"exp_avg {i}"], given[f"exp_avg_sq {i}"])
            param, first, second = _adamw(*state, grads, decays[i])
            after |= {
                f"param {i}": param,
                f"exp_avg {i}": first,
                f"exp_avg_sq {i}": second,
                f"copy {i}": param,
            }
        return [after[name] for name in written]

    yield Question(
        label=shape, tensors=tensors, call=call, oracle=oracle, dtype=torch.float32, names=written,
        written=written, spent=tuple(name for name in tensors if name.startswith("grad")),
        own_rounding=True, seed=47,
    )  # fmt: skip


def _adamw(
    param: Tensor, first: Tensor, second: Tensor, grads: Sequence[Tensor], weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2 of Loshchilov and Hutter 2019 with a schedule of 1."""
    beta1, beta2 = ADAMW["beta1"], ADAMW["beta2"]
    for step, grad in enumerate(grads, start=1):
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * second + (1 - beta2) * grad**2
        unbiased = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)) ** 0.5 + ADAMW["eps"])
        param = param - ADAMW["lr"] * (unbiased + weight_decay * param)
    return param, first, second


PACKED: Mapping[str, Facts] = {name: {} for name in SIZES if not name.startswith("main")}
FAMILIES = {
    "linear.dense": Family(
        axes={}, shapes={name: {} for name in SIZES}, quick=LINEAR_QUICK, questions=dense_questions,
        trained=("main gradient", "main gradient without bias"),
    ),
    "linear.packed": Family(axes={}, shapes=PACKED, quick=LINEAR_QUICK, questions=packed_questions),
    "loss.logprob": Family(
        axes=LOGPROB_AXES, shapes=LOGPROB_SHAPES, quick=("usual", "isolation", "main gradient"),
        questions=logprob_questions, ends=LOGPROB_ENDS, trained=("main gradient",),
        since={"main gradient": 1},
    ),
    "optim.adamw": Family(
        axes={}, shapes={name: {} for name in TENSORS}, quick=("usual",), questions=adamw_questions,
        dtypes=("float32",),
    ),
}  # fmt: skip
