"""The embedding lookup against torch's, and its gradient in bfloat16."""

from __future__ import annotations

import torch

from grpo_core.model.embedding import lookup


def test_equals_torch_in_float64_values_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    tokens = torch.randint(7, (20,), generator=generator)
    weights = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    mine, theirs = table.clone().requires_grad_(), table.clone().requires_grad_()
    (lookup(mine, tokens) * weights).sum().backward()
    (torch.nn.functional.embedding(tokens, theirs) * weights).sum().backward()
    assert torch.equal(lookup(mine, tokens), theirs[tokens])
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_bfloat16_gradient_of_a_frequent_token_does_not_stop_at_256() -> None:
    table = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    lookup(table, torch.ones(1000, dtype=torch.int64)).sum().backward()
    assert table.grad.dtype == torch.bfloat16
    assert table.grad.tolist() == [[0.0] * 4, [1000.0] * 4, [0.0] * 4]


def test_main_grad_takes_the_gradient_unrounded_and_autograd_gets_none() -> None:
    table = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    main_grad = torch.full((3, 4), 0.5)
    lookup(table, torch.ones(257, dtype=torch.int64), main_grad).sum().backward()
    assert table.grad is None
    # 257.5 has no bfloat16.
    assert main_grad.tolist() == [[0.5] * 4, [257.5] * 4, [0.5] * 4]
