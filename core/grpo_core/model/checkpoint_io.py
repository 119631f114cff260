"""Reading and writing weights in Hugging Face layout: safetensors, single or sharded, with config.json."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from . import fp8

if TYPE_CHECKING:
    from .weights import WeightMap

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 2**30
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "tiktoken.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
"""What a model folder holds besides weights and config.json."""
NOT_WRITTEN = ("dtype", "_name_or_path", "quantization_config")
AGAIN = "download or save the model again"


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, all of them present.

    Raises `CheckpointError` for a folder without any, an index that cannot be read, or a missing shard.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        found = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
        raise CheckpointError(
            f"{folder} holds no weights",
            why=f"there is neither {SINGLE} nor {INDEX}" + (f", only {', '.join(found)}" if found else ""),
            fix="convert the weights to safetensors (save_pretrained of transformers does)"
            if found
            else AGAIN,
        )
    names = sorted(set(_weight_map(index).values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} is incomplete",
            why=f"{INDEX} names {len(names)} shards, of which these are missing: {', '.join(absent)}",
            fix=AGAIN,
        )
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read", why=repr(error), fix=AGAIN) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        with path.open("rb") as raw:
            pointer = raw.read(40).startswith(b"version https://git-lfs")
        raise CheckpointError(
            f"{path} is damaged",
            why="it is a git-lfs pointer, not the file"
            if pointer
            else f"{error} (a download that was cut off?)",
            fix="run `git lfs pull` in the folder" if pointer else AGAIN,
        ) from error


def read_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, from the headers alone; scales of float8 weights are no tensors of
    their own. Raises as `read_tensors`.
    """
    for header in _headers(folder)[0].values():
        for name, entry in header.items():
            yield name, entry.shape


def read_tensors(
    folder: Path, *, wanted: Callable[[str], bool] | None = None, fp8_to: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of every tensor, or of those whose name is `wanted`; one in memory at a time.

    float8 weights with their 128 x 128 block scales come dequantised in `fp8_to`, without another copy of
    more than 128 rows. Raises `CheckpointError` for a folder without safetensors, a missing, truncated or
    otherwise damaged shard, an index that promises a tensor which its shard does not hold, and float8
    weights without fitting scales; all before the first tensor.
    """
    headers, scales = _headers(folder)
    for path, header in headers.items():
        with _opened(path) as file:
            for name, entry in header.items():
                if wanted is not None and not wanted(name):
                    continue
                tensor = file.get_tensor(name)
                if entry.dtype in fp8.DTYPES:
                    scale = name + fp8.SCALE
                    # The scales of a weight at the end of a shard may begin the next one.
                    with nullcontext(file) if scales[scale] == path else _opened(scales[scale]) as other:
                        tensor = fp8.dequantise(tensor, other.get_tensor(scale), fp8_to)
                yield name, tensor


def _headers(folder: Path) -> tuple[dict[Path, dict[str, fp8.Entry]], dict[str, Path]]:
    """What each shard says of its tensors, scales of float8 weights left out, and the shard of each scale."""
    headers: dict[Path, dict[str, fp8.Entry]] = {}
    for path in shard_files(folder):
        with _opened(path) as file:
            headers[path] = {name: _entry(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    if all(path.name != SINGLE for path in headers):
        held = {path.name: header.keys() for path, header in headers.items()}
        broken = [n for n, shard in _weight_map(folder / INDEX).items() if n not in held[shard]]
        if broken:
            raise CheckpointError(
                f"{folder} is incomplete",
                why=f"{INDEX} promises {len(broken)} tensors that are not in their shards, {broken[0]} first",
                fix=AGAIN,
            )
    names = fp8.check_scales(folder, {name: e for header in headers.values() for name, e in header.items()})
    scales = {name: path for path, header in headers.items() for name in header if name in names}
    for header in headers.values():
        for name in names & header.keys():
            del header[name]
    return headers, scales


def _entry(header: Any) -> fp8.Entry:
    return fp8.Entry(shape=tuple(header.get_shape()), dtype=str(header.get_dtype()))


def load_checkpoint(folder: Path, weight_map: WeightMap, into: Mapping[str, Tensor]) -> None:
    """Fill neutral parameters from a model folder; names and shapes are checked before any is changed.

    Raises `CheckpointError` as `read_tensors` and `WeightMap.load` do.
    """
    weight_map.check(read_shapes(folder))
    weight_map.load(read_tensors(folder, wanted=lambda name: name not in weight_map.kept), into)


def write_checkpoint(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], hf_config: Mapping[str, Any], *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:  # fmt: skip
    """Write weights and config.json so that transformers loads them; weights of an earlier write go.

    At most one shard is copied to host memory at a time. The config's dtype becomes that of the weights,
    under the name that transformers 4 and 5 both read, and a `quantization_config` goes, since what is
    written is not quantised. Files appear under their names only when complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        parts, dtype = _write_parts(folder, tensors, max_shard_bytes)
        for stale in (*folder.glob("model*.safetensors"), folder / INDEX):
            stale.unlink(missing_ok=True)
        _name_parts(folder, parts)
    finally:
        for part in folder.glob(".part-*.safetensors"):
            part.unlink()
    config = {key: value for key, value in hf_config.items() if key not in NOT_WRITTEN}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)


def _write_parts(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int
) -> tuple[list[tuple[Path, dict[str, int]]], torch.dtype]:
    """Files with the bytes of each tensor in them, and the dtype that most of the numbers have."""
    parts: list[tuple[Path, dict[str, int]]] = []
    dtypes: Counter[torch.dtype] = Counter()
    for shard in _shards(tensors, limit):
        part = folder / f".part-{len(parts):05d}.safetensors"
        parts.append((part, {name: tensor.nbytes for name, tensor in shard.items()}))
        save_file(shard, str(part), metadata={"format": "pt"})
        for tensor in shard.values():
            dtypes[tensor.dtype] += tensor.numel()
    if not parts:
        raise CheckpointError(
            f"nothing to write to {folder}", why="no tensor was given", fix="report this as a bug"
        )
    return parts, dtypes.most_common(1)[0][0]


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > limit:
            yield shard
            shard, held = {}, 0
        # A copy: the source may be a view that its owner overwrites, or lie on a device.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        held += tensor.nbytes
    if shard:
        yield shard


def _name_parts(folder: Path, parts: list[tuple[Path, dict[str, int]]]) -> None:
    if len(parts) == 1:
        os.replace(parts[0][0], folder / SINGLE)
        return
    weight_map = {}
    for number, (part, sizes) in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        os.replace(part, folder / name)
        weight_map.update(dict.fromkeys(sizes, name))
    total = sum(size for _, sizes in parts for size in sizes.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is never seen half written."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)


def copy_side_files(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config where they exist; returns the names copied."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [name for name in SIDE_FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, folder / name)
    return found
