"""Two gloo processes against one: the same loss and weights, however the completions are shared out."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import distance, loss_of, make_scored, packed, setup_of, weights_of

from grpo_core.errors import GrpoError, NonFiniteError
from grpo_core.train.parallel import Tally, all_reduce_flat, merge, totals
from grpo_core.train.trainer import NativeTrainer
from grpo_core.types import Scored

Make = Callable[..., NativeTrainer]
SHARES = {
    "even": (range(6), range(6, 12)),
    "uneven": (range(11), range(11, 12)),
    "none": (range(12), range(0)),
    "none_first": (range(0), range(12)),
}
SETTINGS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1}
# Gradients of the ranks are added in another order than those of micro-batches: float32 rounding of
# about 1e-8, which AdamW scales by lr / eps = 100 at most, over two steps.
TOLERANCE = 5e-6


def mine(scored: Sequence[Scored], share: str, rank: int) -> list[Scored]:
    return [scored[i] for i in SHARES[share][rank]]


def two_steps(trainer: NativeTrainer, share: str, rank: int) -> dict[str, Any]:
    metrics = []
    for step in range(2):
        batches = packed(mine(make_scored(seed=step), share, rank), micro_tokens=25)
        metrics.append(trainer.step(batches, loss_of(trainer)).values)
    return {"weights": weights_of(trainer), "metrics": metrics}


def refusals(make: Callable[..., NativeTrainer], rank: int, other: str) -> dict[str, str]:
    """What each rank is told when only rank 1 is in trouble."""
    told = {}
    trainer = make()
    before = weights_of(trainer)
    scored = mine(make_scored(), "even", rank)
    if rank == 1:
        scored[2] = replace(scored[2], advantage=float("nan"))
    try:
        trainer.step(packed(scored, micro_tokens=25), loss_of(trainer))
    except NonFiniteError as error:
        told["nan"] = error.why
    assert distance(before, weights_of(trainer)) == 0.0
    try:
        trainer.step([], loss_of(trainer))
    except GrpoError as error:
        told["empty"] = error.what
    try:
        make(folder=Path(other)) if rank == 1 else make()
    except GrpoError as error:
        told["weights"] = error.what
    return told


def worker(rank: int, folder: str, hf_config: dict[str, Any], model: str, other: str) -> None:
    """One rank: every case, its results in a file."""
    from grpo_cpu.collectives import Gloo

    torch.set_num_threads(1)
    try:
        comm = Gloo()
        comm.init(rank=rank, world=2, store=f"file://{folder}/store", timeout=120.0)
        group = comm.group([0, 1])

        def make(*, folder: Path = Path(model), algo: dict[str, Any] | None = None) -> NativeTrainer:
            setup = setup_of(
                hf_config,
                folder,
                algo=algo or {},
                temperature=1.0,
                total_steps=9,
                group=group,
                train=SETTINGS,
            )
            return NativeTrainer(setup)

        found: dict[str, Any] = {share: two_steps(make(), share, rank) for share in SHARES}
        found["sequence_mean"] = two_steps(make(algo={"aggregation": "sequence_mean"}), "uneven", rank)
        found["refusals"] = refusals(make, rank, other)
        torch.save(found, f"{folder}/{rank}.pt")
        comm.close()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def ranks(
    hf_model: Any, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What two processes found, by rank."""
    from tiny_models import tiny_hf_model

    from grpo_core.model.checkpoint_io import write_checkpoint

    folder = tmp_path_factory.mktemp("ranks")
    other = tiny_hf_model("llama", seed=1, tie_word_embeddings=True, num_hidden_layers=2)
    tensors = ((n, t) for n, t in other.state_dict().items() if n != "lm_head.weight")
    write_checkpoint(folder / "other", tensors, other.config.to_dict())
    context = multiprocessing.get_context("spawn")
    arguments = (str(folder), hf_model.config.to_dict(), str(model_folder), str(folder / "other"))
    processes = [context.Process(target=worker, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        if process.is_alive():
            process.kill()
    for error in sorted(folder.glob("*.error")):
        pytest.fail(error.read_text())
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("share", [*SHARES, "sequence_mean"])
def test_two_processes_equal_one(share: str, ranks: list[dict[str, Any]], trainer_of: Make) -> None:
    algo = {"aggregation": "sequence_mean"} if share == "sequence_mean" else {}
    trainer = trainer_of(algo=algo, total_steps=9, **SETTINGS)
    alone = []
    for step in range(2):
        alone.append(trainer.step(packed(make_scored(seed=step), 25), loss_of(trainer)).values)
    weights = weights_of(trainer)
    for found in ranks:
        assert distance(found[share]["weights"], weights) < TOLERANCE
        for ours, theirs in zip(found[share]["metrics"], alone, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
    assert ranks[0][share]["metrics"] == ranks[1][share]["metrics"]
    assert distance(ranks[0][share]["weights"], ranks[1][share]["weights"]) == 0.0


def test_trouble_on_one_rank_stops_every_rank_with_its_name(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        told = found["refusals"]
        assert "on rank 1" in told["nan"] and "micro-batch" in told["nan"]
        assert "nothing to train on" in told["empty"]
        assert "do not hold the same weights" in told["weights"]


class Recorder:
    """A group of two ranks that hold the same."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def all_reduce(self, x: torch.Tensor, *, op: str) -> None:
        assert op == "sum"
        self.sizes.append(x.numel())
        x.mul_(2)

    def gather_objects(self, obj: object) -> list[object]:
        return [obj, obj]


@pytest.mark.parametrize(("size", "wanted"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3])])
def test_gradients_are_reduced_bucket_by_bucket(size: int, wanted: list[int]) -> None:
    group = Recorder()
    flat = torch.arange(size, dtype=torch.float32)
    all_reduce_flat(flat, group, bucket=4)  # type: ignore[arg-type]
    assert group.sizes == wanted
    assert torch.equal(flat, 2 * torch.arange(size, dtype=torch.float32))


def test_totals_and_tallies_of_all_ranks() -> None:
    group: Any = Recorder()
    scored = make_scored()
    tokens = sum(len(item.completion.token_ids) for item in scored)
    total = totals(packed(scored, 25), group)
    # one completion of the twelve has no token
    assert (total.tokens, total.sequences) == (2 * tokens, 2 * 11)
    mine_ = Tally(loss=1.5, sums={"a": 2.0}, maxima={"b": -3.0}, gaps=[torch.ones(2)], trouble="x")
    merged = merge(mine_, group)
    assert (merged.loss, merged.sums, merged.maxima) == (3.0, {"a": 4.0}, {"b": -3.0})
    assert merged.trouble == "x; x" and len(merged.gaps) == 2
