"""The native trainer: the one decoder on the bound ops, float32 masters, data parallel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..algo.mismatch import gap_metrics, rollout_gap
from ..errors import ConfigError, GrpoError, NonFiniteError
from ..model.checkpoint_io import load_checkpoint
from ..model.kept import read_kept, with_kept
from ..model.transformer import Decoder
from ..ops.common import Common
from ..types import Batch, StepMetrics
from .base import LossFn, TrainSetup
from .gradients import Gradients, square_sums
from .optimizer import Optimizer
from .parallel import Tally, Totals, merge, same_everywhere, totals
from .parameters import FlatParameters
from .routing import blank, changed, expert_sizes, replayed, share_changed, with_old_pass
from .schedule import learning_rate
from .state import load_state, save_state

if TYPE_CHECKING:
    from ..ops.memory import Memory

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NORM_EPS = 1e-6
"""Added to the gradient norm when clipping, as torch.nn.utils.clip_grad_norm_ does."""


class NativeTrainer:
    """The reference of `engine.train`; see `grpo_core.train.base.Trainer` for each method's contract.

    In bfloat16 it holds 12 bytes a parameter between steps (weight 2, remainder of the master 2, moments 8).
    A step adds a buffer for gradients: 2 as long as there is a single micro-batch on one rank, else
    float32; activations are bounded by the tokens of a micro-batch. `options`: `sleep` ("host" or
    "disk"), where `sleep` keeps the state.
    """

    def __init__(self, setup: TrainSetup) -> None:
        _check(setup)
        self.setup = setup
        self.dtype = DTYPES[setup.train.dtype]
        self.experts = expert_sizes(setup.arch)
        self.memory: Memory = setup.backend.memory.allocator()
        self.policy = self._decoder()
        self.flat = FlatParameters(self.policy, device=setup.device, dtype=self.dtype)
        self.optimizer = Optimizer(self.flat, setup.backend.optim.adamw, setup.train)
        self.flat.fill(self._read_model, self.optimizer.exp_avg_P)
        self.gradients = Gradients(self.flat, self.policy, self.memory)
        self.reference = self._frozen() if setup.algo.kl_coef > 0 else None
        self.mtp = dict(self._unread()) if setup.train.mtp == "load" else {}
        self._hold()
        self._check_ranks()

    def logprobs(self, batches: Sequence[Batch], *, reference: bool) -> list[Tensor]:
        """See `Trainer.logprobs`. Raises ValueError when no reference is kept (kl_coef 0)."""
        model = self.reference if reference else self.policy
        if model is None:
            raise ValueError("no reference is kept, because algo.kl_coef is 0")
        with torch.no_grad():
            return [
                self._forward(model, batch, routed=None if reference else self._replayed(batch))[0]
                for batch in batches
            ]

    @torch.no_grad()
    def with_old(self, batches: Sequence[Batch]) -> list[Batch]:
        """See `Trainer.with_old`."""
        found = []
        for batch in batches:
            keep = self.experts is not None and self.setup.train.routing_replay == "R2"
            record = blank(batch, self.experts) if keep and self.experts else None
            logprobs_L, _ = self._forward(self.policy, batch, routed=self._replayed(batch), record=record)
            found.append(with_old_pass(batch, logprobs_L, record))
        return found

    def step(self, batches: Sequence[Batch], loss: LossFn) -> StepMetrics:
        """See `Trainer.step`. Raises `NonFiniteError` that names the micro-batch, on every rank."""
        group, config = self.setup.group, self.setup.train
        total = totals(batches, group)
        if total.tokens == 0:
            raise GrpoError(
                "there is nothing to train on",
                why="no completion of this optimizer step has a token",
                fix="check the stop tokens and rollout.max_tokens, or lower algo.mini_batches",
            )
        self.gradients.begin(single=len(batches) == 1 and group.size == 1)
        tally = merge(self._accumulate(batches, loss, total), group)
        if tally.trouble:
            self._refuse(tally.trouble)
        self.gradients.finish(group)
        norm = self.gradients.norm()
        if not math.isfinite(norm):
            self._refuse(merge(Tally(trouble=self._blame(batches, loss, total)), group).trouble)
        lr = learning_rate(self.optimizer.step_count + 1, self.setup.total_steps, config)
        scale = min(1.0, config.max_grad_norm / (norm + NORM_EPS)) if config.max_grad_norm > 0 else 1.0
        self.optimizer.update(self.gradients, lr=lr, grad_scale=scale)
        self.gradients.release()
        return StepMetrics(values=_metrics(tally, total) | {"grad_norm": norm, "lr": lr})

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer.weights`; with train.mtp "load" the layers for multi-token prediction come last."""
        return self._exported(iter(self.mtp.items()))

    def save(self, folder: Path) -> None:
        """See `Trainer.save`. Every rank holds the same state: one of them saves."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = iter(self.mtp.items()) if self.mtp else self._unread()
        save_state(folder, self._exported(kept), self.flat, self.optimizer, self.setup.arch)

    def load(self, folder: Path) -> None:
        """See `Trainer.load`. Raises `CheckpointError`; the reference stays that of `model_path`."""
        load_state(folder, self.flat, self.optimizer, self.setup.weight_map)
        self._check_ranks()

    def sleep(self) -> None:
        """Free the state of the trainer; gradients are forgotten, the rest is kept for `wake`."""
        self.gradients.release()
        self.memory.sleep(*self._kept(), keep=self.setup.train.options.get("sleep", "host"))
        self.memory.empty_cache()

    def wake(self) -> None:
        """Undo `sleep`."""
        self.memory.wake(*self._kept())

    def describe(self) -> Mapping[str, Any]:
        """Name, dtype, parameters and bytes held."""
        flat, optimizer = self.flat, self.optimizer
        remainder = 0 if flat.remainder_P is None else flat.remainder_P.nbytes
        reference = () if self.reference is None else self.reference.parameters()
        return {
            "name": "native",
            "dtype": self.setup.train.dtype,
            "parameters": flat.numel,
            "weights_bytes": flat.weights_P.nbytes,
            "masters_bytes": remainder,
            "moments_bytes": optimizer.exp_avg_P.nbytes + optimizer.exp_avg_sq_P.nbytes,
            "gradients_bytes": self.gradients.nbytes(),
            "reference_bytes": sum(parameter.nbytes for parameter in reference),
            "mtp_bytes": sum(tensor.nbytes for tensor in self.mtp.values()),
        }

    def close(self) -> None:
        """Drop gradients; the rest goes with the object."""
        self.gradients.release()

    def _decoder(self) -> Decoder:
        return Decoder(
            self.setup.arch, self.setup.backend, device=self.setup.device, dtype=self.dtype,
            router_dtype=getattr(torch, self.setup.train.router_dtype), consistent=self.setup.consistent,
        )  # fmt: skip

    def _read_model(self, into: Mapping[str, Tensor]) -> None:
        load_checkpoint(Path(self.setup.model_path), self.setup.weight_map, into)

    def _unread(self) -> Iterator[tuple[str, Tensor]]:
        return read_kept(Path(self.setup.model_path), self.setup.weight_map)

    def _exported(self, kept: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        weight_map, neutral = self.setup.weight_map, self.flat.whole(self.flat.weights_P)
        return with_kept(weight_map.export(neutral), kept, weight_map, neutral)

    def _frozen(self) -> Decoder:
        model = self._decoder().requires_grad_(False)
        self._read_model({**dict(model.named_parameters()), **dict(model.named_buffers())})
        return model

    def _hold(self) -> None:
        state = [self.optimizer.exp_avg_P, self.optimizer.exp_avg_sq_P]
        if self.flat.remainder_P is not None:
            state.append(self.flat.remainder_P)
        self.memory.hold("weights", [self.flat.weights_P])
        self.memory.hold("optimizer", state)
        if self.reference is not None:
            self.memory.hold("reference", list(self.reference.parameters()))

    def _kept(self) -> tuple[str, ...]:
        return ("weights", "optimizer") if self.reference is None else ("weights", "optimizer", "reference")

    def _check_ranks(self) -> None:
        """Ranks that start apart would drift for ever without a sign."""
        if self.setup.group.size == 1:
            return
        marks = square_sums([self.flat.weights_P, *self.flat.frozen.values()])
        if not same_everywhere([*marks, float(self.optimizer.step_count)], self.setup.group):
            raise GrpoError(
                "the ranks do not hold the same weights",
                why="they read different checkpoints",
                fix="give every rank the same model and the same checkpoint folder",
            )

    def _replayed(self, batch: Batch) -> Tensor | None:
        return replayed(batch, self.setup.train.routing_replay, self.experts)

    def _forward(
        self, model: Decoder, batch: Batch, *, recompute: bool = False, routed: Tensor | None = None,
        record: Tensor | None = None, free: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(logprobs_L, entropy_L) of a micro-batch at the rollout's temperature."""
        if batch.labels_L.shape[0] == 0:
            empty_L = torch.zeros(0, device=batch.labels_L.device)
            return empty_L, empty_L
        host = batch.host_parents
        alone = not bool((batch.parents_S >= 0).any()) if host is None else all(one < 0 for one in host)
        hidden_TC = model(
            batch.tokens_T, batch.positions_T, cu_seqlens=batch.cu_seqlens,
            parents=None if alone else batch.parents_S, max_seqlen=batch.max_seqlen, recompute=recompute,
            routed_experts_TMk=routed, record_TMk=record, free_TMk=free,
            common=Common(cu_seqlens=batch.host_cu_seqlens, parents=batch.host_parents),
        )  # fmt: skip
        return self.setup.backend.loss.logprob(
            hidden_TC.index_select(0, batch.predict_L), model.head_weight(), batch.labels_L,
            temperature=self.setup.temperature, group=None, main_grad_VC=model.head_main_grad(),
        )  # fmt: skip

    def _accumulate(self, batches: Sequence[Batch], loss: LossFn, total: Totals) -> Tally:
        """Forward and backward of every micro-batch; stops at the first loss that is not finite."""
        tally = Tally()
        for index, batch in enumerate(batches):
            if batch.labels_L.shape[0] == 0:
                continue
            objective, part = self._objective(batch, loss, total)
            tally.add(part)
            if not math.isfinite(part.loss):
                tally.trouble = f"the loss of {_name(index, batches, self.setup.group.rank)} is {part.loss}"
                break
            objective.backward()  # type: ignore[no-untyped-call]
        return tally

    def _objective(self, batch: Batch, loss: LossFn, total: Totals) -> tuple[Tensor, Tally]:
        """This micro-batch's share of the mini-batch's loss, and its metrics."""
        routed_TMk = self._replayed(batch)
        recorded = self.experts if batch.routed_experts_TMk is not None else None
        used_TMk = None if recorded is None else blank(batch, recorded)
        # What is used says nothing of the router while it is replayed.
        free_TMk = None if recorded is None or routed_TMk is None else blank(batch, recorded)
        logprobs_L, entropy_L = self._forward(
            self.policy, batch, recompute=self.setup.train.recompute, routed=routed_TMk, record=used_TMk,
            free=free_TMk,
        )  # fmt: skip
        terms = loss(logprobs_L, entropy_L, batch)
        by_token = self.setup.algo.aggregation == "token_mean"
        objective = (terms.loss_L * terms.weight_L).sum() / (total.tokens if by_token else total.sequences)
        start_L = logprobs_L if batch.old_logprobs_L is None else batch.old_logprobs_L
        # One transfer for all: on a device each would wait for the queue.
        counts = terms.sums if used_TMk is None else {**terms.sums, **changed(batch, used_TMk, free_TMk)}
        values = [objective.detach(), *counts.values(), *terms.maxima.values()]
        floats = torch.stack([value.float() for value in values]).tolist()
        sums = dict(zip(counts, floats[1:], strict=False))
        maxima = dict(zip(terms.maxima, floats[1 + len(sums) :], strict=True))
        gap_L = rollout_gap(start_L, batch.rollout_logprobs_L).cpu()
        return objective, Tally(loss=floats[0], sums=sums, maxima=maxima, gaps=[gap_L])

    def _blame(self, batches: Sequence[Batch], loss: LossFn, total: Totals) -> str:
        """Which micro-batch of this rank makes the gradient not finite, found by running each again."""
        for index, batch in enumerate(batches):
            if batch.labels_L.shape[0] == 0:
                continue
            self.gradients.begin(single=True)
            self._objective(batch, loss, total)[0].backward()  # type: ignore[no-untyped-call]
            if not math.isfinite(self.gradients.norm()):
                return f"the gradient of {_name(index, batches, self.setup.group.rank)} is not finite"
        return ""

    def _refuse(self, trouble: str) -> None:
        raise NonFiniteError(
            "the policy update has a loss or gradient that is NaN or infinite",
            why=trouble or "the sum of the gradients of all micro-batches overflows",
            fix="lower train.lr or set train.max_grad_norm; the weights are still those of the last step",
        )


