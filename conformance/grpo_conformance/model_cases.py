"""The cases of a model family: the same suite as for a device, with levels of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_core.catalogue import Catalogue
from grpo_core.errors import ConfigError, GrpoError
from grpo_core.plugin_checks import did_you_mean

from . import model_case, model_more
from .case import Case, Outcome, Target, failed, passed
from .model_case import Deviation, Measured, ModelCase
from .model_more import Absent

LEVELS = ("claims", "parity", "weights", "chat", "recipe")
"""Names of levels 0 to 4 of a model's report."""
CHECKS: Mapping[str, tuple[int, Callable[[ModelCase], Measured | None]]] = {
    "claims": (0, model_case.check_claims),
    "refused configs": (0, model_case.check_bad_configs),
    "logits": (1, model_case.check_logits),
    "gradients": (1, model_case.check_gradients),
    "names": (2, model_case.check_names),
    "round trip": (2, model_case.check_round_trip),
    "round trip in shards": (2, model_more.check_shards),
    "refusals": (2, model_case.check_refusals),
}
ONCE = ("claims", "refused configs", "refusals")
"""Checks that are asked of the plain variant alone."""
QUICK = ("plain", "as published")
SEEDS = {False: (0, 1), True: (0,)}
"""Of weights and tokens, by whether the run is quick; parity is asked with each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a name stands for."""

    family: str
    architectures: tuple[str, ...]
    folder: str = ""
    """Of a model in Hugging Face layout: its config.json and tokenizer are asked, its weights not read."""


def find(name: str, catalogue: Catalogue) -> Subject:
    """The subject called `name`: a family, an architecture of config.json, or a model folder.

    Raises `ConfigError` for what is none of these and `CheckpointError` for a folder without a config.json.
    """
    if name in catalogue.models:
        return Subject(family=name, architectures=catalogue.models[name].architectures)
    for family in catalogue.models.values():
        if name in family.architectures:
            return Subject(family=family.name, architectures=(name,))
    if Path(name).is_dir():
        from grpo_core.model.hf_config import read_hf_config

        named = tuple(read_hf_config(Path(name)).get("architectures") or ())
        family = catalogue.model_plugin_for(named)
        served = tuple(one for one in named if one in family.architectures)[:1]
        return Subject(family=family.name, architectures=served, folder=str(Path(name).resolve()))
    families = sorted(catalogue.models)
    served = tuple(sorted(one for family in catalogue.models.values() for one in family.architectures))
    raise ConfigError(
        f"there is no model {name!r}{did_you_mean(name, [*families, *served])}",
        why=f"families: {', '.join(families)}; architectures: {', '.join(served)}; and it is no folder",
        fix="give a family, an architecture as config.json names it, or the folder of a model",
    )


def pick_levels(names: Sequence[str]) -> tuple[int, ...]:
    """Level numbers from names and numbers; all for nothing. Raises `ConfigError` for an unknown one."""
    chosen = set()
    for name in names:
        if name not in LEVELS and not (name.isdigit() and int(name) < len(LEVELS)):
            raise ConfigError(
                f"a model's report has no level {name!r}{did_you_mean(name, LEVELS)}",
                why="levels: " + ", ".join(f"{i} {known}" for i, known in enumerate(LEVELS)),
                fix="give names or numbers",
            )
        chosen.add(LEVELS.index(name) if name in LEVELS else int(name))
    return tuple(sorted(chosen)) or tuple(range(len(LEVELS)))


def cases(name: str, catalogue: Catalogue, *, levels: Sequence[int], quick: bool) -> list[Case]:
    """Every case of a subject, variant by variant."""
    subject = find(name, catalogue)
    found: list[Case] = []
    for architecture in subject.architectures:
        for variant in _variants(subject, architecture, quick):
            for check, (level, _) in CHECKS.items():
                if check in ONCE and variant not in QUICK:
                    continue
                for seed in SEEDS[quick] if LEVELS[level] == "parity" else (0,):
                    found.append(_case(subject, architecture, variant, check, level, seed))
    for level, check in enumerate(LEVELS):
        if check in ("chat", "recipe"):
            variant = QUICK[bool(subject.folder)]
            found.append(_case(subject, subject.architectures[0], variant, check, level, 0))
    return sorted((case for case in found if case.level in levels), key=lambda case: case.level)


