"""Whether a model family computes what transformers computes, and refuses what it cannot.

    from grpo_conformance.model_case import check_model_plugin

    check_model_plugin(MyFamily(), hf_config, hf_model)

or one by one, as tests that fail apart:

    @pytest.mark.parametrize("check", MODEL_CHECKS, ids=lambda check: check.__name__)
    def test_conforms(check, case):
        check(case)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_core.errors import CheckpointError, ConfigError, GrpoError
from grpo_core.impl import DeviceInfo

from .model_parts import gradients_by_name, load_decoder, our_logits, sequences, their_logits

if TYPE_CHECKING:
    from grpo_core.backend import Backend
    from grpo_core.model.plugin import ModelPlugin

LOGITS = 1e-4
"""Largest error over the largest logit. Float32 on both sides, each rounding about a hundred times on the
way through a few layers; 1e-4 is 800 ulp. A wrong formula is off by 1e-2 and more."""
GRADIENTS = 1e-3
"""Euclidean norm of the difference over that of the gradient, tensor by tensor."""
SMALLEST = 1e-3
"""Gradients below this norm are compared with it: the true gradient of a key bias without rotary is 0."""
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
POISONED = 8
"""Tensors, spread over the model, in which a NaN is planted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A number that a check compared."""

    error: float
    tolerance: float
    where: str = ""
    """The tensor or place of the largest error."""


class Deviation(AssertionError):
    """A number is off by more than is allowed."""

    def __init__(self, message: str, measured: Measured) -> None:
        super().__init__(message)
        self.measured = measured


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCase:
    """A family beside a transformers model with random weights that it must equal."""

    family: ModelPlugin
    hf_config: Mapping[str, Any]
    """config.json as a checkpoint of the family has it, `architectures` included."""
    hf_model: Any
    """float32 `PreTrainedModel` on the CPU; its `save_pretrained` gives the layout of the weights."""
    lengths: tuple[int, ...] = (13, 1, 22)
    """Of the sequences that are packed into one forward pass."""
    seed: int = 0
    backend: Backend | None = None
    """The ops to compute on; the references of core when None."""


def check_claims(case: ModelCase) -> None:
    """The family says which architectures it serves, and its recipe sets keys that exist."""
    from grpo_core.config_schema import leaf_keys
    from grpo_core.plugin_checks import model_problem

    problem = model_problem(case.family)
    _expect(problem is None, f"the family {problem}")
    named = case.hf_config.get("architectures") or ()
    _expect(
        bool(set(named) & set(case.family.architectures)),
        f"config.json names {list(named)}, the family claims {list(case.family.architectures)}",
    )
    arch = case.family.arch(case.hf_config)
    _expect(arch.family == case.family.name, f"arch.family is {arch.family!r}, not {case.family.name!r}")
    _expect(
        dict(arch.hf_config) == dict(case.hf_config),
        "arch.hf_config is not the config.json that it was made from, so an export would write another one",
    )
    device = DeviceInfo(type="cpu", dtypes=frozenset({"float32", "bfloat16"}))
    unknown = set(case.family.recipe(arch, device, 1)) - set(leaf_keys())
    _expect(not unknown, f"the recipe sets {sorted(unknown)}, which are no settings")


def check_names(case: ModelCase) -> None:
    """Every tensor of the checkpoint has its place, with its shape, and no further one is expected."""
    from grpo_core.model.checkpoint_io import read_shapes

    table = case.family.weights(case.family.arch(case.hf_config))
    with saved(case) as folder:
        table.check(read_shapes(folder))
    ours = {name: tuple(value.shape) for name, value in load_decoder(case).state_dict().items()}
    differ = set(table.neutral_shapes().items()) ^ set(ours.items())
    _expect(not differ, f"the map and the decoder differ in {_some(differ)}")


def check_logits(case: ModelCase) -> Measured:
    """Packed sequences give the logits that transformers gives for each alone."""
    import torch

    decoder = load_decoder(case)
    with torch.no_grad():
        theirs, ours = their_logits(case.hf_model, sequences(case)), our_logits(decoder, sequences(case))
    largest = float(theirs.abs().max())
    _expect(largest > 0.1, f"the largest logit is {largest:.1e}: weights this small hide every difference")
    off = (ours - theirs).abs() / largest
    token, entry = divmod(int(off.nan_to_num(nan=torch.inf).argmax()), off.shape[1])
    found = Measured(error=float(off.max()), tolerance=LOGITS, where=f"token {token}, vocabulary {entry}")
    return _within(found, f"logits are off by {found.error:.1e} of the largest; {LOGITS:.0e} is allowed")


def check_gradients(case: ModelCase) -> Measured:
    """Backward through packed sequences gives transformers' gradients, checkpoint tensor by tensor."""
    ours, theirs = gradients_by_name(case)
    errors = {
        name: float((ours[name] - theirs[name]).norm()) / max(float(theirs[name].norm()), SMALLEST)
        for name in ours
    }
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= GRADIENTS}
    where = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    found = Measured(error=errors[where], tolerance=GRADIENTS, where=where)
    return _within(found, f"gradients are off (relative, {GRADIENTS:.0e} is allowed): {_some(wrong)}")


