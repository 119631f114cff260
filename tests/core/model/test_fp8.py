"""float8 checkpoints with block scales: against the formula in float64, and every trouble by its name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_hf_model

from grpo_core.errors import CheckpointError
from grpo_core.model.checkpoint_io import load_checkpoint, read_shapes, read_tensors, write_checkpoint
from grpo_core.model.fp8 import BLOCK, dequantise, scale_shape
from grpo_core.model.hf_config import read_hf_config
from grpo_core.model.kept import read_kept, with_kept
from grpo_models.deepseek_v3 import DeepseekV3

Tensors = dict[str, torch.Tensor]
QUANTISED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
SIZES = {"hidden_size": 136, "intermediate_size": 150, "moe_intermediate_size": 129, "kv_lora_rank": 130}


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 and scales, block by block: each block's largest number becomes e4m3's largest, 448."""
    rows, columns = weight.shape
    scales = torch.ones(scale_shape((rows, columns)))
    quantised = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scales[i, j] = weight[block].abs().max() / 448
            quantised[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return quantised, scales


def by_formula(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """w[m, n] * s[m // 128, n // 128] in float64, by plain indexing."""
    m, n = torch.arange(weight.shape[0]), torch.arange(weight.shape[1])
    return weight.double() * scales.double()[m // 128][:, n // 128]


@pytest.mark.parametrize("shape", [(1, 1), (127, 128), (128, 129), (300, 257), (5, 700), (640, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_any_size_against_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(sum(shape))
    weight, scales = quantise(torch.randn(shape) * torch.logspace(-6, 2, shape[1]))
    wanted = by_formula(weight, scales)
    # A float8 number has 4 significant bits and a scale 24: the product is rounded once, to `dtype`.
    found = dequantise(weight, scales, dtype).double()
    bound = wanted.abs() * torch.finfo(dtype).eps / 2
    assert bool(((found - wanted).abs() <= bound * (1 + 1e-6)).all())


def quantised_folder(folder: Path, *, mtp: bool = False, shards: int = 1) -> Tensors:
    """A tiny DeepSeek-V3 as its authors publish it; returns what its float8 weights mean, in float64."""
    model = tiny_hf_model("deepseek_v3", **SIZES)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": QUANTISED}
    (folder / "config.json").write_text(json.dumps(config))
    held = load_file(folder / "model.safetensors")
    if mtp:
        arch = DeepseekV3().arch(config)
        held |= {name: torch.randn(shape) for name, shape in DeepseekV3().weights(arch).kept.items()}
    meant, written = {}, {}
    for name, tensor in held.items():
        if tensor.ndim == 2 and "embed" not in name and "head" not in name and ".gate.weight" not in name:
            written[name], written[name + "_scale_inv"] = quantise(tensor)
            meant[name] = by_formula(written[name], written[name + "_scale_inv"])
        else:
            keep = name.endswith("e_score_correction_bias")
            written[name] = tensor if keep else tensor.bfloat16()
            meant[name] = written[name].double()
    (folder / "model.safetensors").unlink()
    write_shards(folder, written, shards)
    return meant


def write_shards(folder: Path, tensors: Tensors, shards: int) -> None:
    """One shard, or several with every scale in another one than its weight."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    parts: list[Tensors] = [{} for _ in range(shards)]
    for index, name in enumerate(sorted(tensors)):
        parts[index % shards][name] = tensors[name]
    where = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_checkpoint_is_dequantised_while_it_is_read(shards: int, tmp_path: Path) -> None:
    meant = quantised_folder(tmp_path, shards=shards)
    assert dict(read_shapes(tmp_path)) == {name: tuple(tensor.shape) for name, tensor in meant.items()}
    found = dict(read_tensors(tmp_path))
    assert found.keys() == meant.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), meant[name], rtol=2**-24, atol=0)


def test_trained_export_is_not_quantised_and_loads_in_transformers(tmp_path: Path) -> None:
    import transformers

    meant = quantised_folder(tmp_path / "in")
    config = read_hf_config(tmp_path / "in")
    family = DeepseekV3()
    table = family.weights(family.arch(config))
    into = {name: torch.zeros(shape) for name, shape in table.neutral_shapes().items()}
    load_checkpoint(tmp_path / "in", table, into)
    write_checkpoint(tmp_path / "out", table.export(into), config)
    assert "quantization_config" not in read_hf_config(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in written if name.endswith("_scale_inv")]
    for name, tensor in written.items():
        torch.testing.assert_close(tensor.double(), meant[name], rtol=2**-24, atol=0)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_kept_layers_are_written_in_bfloat16(tmp_path: Path) -> None:
    meant = quantised_folder(tmp_path / "in", mtp=True)
    config = read_hf_config(tmp_path / "in")
    table = DeepseekV3().weights(DeepseekV3().arch(config))
    into = {name: torch.zeros(shape) for name, shape in table.neutral_shapes().items()}
    load_checkpoint(tmp_path / "in", table, into)
    exported = with_kept(table.export(into), read_kept(tmp_path / "in", table), table, into)
    write_checkpoint(tmp_path / "out", exported, config)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == meant.keys()
    name = "model.layers.3.self_attn.kv_b_proj.weight"
    assert written[name].dtype == torch.bfloat16
    torch.testing.assert_close(written[name].double(), meant[name], rtol=2**-8, atol=0)


def told(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        next(read_tensors(folder))
    with pytest.raises(CheckpointError):
        next(read_shapes(folder))
    return f"{caught.value.what} {caught.value.why}"


def test_scales_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    quantised_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    held = load_file(path)
    prefix = "model.layers.1.mlp.experts."
    del held[f"{prefix}0.up_proj.weight_scale_inv"]
    held[f"{prefix}1.up_proj.weight_scale_inv"] = torch.ones(1)
    held[f"{prefix}2.up_proj.weight_scale_inv"] = torch.ones(1, 3)
    held[f"{prefix}3.up_proj.weight"] = held[f"{prefix}3.up_proj.weight"].to(torch.float8_e5m2)
    held["model.norm.weight_scale_inv"] = torch.ones(2)
    save_file(held, path)
    text = told(tmp_path)
    for piece in (
        "5 troubles",
        f"{prefix}0.up_proj.weight_scale_inv is missing",
        f"{prefix}1.up_proj.weight_scale_inv [1] instead of [2, 2]",
        f"{prefix}2.up_proj.weight_scale_inv [1, 3] instead of [2, 2]",
        f"{prefix}3.up_proj.weight is F8_E5M2",
        "model.norm.weight_scale_inv scales nothing",
    ):
        assert piece in text


@pytest.mark.parametrize("where", ["scale", "weight"])
def test_nan_in_weight_or_scale_is_named(where: str, tmp_path: Path) -> None:
    quantised_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    held, name = load_file(path), "model.layers.2.self_attn.o_proj.weight"
    if where == "scale":
        held[name + "_scale_inv"][0, 0] = torch.nan
    else:
        # 0x7f is NaN in e4m3fn.
        held[name].view(torch.uint8)[0, 0] = 0x7F
    save_file(held, path)
    config = read_hf_config(tmp_path)
    table = DeepseekV3().weights(DeepseekV3().arch(config))
    into = {key: torch.zeros(shape) for key, shape in table.neutral_shapes().items()}
    with pytest.raises(CheckpointError, match=f"holding NaN or infinity: {name}"):
        load_checkpoint(tmp_path, table, into)


def test_reading_holds_one_tensor_and_no_copy_of_it(tmp_path: Path) -> None:
    rows, columns, count = 4096, 2048, 6
    tensors: Tensors = {}
    for number in range(count):
        tensors[f"{number}.weight"] = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
        tensors[f"{number}.weight_scale_inv"] = torch.ones(rows // 128, columns // 128)
    save_file(tensors, tmp_path / "model.safetensors")
    code = (
        "import resource, sys, torch\nfrom pathlib import Path\n"
        "from grpo_core.model.checkpoint_io import read_tensors\n"
        "torch.set_num_threads(1)\n"
        "(torch.zeros(8, 8).to(torch.float8_e4m3fn).float() * 2).sum()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"before = peak()\nfor name, tensor in read_tensors(Path({str(tmp_path)!r})):\n"
        "    del name, tensor\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # One tensor in float32, and the pages of the file that the kernel has not taken back; a copy of a tensor
    # in float32 would be four bytes a number more.
    one = rows * columns
    assert int(done.stdout) < (4 + 3) * one


def test_a_trainer_starts_from_the_float8_weights_exactly(tmp_path: Path) -> None:
    from grpo_core.backend import reference_backend
    from grpo_core.config import AlgoConfig, TrainConfig
    from grpo_core.ops.reference.collectives import OneRank
    from grpo_core.train.base import TrainSetup
    from grpo_core.train.trainer import NativeTrainer

    meant = quantised_folder(tmp_path, mtp=True)
    family = DeepseekV3()
    arch = family.arch(read_hf_config(tmp_path))
    setup = TrainSetup(
        arch=arch, weight_map=family.weights(arch), backend=reference_backend(), device=torch.device("cpu"),
        model_path=str(tmp_path), train=TrainConfig(dtype="bfloat16", mtp="load"), algo=AlgoConfig(),
        temperature=1.0, group=OneRank(), total_steps=1,
    )  # fmt: skip
    exported = dict(NativeTrainer(setup).weights())
    assert exported.keys() == meant.keys()
    for name, tensor in exported.items():
        # Rounded once, from the product in float32 to bfloat16. Copies of the embedding follow it.
        wanted = meant[setup.weight_map.kept_copies.get(name, name)]
        torch.testing.assert_close(tensor.double(), wanted, rtol=2**-8, atol=0)