def _variants(subject: Subject, architecture: str, quick: bool) -> tuple[str, ...]:
    from .model_tiny import model_class, variants_of

    if subject.folder:
        return ("as published",)
    if quick or model_class(architecture) is None:
        return ("plain",)
    return tuple(variants_of(_config(subject, architecture)))


def _config(subject: Subject, architecture: str) -> dict[str, Any]:
    """Every setting of an architecture with its usual value, or as the folder has it."""
    from .model_tiny import model_class

    kind = model_class(architecture)
    usual: dict[str, Any] = kind.config_class().to_dict() if kind is not None else {}
    if subject.folder:
        from grpo_core.model.hf_config import read_hf_config

        return {**usual, **read_hf_config(Path(subject.folder))}
    return usual


def _case(subject: Subject, architecture: str, variant: str, check: str, level: int, seed: int) -> Case:
    name = "" if seed == 0 else f" seed {seed}"
    return Case(
        id=f"model/{subject.family}/{architecture}/{variant}/{check}{name}".replace(" ", "-"),
        level=level,
        subject=subject.family if check in ("chat", "recipe") else f"{architecture} {variant}",
        run=f"{__name__}:run",
        args={"family": subject.family, "architecture": architecture, "folder": subject.folder,
              "variant": variant, "check": check, "seed": seed},
        timeout=180.0,
        room=architecture,
    )  # fmt: skip


def run(
    target: Target, *, family: str, architecture: str, folder: str, variant: str, check: str, seed: int
) -> Outcome:
    """One check of one variant, on the references of the CPU in one thread."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        subject = Subject(family=family, architectures=(architecture,), folder=folder)
        return _judged(target.catalogue.models[family], subject, variant, check, seed)
    finally:
        torch.set_num_threads(threads)


def _judged(plugin: Any, subject: Subject, variant: str, check: str, seed: int) -> Outcome:
    sizes: dict[str, Any] = {"variant": variant, "seed": seed}
    try:
        if check == "chat":
            model_more.check_chat(plugin.chat(), _tokenizer_folder(subject.folder))
            return passed()
        made = _made(plugin, subject, variant, seed)
        if isinstance(made, Outcome):
            return made
        sizes["config"] = dict(made.hf_config)
        if check == "recipe":
            model_more.check_recipe(plugin, made.hf_config)
            return passed()
        found = CHECKS[check][1](made)
    except Absent as absent:
        return Outcome(status="not_declared", message=absent.reason)
    except Deviation as off:
        found = off.measured
        return failed(str(off), error=found.error, tolerance=found.tolerance,
                      worst={**sizes, "where": found.where})  # fmt: skip
    except (AssertionError, GrpoError) as error:
        return failed(str(error), worst=sizes)
    if found is None:
        return passed()
    return passed(error=found.error, tolerance=found.tolerance,
                  worst={"variant": variant, "seed": seed, "where": found.where})  # fmt: skip


def _made(plugin: Any, subject: Subject, variant: str, seed: int) -> ModelCase | Outcome:
    import transformers

    from .model_tiny import model_class, tiny_model, variants_of

    architecture = subject.architectures[0]
    if model_class(architecture) is None:
        version = transformers.__version__
        return Outcome(status="not_declared", message=f"transformers {version} has no {architecture}")
    usual = _config(subject, architecture)
    changes = variants_of(usual).get(variant, {})
    model = tiny_model(architecture, usual, changes, seed)
    hf_config = {**model.config.to_dict(), "architectures": [architecture]}
    if variant not in QUICK:
        try:
            plugin.arch(hf_config)
        except ConfigError as error:
            return Outcome(status="not_declared", message=f"refused: {error.what}")
    return ModelCase(family=plugin, hf_config=hf_config, hf_model=model, seed=seed)


def _tokenizer_folder(folder: str) -> Path | None:
    if not folder:
        return None
    named = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")
    if not any((Path(folder) / name).is_file() for name in named):
        raise Absent(reason="the folder has no tokenizer")
    return Path(folder)