def check_round_trip(case: ModelCase) -> Measured:
    """What is exported equals what was loaded, bit for bit, and transformers loads it."""
    from grpo_core.model.checkpoint_io import read_tensors, write_checkpoint

    arch = case.family.arch(case.hf_config)
    exported = case.family.weights(arch).export(load_decoder(case).state_dict())
    with saved(case) as folder, tempfile.TemporaryDirectory() as written:
        source = dict(read_tensors(folder))
        write_checkpoint(Path(written), exported, arch.hf_config)
        return check_written(case, source, Path(written))


def check_written(case: ModelCase, source: Mapping[str, Any], folder: Path) -> Measured:
    """A folder that was written holds the tensors of `source`, and transformers computes the same with it."""
    import torch

    from grpo_core.model.checkpoint_io import read_tensors

    again = dict(read_tensors(folder))
    loaded = type(case.hf_model).from_pretrained(folder, config=case.hf_model.config).float().eval()
    tied = case.family.weights(case.family.arch(case.hf_config)).tied
    wanted = {name: value for name, value in source.items() if name not in tied}
    _expect(again.keys() == wanted.keys(), f"names differ: {_some(again.keys() ^ wanted.keys())}")
    changed = [name for name, value in wanted.items() if not torch.equal(again[name], value)]
    _expect(not changed, f"values differ: {_some(changed)}")
    with torch.no_grad():
        first, second = (their_logits(model, sequences(case)) for model in (case.hf_model, loaded))
    # Equal weights at other addresses: a kernel may sum in another order.
    error = float((first - second).abs().max() / first.abs().max())
    found = Measured(error=error, tolerance=LOGITS, where="logits of transformers")
    return _within(found, f"transformers' logits for the exported weights are off by {error:.1e}")


def check_refusals(case: ModelCase) -> None:
    """A checkpoint with a missing, unknown, misshaped or NaN tensor is refused by name."""
    from grpo_core.model.checkpoint_io import read_tensors

    with saved(case) as folder:
        tensors = dict(read_tensors(folder))
    table = case.family.weights(case.family.arch(case.hf_config))
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    names = [name for name in shapes if name not in table.tied]
    for name in names:
        rest = {other: shape for other, shape in shapes.items() if other != name}
        _refused(partial(table.check, rest.items()), name, "is missing")
        other = {**shapes, name: (shapes[name][0] + 1, *shapes[name][1:])}
        _refused(partial(table.check, other.items()), name, "has another shape")
    strange = {**shapes, "model.strange.weight": (2, 2)}
    _refused(lambda: table.check(strange.items()), "model.strange.weight", "is unknown")
    decoder = load_decoder(case)
    for name in names[:: max(1, len(names) // POISONED)]:
        poisoned = {**tensors, name: tensors[name].clone()}
        poisoned[name].view(-1)[-1] = float("nan")
        _refused(partial(table.load, poisoned.items(), decoder.state_dict()), name, "holds a NaN")


def check_bad_configs(case: ModelCase) -> None:
    """A config.json that is incomplete or quantised in an unknown way ends in a `ConfigError`."""
    wrong: list[dict[str, Any]] = [{key: "many"} for key in SIZES]
    wrong += [{key: 0} for key in SIZES]
    wrong.append({"quantization_config": {"quant_method": "unheard-of"}})
    for change in wrong:
        try:
            case.family.arch({**case.hf_config, **change})
        except ConfigError:
            continue
        raise AssertionError(f"a config.json with {change} is not refused")


MODEL_CHECKS: tuple[Callable[[ModelCase], Measured | None], ...] = (
    check_claims, check_names, check_logits, check_gradients, check_round_trip, check_refusals,
    check_bad_configs,
)  # fmt: skip
"""Each returns the number that it compared, if any, and raises AssertionError (`Deviation` for a number that
is off), with what is wrong and by how much, where the family does not conform; a
`GrpoError` of the family's own (names that do not fit, a config that it refuses) passes through."""


def check_model_plugin(
    family: ModelPlugin, hf_config: Mapping[str, Any], hf_model: Any, **settings: Any
) -> None:
    """Run all `MODEL_CHECKS`; raises AssertionError that lists every one that fails.

    `settings` are further fields of `ModelCase`. A few seconds for a model of some thousand parameters.
    """
    case = ModelCase(family=family, hf_config=hf_config, hf_model=hf_model, **settings)
    troubles = []
    for check in MODEL_CHECKS:
        try:
            check(case)
        except (AssertionError, GrpoError) as error:
            troubles.append(f"{check.__name__}: {error}")
    _expect(not troubles, "\n".join([f"{family.name} does not conform", *troubles]))


@contextmanager
def saved(case: ModelCase) -> Iterator[Path]:
    """A folder with the model as transformers saves it and the case's config.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case.hf_model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(dict(case.hf_config)), encoding="utf-8")
        yield folder


def _refused(call: Callable[[], object], name: str, trouble: str) -> None:
    try:
        call()
    except CheckpointError as error:
        _expect(name in str(error), f"where {name} {trouble}, the error does not name it: {error}")
        return
    raise AssertionError(f"a checkpoint in which {name} {trouble} is not refused")


def _within(found: Measured, message: str) -> Measured:
    if not found.error <= found.tolerance:
        raise Deviation(message, found)
    return found


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _some(names: Iterable[Any] | Mapping[Any, Any]) -> str:
    listed = [f"{k} {v}" for k, v in names.items()] if isinstance(names, Mapping) else sorted(map(str, names))
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
