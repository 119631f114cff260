"""AdamW over flat parameters, a cache-sized piece at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .parameters import FlatParameters, pieces

if TYPE_CHECKING:
    from ..config import TrainConfig
    from ..ops.fused import AdamW
    from .gradients import Gradients

HOST_PIECE = 1 << 18
DEVICE_PIECE = 1 << 24
"""Elements updated by one call: on a host the scratch buffers stay in its caches, on a device a call costs
more than its memory."""


class Optimizer:
    """The float32 moments and the number of steps taken."""

    def __init__(self, flat: FlatParameters, adamw: AdamW, config: TrainConfig) -> None:
        device = flat.weights_P.device
        self.flat, self.adamw, self.config = flat, adamw, config
        self.exp_avg_P = torch.zeros(flat.weights_P.shape, device=device, dtype=torch.float32)
        self.exp_avg_sq_P = torch.zeros(flat.weights_P.shape, device=device, dtype=torch.float32)
        self.step_count = 0
        size = HOST_PIECE if device.type == "cpu" else DEVICE_PIECE
        self.pieces = tuple(pieces(flat.slots, size))
        longest = max(piece.stop - piece.start for piece in self.pieces)
        self.master_scratch = torch.zeros(longest, device=device, dtype=torch.float32)
        self.gradient_scratch = torch.zeros(longest, device=device, dtype=torch.float32)

    @torch.no_grad()
    def update(self, gradients: Gradients, *, lr: float, grad_scale: float) -> None:
        """One step (Loshchilov and Hutter 2019); each gradient is multiplied by `grad_scale` first."""
        self.step_count += 1
        config = self.config
        for piece in self.pieces:
            start, stop = piece.start, piece.stop
            masters_P = self.flat.read_masters(start, stop, self.master_scratch)
            self.adamw(
                [masters_P], [gradients.read(start, stop, self.gradient_scratch)],
                [self.exp_avg_P[start:stop]], [self.exp_avg_sq_P[start:stop]],
                step=self.step_count, lr=lr, beta1=config.beta1, beta2=config.beta2, eps=config.eps,
                weight_decays=[config.weight_decay if piece.decays else 0.0], grad_scale=grad_scale,
                copies=[None],
            )  # fmt: skip
            self.flat.write_masters(start, stop, masters_P)
