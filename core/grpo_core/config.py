"""The settings of a run: the whole schema, typed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class DataConfig(Section):
    """Where prompts come from."""

    train: str
    """A .jsonl or .parquet file, `reasoning-gym:<task>`, or a registered name."""
    eval: str = ""
    """Same forms; empty for no evaluation set."""
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the dataset, e.g. of the reasoning-gym task; `size` and `seed` among them."""
    eval_options: dict[str, Any] = Field(default_factory=dict)
    system: str = ""
    """System message put before each prompt; empty for the template's own."""
    suffix: str = ""
    """Text added to each user message."""
    max_prompt_tokens: int = Field(512, ge=1)
    overlong: Literal["error", "drop"] = "error"
    shuffle: bool = True


class AlgoConfig(Section):
    """GRPO (Shao et al. 2024) and its variants."""

    group_size: int = Field(8, ge=1)
    advantage: str = "group_norm"
    """"group_norm" (mean and std), "group_mean" (mean only, Dr. GRPO), or a registered name."""
    loss: str = "ppo_clip"
    clip_low: float = Field(0.2, ge=0)
    clip_high: float = Field(0.2, ge=0)
    clip_dual: float = Field(0.0, ge=0)
    """Dual-clip bound for negative advantages (Ye et al. 2020); 0 is off, else above 1."""
    kl_coef: float = Field(0.0, ge=0)
    kl: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps per epoch of a rollout."""
    epochs: int = Field(1, ge=1)


class RolloutConfig(Section):
    engine: str = "native"
    prompts: int = Field(8, ge=1)
    """Prompts per step; completions per step are prompts x algo.group_size."""
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    min_tokens: int = Field(0, ge=0)
    max_sequences: int = Field(256, ge=1)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """"auto" is train.dtype."""
    options: dict[str, Any] = Field(default_factory=dict)


class TrainConfig(Section):
    engine: str = "native"
    steps: int = Field(100, ge=1)
    """Rollout steps of the run."""
    lr: float = Field(1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """0 turns clipping off."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype; master weights are always float32. "auto" is bfloat16 where the device has it fast."""
    micro_tokens: int = Field(8192, ge=1)
    """Packed tokens of one micro-batch, at most (one group at least)."""
    share_prompt: bool = True
    """Compute a group's prompt once for all its completions."""
    recompute: bool = False
    """Recompute activations of each layer in the backward pass."""
    options: dict[str, Any] = Field(default_factory=dict)


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0 is never."""
    samples: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)


class RunConfig(Section):
    dir: str = "runs/{name}"
    name: str = "grpo"
    seed: int = 0
    save_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""
    trackers: list[str] = Field(default_factory=list)
    """"tensorboard", "wandb", or registered names; metrics.jsonl is always written."""
    log_samples: int = Field(8, ge=0)
    """Completions with their rewards kept each step for the report."""
    threads: int = Field(0, ge=0)
    """CPU threads; 0 is torch's choice."""


class RewardConfig(Section):
    name: str
    """"exact", "number", "math", "regex", a registered name, or package.module:function."""
    weight: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict)
    timeout: float = Field(10.0, gt=0)
    """Seconds for one completion."""


class RoleConfig(Section):
    rollout: str = ""
    train: str = ""


class Config(Section):
    """A run. Every key can be given in YAML and as `dotted.key=value` on the command line."""

    model: str
    """Folder with config.json, a .gguf file, `package:<name>` for weights shipped in a Python package, or a
    hub id."""
    device: str = "auto"
    roles: RoleConfig = RoleConfig()
    fallback: Literal["none", "reference"] = "none"
    ops: dict[str, str] = Field(default_factory=dict)
    """Pins: op -> "<plugin>:<name>"."""
    plugins_off: list[str] = Field(default_factory=list)
    data: DataConfig
    rewards: list[RewardConfig] = Field(min_length=1)
    algo: AlgoConfig = AlgoConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()