def _check(setup: TrainSetup) -> None:
    if setup.train.dtype not in DTYPES:
        raise ConfigError(
            f"train.dtype {setup.train.dtype!r} is not a dtype to compute in",
            why="the plan decides what auto means on a device, before the trainer is built",
            fix=f"set train.dtype to one of {', '.join(DTYPES)}",
        )
    if not setup.temperature > 0:
        raise ConfigError(
            f"rollout.temperature {setup.temperature} cannot be trained at",
            why="greedy completions have no log-probabilities to learn from",
            fix="set rollout.temperature above 0",
        )
    unknown = sorted(setup.train.options.keys() - {"sleep"})
    if unknown or setup.train.options.get("sleep", "host") not in ("host", "disk"):
        raise ConfigError(
            "train.options do not fit the native trainer",
            why=f"unknown: {', '.join(unknown)}" if unknown else "sleep is neither host nor disk",
            fix="it knows sleep: host or disk",
        )


def _name(index: int, batches: Sequence[Batch], rank: int) -> str:
    batch = batches[index]
    return (
        f"micro-batch {index + 1} of {len(batches)} on rank {rank}"
        f" ({batch.lengths_N.shape[0]} completions, {batch.labels_L.shape[0]} loss tokens)"
    )


def _metrics(tally: Tally, total: Totals) -> dict[str, float]:
    means = {name: value / total.tokens for name, value in tally.sums.items()}
    return {
        "loss": tally.loss,
        **share_changed(means),
        **tally.maxima,
        **gap_metrics(tally.gaps),
        "tokens": float(total.tokens),
    }
