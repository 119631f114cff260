"""What the graphs of the simulated device do and refuse, and decode steps through them. Run in a worker's
process, where the device may be opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_conformance.case import Outcome, Target, failed, passed
from grpo_conformance.system.graphs import compared, graphs, graphs_of
from grpo_conformance.system.models import COMMON, KINDS, write_model
from grpo_conformance.system.runs import Lab, built, open_lab, run, scratch
from grpo_conformance.system.sync import apart, told
from grpo_conformance.system.task import write_data
from grpo_core.devices.base import Graph
from grpo_core.types import Prompt, Sampling

RECURRENT = {
    **next(iter(KINDS["gated_delta"].configs)), "mlp_only_layers": [0, 1], "num_experts": 0,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def captured(target: Target, call: Callable[[], Any]) -> tuple[Any, Graph]:
    device: Any = target.device
    result: tuple[Any, Graph] = device.capture(call, beside=None)
    return result


def here(target: Target, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(target.device.open(0))


def replays(target: Target) -> Outcome:
    """Results follow the inputs: through views, in-place writes, indices and values kept between replays."""
    x, state, rows = here(target, 6, 4), here(target, 5, 4, seed=1), torch.tensor([3, 1])
    rows = rows.to(x.device)

    def call() -> tuple[Tensor, Tensor]:
        top = x[:2].t().reshape(2, 4)
        state[rows] = state[rows] * 0.5 + top
        made = torch.empty(6, 4, device=x.device)
        made[:] = torch.nn.functional.silu(x) @ torch.eye(4, device=x.device)
        return made, torch.cat([state[rows], top.softmax(-1)])

    before = state.clone()
    (first, second), graph = captured(target, call)
    if not bool(first.isnan().all()):
        return failed("a capture computes: its results are there before a replay")
    for seed in (7, 8):
        x.copy_(here(target, 6, 4, seed=seed))
        state.copy_(before)
        graph.replay(None)
        got = [first.cpu(), second.cpu(), state.cpu()]
        state.copy_(before)
        wanted = [y.cpu() for y in (*call(), state)]
        if not all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)):
            return failed(f"a replay gives other bits than the call, inputs {seed}")
    graph.release()
    return passed() if graph.nbytes() == 0 else failed(f"{graph.nbytes()} bytes are held after release")


def refusals(target: Target) -> Outcome:
    """What makes the host wait cannot be captured, and the device works on afterwards."""
    x, mask = here(target, 4, 4), here(target, 4, 4) > 0
    device = x.device
    waits: dict[str, Callable[[], Any]] = {
        "item": lambda: x.sum().item(),
        "branch": lambda: x if bool(x[0, 0] > 9) else -x,
        "tolist": lambda: x[0].tolist(),
        "to the host": lambda: x.cpu(),
        "from the host": lambda: x + torch.ones(4).to(device),
        "nonzero": lambda: mask.nonzero(),
        "mask": lambda: x[mask],
        "equal": lambda: torch.equal(x, x),
        "synchronize": lambda: target.device.synchronize(),
        "random": lambda: x + torch.rand(4, device=device),
    }
    for name, call in waits.items():
        try:
            captured(target, call)
        except RuntimeError as error:
            if "capture" not in str(error):
                return failed(f"{name}: {error}")
        else:
            return failed(f"{name} is captured in silence")
        if not torch.equal((x + 1).cpu(), x.cpu() + 1):
            return failed(f"after {name} the device does not work")
    return passed()


def moved(target: Target) -> Outcome:
    """Memory that was freed or moved since the capture is an error at the replay, not old numbers."""
    for name in ("freed", "moved"):
        held = [here(target, 8)]
        result, graph = captured(target, lambda held=held: held[0] * 2)
        graph.replay(None)
        if not torch.equal(result.cpu(), held[0].cpu() * 2):
            return failed("a first replay is wrong")
        if name == "freed":
            held.clear()
        else:
            held[0].untyped_storage().resize_(0)
        try:
            graph.replay(None)
        except RuntimeError as error:
            if f"memory that {'was freed' if name == 'freed' else 'has moved'}" not in str(error):
                return failed(f"{name}: {error}")
        else:
            return failed(f"a replay over {name} memory succeeds")
    return passed()


def decode(target: Target) -> Outcome:
    """A rollout through graphs has the bits of one without: at first, with new weights, after a sleep."""
    outcome = graphs(target, kind="dense", dtype="float32")
    return outcome if outcome.status != "pass" or outcome.tolerance == 0.0 else failed(f"a band: {outcome}")


def memory(target: Target) -> Outcome:
    """A sleeping engine gives the memory of its graphs back: what it says they hold, at least."""
    lab = open_lab(target, "dense")
    assert isinstance(lab, Lab)
    with built(lab.plan(rollout__prompts=1, rollout__sleep=False)) as parts:
        told(parts)
        held, before = graphs_of(parts)["bytes"], parts.memory.stats().allocated
        parts.rollout.sleep()
        freed = before - parts.memory.stats().allocated
    return passed() if 1000 < held <= freed else failed(f"{held} bytes are told, {freed} come back")


def baked(target: Target) -> Outcome:
    """The suite tells a device whose graphs go on showing what the first replay computed."""
    device: Any = Stuck(target.device)
    devices = {**target.catalogue.devices, target.device.name: device}
    faulty = replace(target, device=device, catalogue=replace(target.catalogue, devices=devices))
    outcome = graphs(faulty, kind="dense", dtype="float32")
    return passed() if outcome.status == "fail" and "differ" in outcome.message else failed(str(outcome))


class Stuck:
    """A device whose graphs are replayed once."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def capture(self, call: Callable[[], Any], *, beside: Graph | None) -> tuple[Any, Graph]:
        """As the device's, but for the replays."""
        result, graph = self.device.capture(call, beside=beside)
        graph.replay(None)
        graph.graph.replay = lambda: None
        return result, graph


