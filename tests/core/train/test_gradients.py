"""The buffer that an optimizer step's gradients are added up in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grpo_core.model.embedding import lookup
from grpo_core.model.layers import Linear, Weight
from grpo_core.ops.reference.fused import linear_dense
from grpo_core.ops.reference.memory import HostMemory
from grpo_core.train.gradients import Gradients, square_sums
from grpo_core.train.parameters import FlatParameters


class Model(nn.Module):
    """A table, a linear layer and a vector that knows nothing of main_grad."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        device = torch.device("cpu")
        self.embed = Weight(5, 4, device=device, dtype=dtype)
        self.linear = Linear(3, 4, bias=True, dense=linear_dense, device=device, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        x_TC = lookup(self.embed.weight, tokens_T, self.embed.main_grad)
        y_TN: torch.Tensor = self.linear(x_TC) * self.scale
        return y_TN


def made(dtype: torch.dtype) -> tuple[Model, FlatParameters, Gradients]:
    torch.manual_seed(0)
    model = Model(dtype)
    flat = FlatParameters(model, device=torch.device("cpu"), dtype=dtype)
    with torch.no_grad():
        for parameter in flat.parameters:
            parameter.copy_(torch.randn(parameter.shape))
    return model, flat, Gradients(flat, model, HostMemory())


BATCHES = [torch.tensor([0, 1, 1, 3]), torch.tensor([3, 2])]


def wanted(flat: FlatParameters, model: Model) -> dict[str, torch.Tensor]:
    """float64 gradients by name, from autograd alone."""
    values = {slot.name: p.detach().double() for slot, p in zip(flat.slots, flat.parameters, strict=True)}
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    for tokens_T in BATCHES:
        x_TC = leaves["embed.weight"][tokens_T]
        y_TN = (x_TC @ leaves["linear.weight"].T + leaves["linear.bias"]) * leaves["scale"]
        y_TN.square().sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def test_two_micro_batches_add_up_as_in_float64_step_after_step() -> None:
    model, flat, gradients = made(torch.float32)
    for _ in range(2):
        gradients.begin(single=False)
        for tokens_T in BATCHES:
            model(tokens_T).square().sum().backward()
        found = flat.views(gradients.total())
        for name, want in wanted(flat, model).items():
            torch.testing.assert_close(found[name].double(), want, rtol=1e-5, atol=1e-5)
        assert all(parameter.grad is None for parameter in flat.parameters)
        gradients.release()
        assert gradients.nbytes() == 0


def test_layers_are_lent_their_part_of_a_float32_sum_only_during_a_step() -> None:
    model, flat, gradients = made(torch.bfloat16)
    assert model.linear.main_grad is None
    gradients.begin(single=False)
    place = flat.views(gradients.total())["linear.weight"]
    assert model.linear.main_grad is not None and model.linear.main_grad.data_ptr() == place.data_ptr()
    gradients.release()
    assert model.linear.main_grad is None and model.embed.main_grad is None


def test_a_single_micro_batch_keeps_the_compute_dtype_until_there_are_several() -> None:
    model, _, gradients = made(torch.bfloat16)
    gradients.begin(single=True)
    model(BATCHES[0]).sum().backward()
    assert gradients.total().dtype == torch.bfloat16 and gradients.total().count_nonzero() > 0
    gradients.release()
    gradients.begin(single=False)
    assert gradients.total().dtype == torch.float32 and gradients.total().count_nonzero() == 0
    gradients.release()
    gradients.begin(single=True)
    assert gradients.total().dtype == torch.float32 and gradients.total().count_nonzero() == 0


def test_many_small_gradients_of_a_bfloat16_weight_are_not_lost_beside_a_large_one() -> None:
    model, flat, gradients = made(torch.bfloat16)
    gradients.begin(single=False)
    assert model.linear.main_grad is not None
    x_TK, ones = torch.ones(1, 4, dtype=torch.bfloat16), torch.ones(1, 3, dtype=torch.bfloat16)
    for size in (1.0, *(2.0**-10,) * 512):
        model.linear(x_TK).backward(ones * size)
    # In bfloat16 1 + 2^-10 is 1 again.
    assert torch.equal(flat.views(gradients.total())["linear.weight"], torch.full((3, 4), 1.5))


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 10_000, (1 << 20) + 5000])
def test_sums_of_squares_equal_float64(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 3
    exact = float(values.double().square().sum())
    # Rows of 4096 squares are summed in float32: a relative error of some 1e-7.
    assert sum(square_sums([values, values])) == pytest.approx(2 * exact, rel=1e-6)
