"""The trainer's part of a checkpoint: weights in Hugging Face layout, moments and exact masters beside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..model.checkpoint_io import load_checkpoint, write_checkpoint, write_json

if TYPE_CHECKING:
    from ..model.arch import Arch
    from ..model.weights import WeightMap
    from .optimizer import Optimizer
    from .parameters import FlatParameters

OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"
FORMAT = 1


def _tensors(flat: FlatParameters, optimizer: Optimizer) -> dict[str, Tensor]:
    buffers = {"exp_avg": optimizer.exp_avg_P, "exp_avg_sq": optimizer.exp_avg_sq_P}
    if flat.remainder_P is not None:
        buffers["remainder"] = flat.remainder_P
    return {
        f"{kind}.{name}": view
        for kind, buffer_P in buffers.items()
        for name, view in flat.views(buffer_P).items()
    }


def _record(flat: FlatParameters) -> dict[str, Any]:
    return {"format": FORMAT, "dtype": str(flat.weights_P.dtype).removeprefix("torch.")}


def save_state(
    folder: Path,
    weights: Iterator[tuple[str, Tensor]],
    flat: FlatParameters,
    optimizer: Optimizer,
    arch: Arch,
) -> None:
    """Write weights (by checkpoint names), optimizer.safetensors (by neutral names) and trainer.json.

    In bfloat16 the remainders make the float32 masters exact; see `masters`.
    """
    write_checkpoint(folder, weights, arch.hf_config)
    tensors = {name: tensor.cpu() for name, tensor in _tensors(flat, optimizer).items()}
    save_file(tensors, str(folder / OPTIMIZER), metadata={"format": "pt"})
    write_json(folder / TRAINER, {**_record(flat), "step": optimizer.step_count})


def load_state(folder: Path, flat: FlatParameters, optimizer: Optimizer, weight_map: WeightMap) -> None:
    """Take back, bit for bit, what `save_state` wrote.

    Raises `CheckpointError` for a folder that is not whole, or that was written with another compute dtype
    or model; nothing is changed when names, shapes or dtypes do not fit.
    """
    record = _read_record(folder)
    wanted = _record(flat)
    if {key: record.get(key) for key in wanted} != wanted:
        raise CheckpointError(
            f"{folder} cannot be continued with these settings",
            why=f"it was written with {record.get('dtype')} (format {record.get('format')}),"
            f" this run trains in {wanted['dtype']} (format {FORMAT})",
            fix=f"set train.dtype={record.get('dtype')}, or start a new run from the checkpoint's weights",
        )
    targets = _tensors(flat, optimizer)
    try:
        with safe_open(str(folder / OPTIMIZER), framework="pt") as file:
            _check(folder, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, targets)  # noqa: SIM118
            load_checkpoint(folder, weight_map, flat.whole(flat.weights_P))
            for name, target in targets.items():
                target.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder / OPTIMIZER} cannot be read",
            why=str(error),
            fix="continue from an earlier checkpoint of the run",
        ) from error
    optimizer.step_count = int(record["step"])


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
        int(record["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no trainer state",
            why=f"{TRAINER} cannot be read: {error}",
            fix="continue from a folder checkpoints/step-... of a run",
        ) from error
    return record


def _check(folder: Path, held: dict[str, tuple[int, ...]], targets: dict[str, Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    if held == wanted:
        return
    different = sorted(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
    raise CheckpointError(
        f"{folder / OPTIMIZER} does not fit the model",
        why=f"{len(different)} tensors differ in name or shape, {different[0]} first",
        fix="continue with the model that the run was started with",
    )