def recurrent(target: Target) -> Outcome:
    """The same with recurrent states, which a padded or repeated step must not move."""
    open_lab(target, "dense")
    folder = scratch("recurrent")
    family = target.catalogue.model_plugin_for(RECURRENT["architectures"])
    for seed, name in enumerate(("model", "other")):
        (folder / name).mkdir()
        write_model(folder / name, family, {**COMMON, **RECURRENT}, seed=40 + seed)
    data = write_data(folder / "data.jsonl")
    lab = Lab(target=target, model=folder / "model", other=folder / "other", data=data)
    return compared(lab, "float32")


def padded(target: Target) -> Outcome:
    """With rows that are not filled: the same tokens, log-probs up to another order of sums."""
    lab = open_lab(target, "dense")
    assert isinstance(lab, Lab)
    found = []
    for setting in ("auto", "off"):
        with built(lab.plan(rollout__graph=setting)) as parts:
            prompts = [Prompt(id=i, token_ids=q.token_ids, seeds=tuple(range(5)))
                       for i, q in enumerate(parts.questions)]  # fmt: skip
            sampling = Sampling(max_tokens=8, temperature=0.9)
            done = sorted(parts.rollout.generate(prompts, sampling), key=lambda c: (c.prompt_id, c.index))
            found.append(done)
            if setting == "auto" and not set(parts.rollout.describe()["graphs"]["rows"]) - set(range(1, 9)):
                return failed("no graph had rows to spare")
    error = apart(*found)
    same = [c.token_ids for c in found[0]] == [c.token_ids for c in found[1]]
    return (
        passed(error=error) if same and error < 1e-5 else failed(f"tokens equal: {same}, error {error:.2e}")
    )


def training(target: Target) -> Outcome:
    """Three steps of training with graphs and without: the same metrics and completions, bit for bit."""
    lab = open_lab(target, "dense")
    assert isinstance(lab, Lab)
    records = [
        run(lab.plan(train__steps=3, rollout__prompts=1, rollout__graph=setting))
        for setting in ("auto", "off")
    ]
    if records[0].rows != records[1].rows:
        return failed(f"metrics differ: {records[0].rows} and {records[1].rows}")
    pairs = zip(records[0].scored, records[1].scored, strict=True)
    same = all([x.completion for x in a] == [x.completion for x in b] for a, b in pairs)
    return passed() if same else failed("completions differ")


def reasons(target: Target) -> Outcome:
    """Where an op of a step cannot be recorded the plan names it; elsewhere it says nothing of graphs."""
    for kind, op in (("gated_delta", "moe.dispatch"), ("mla", "mla.decode")):
        lab = open_lab(target, kind)
        assert isinstance(lab, Lab)
        planned = lab.plan()
        notes = [note for note in planned.plan.notes if "graphs" in note]
        if planned.graph or len(notes) != 1 or f"{op} (sim:plain)" not in notes[0]:
            return failed(f"{kind}: {planned.graph}, {notes}")
    lab = open_lab(target, "dense")
    assert isinstance(lab, Lab)
    off = [note for note in lab.plan(rollout__graph="off").plan.notes if "graphs" in note]
    if len(off) != 1 or "rollout.graph is off" not in off[0]:
        return failed(f"switched off: {off}")
    silent = [note for note in lab.plan(cpu=True).plan.notes if "graphs" in note]
    return failed(f"on a host: {silent}") if silent else passed()
