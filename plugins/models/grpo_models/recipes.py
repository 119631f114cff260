"""Defaults of the families for GRPO, each with the reason that `grpo plan --config` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_core.model.plugin import Advice
from grpo_core.model.scale import total_parameters

if TYPE_CHECKING:
    from grpo_core.impl import DeviceInfo
    from grpo_core.model.arch import Arch

LARGE = 100 * 10**9
"""Parameters from which a model counts as large."""
ROUTER_FLOAT32 = Advice(
    value="float32",
    why="in bfloat16 near-equal experts swap between rollout and trainer (ChatLearn, verl_patch)",
)
UNFILTERED = "a filter would make the sampled distribution another than the one that is trained"


def dense_recipe() -> dict[str, Advice]:
    """Full-parameter GRPO of an instruct model, whatever generation_config.json suggests for chatting."""
    return {
        "train.lr": Advice(
            value=1e-6, why="full-parameter GRPO of Qwen2.5-7B, 32B and Qwen3-8B in MindSpeed-RL"
        ),
        "train.max_grad_norm": Advice(value=1.0, why="one bad batch cannot throw the policy far"),
        "rollout.temperature": Advice(value=1.0, why=UNFILTERED),
        "rollout.top_k": Advice(value=0, why=UNFILTERED),
        "rollout.top_p": Advice(value=1.0, why=UNFILTERED),
    }


def moe_recipe(lr: Advice, router_dtype: Advice) -> dict[str, Advice]:
    """What keeps a mixture of experts from collapsing in reinforcement learning, over the dense defaults.

    Without these, ChatLearn's Moonlight run fell from 0.68 to 0.15 accuracy on MATH after about 150 steps.
    Two of its cures need no setting: there is no balancing loss, and selection biases are kept and frozen.
    """
    once = "off-policy updates make routers drift; ChatLearn's stabilised MoE recipes update once a rollout"
    return {
        **dense_recipe(),
        "train.lr": lr,
        "train.router_dtype": router_dtype,
        "train.mtp": Advice(value="off", why="multi-token prediction is switched off for RL (ChatLearn)"),
        "algo.mini_batches": Advice(value=1, why=once),
        "algo.epochs": Advice(value=1, why=once),
    }


def deepseek_recipe(arch: Arch) -> dict[str, Advice]:
    """DeepSeek-V3 and R1; Moonlight by its size."""
    total = total_parameters(arch)
    if total < LARGE:
        lr = Advice(value=2e-6, why=f"{spelled(total)} parameters: Moonlight's rate in verl and ChatLearn")
    else:
        lr = Advice(
            value=7e-7,
            why=f"{spelled(total)} parameters: DeepSeek-V3's stable rate in ChatLearn (verl: 2e-7)",
        )
    return moe_recipe(lr, ROUTER_FLOAT32)


def qwen_moe_recipe(arch: Arch) -> dict[str, Advice]:
    """Qwen3-MoE by its size."""
    total = total_parameters(arch)
    if total < LARGE:
        lr = Advice(value=2e-6, why=f"{spelled(total)} parameters: Qwen3-30B-A3B's rate in ChatLearn")
    else:
        lr = Advice(
            value=7e-7, why=f"{spelled(total)} parameters: the rate that kept DeepSeek-V3 stable in ChatLearn"
        )
    return moe_recipe(lr, ROUTER_FLOAT32)


def qwen_next_recipe(device: DeviceInfo) -> dict[str, Advice]:
    """Qwen3-Next: its router in float64 where the device has it."""
    if "float64" in device.dtypes:
        router = Advice(value="float64", why="512 experts: ChatLearn's run held with moe_router_dtype fp64")
    else:
        router = Advice(
            value="float32",
            why=f"float64 is steadier with 512 experts, but {device.name or device.type} does not have it",
        )
    return moe_recipe(Advice(value=2e-6, why="Qwen3-Next-80B-A3B's rate in ChatLearn"), router)


def spelled(parameters: int) -> str:
    """ "16.0 billion"."""
    return f"{parameters / 1e9:.1f} billion"
