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
    """Column with the prompt: a string, or chat messages."""
    answer_key: str = "answer"
    """Column with the ground truth that rewards see as `sample.answer`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the dataset: `limit`, `plain` (no chat template) of a file; `size`, `seed`, settings of a task."""
    eval_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the evaluation set."""
    system: str = ""
    """System message put before each prompt; empty for the template's own."""
    suffix: str = ""
    """Text added to each user message."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Switch of the chat template, where it has one; "auto" leaves it to the template."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Prompts longer than this, chat template included, are overlong."""
    overlong: Literal["error", "drop"] = "error"
    """Stop on an overlong prompt, or leave it out."""
    shuffle: bool = True
    """Draw prompts in an order given by `run.seed`, another in each epoch; else in the file's order."""


class AlgoConfig(Section):
    """GRPO (Shao et al. 2024) and its variants."""

    group_size: int = Field(8, ge=1)
    """G, completions of each prompt; advantages compare them with each other."""
    advantage: str = "group_norm"
    """"group_norm" (mean and std), "group_mean" (mean only, Dr. GRPO), or a registered name."""
    loss: str = "ppo_clip"
    """"ppo_clip" or a registered name."""
    clip_low: float = Field(0.2, ge=0)
    """Lower clip of the probability ratio: 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """Upper clip of the probability ratio: 1 + clip_high."""
    clip_dual: float = Field(0.0, ge=0)
    """Dual-clip bound for negative advantages (Ye et al. 2020); 0 is off, else above 1."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL term against the frozen starting model; 0 loads no reference model."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL (Schulman 2020)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over all tokens (DAPO), or over each completion first and then over completions."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps per epoch of a rollout."""
    epochs: int = Field(1, ge=1)
    """Passes over the completions of a rollout."""


class RolloutConfig(Section):
    engine: str = "native"
    """"native", or an engine's "<plugin>:<name>"."""
    prompts: int = Field(8, ge=1)
    """Prompts per step; completions per step are prompts x algo.group_size."""
    max_tokens: int = Field(256, ge=1)
    """New tokens of a completion, at most."""
    temperature: float = Field(1.0, ge=0)
    """Of sampling; log-probs of the loss are taken at it."""
    top_k: int = Field(0, ge=0)
    """Keep the k likeliest tokens; 0 is off."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of tokens with this probability; 1 is off."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens below this share of the likeliest one's probability; 0 is off."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end a completion."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """Token ids that end a completion, besides the model's own."""
    min_tokens: int = Field(0, ge=0)
    """End tokens are not drawn before this many tokens."""
    max_sequences: int = Field(512, ge=1)
    """Completions decoded at once, at most."""
    sleep: bool = True
    """Free the engine's weights and cache while the policy trains; the next weights wake it."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """"auto" is train.dtype."""
    graph: Literal["auto", "off"] = "auto"
    """Decode steps of the native engine as device graphs: "auto" where the device has graphs and every op of
    a step can be recorded; `grpo plan` says why not."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the engine."""


class TrainConfig(Section):
    engine: str = "native"
    """"native", or a trainer's "<plugin>:<name>"."""
    steps: int = Field(100, ge=1)
    """Rollout steps of the run."""
    lr: float = Field(1e-6, gt=0)
    """Learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate, after the warmup."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises from 0."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where linear and cosine schedules end, as a share of lr."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled; norms and biases are not decayed."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Of AdamW."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Of AdamW."""
    eps: float = Field(1e-8, gt=0)
    """Of AdamW."""
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
    routing_replay: Literal["off", "R2", "R3"] = "off"
    """Experts of a mixture in the update: "off" routes afresh, "R3" replays those of the rollout engine, "R2"
    those of the pass that takes the old log-probs. That pass is run when algo.mini_batches x algo.epochs is
    above 1; a step of one update starts from the same weights, so that its own routing is R2's already."""
    router_dtype: Literal["float32", "float64"] = "float32"
    """Of the routers' logits, in training and rollout; the compute dtype would be too coarse to agree."""
    mtp: Literal["off", "load"] = "off"
    """Layers for multi-token prediction, which are not trained: "off" leaves them in the source checkpoint,
    from where an export copies them; "load" holds them in memory and hands them to engines, too."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the trainer."""


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0 is never."""
    samples: int = Field(64, ge=1)
    """Prompts of the evaluation set that are used, at most."""
    temperature: float = Field(0.0, ge=0)
    """Of the evaluation's sampling; 0 is greedy."""


class RunConfig(Section):
    dir: str = "runs/{name}"
    """Run folder; `{name}` and `{time}` are filled in. It must not exist."""
    name: str = "grpo"
    """Name of the run."""
    seed: int = 0
    """Everything random follows from it."""
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
    """The reward of a completion is the weighted sum of all rewards."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reward function."""
    timeout: float = Field(10.0, gt=0)
    """Seconds for one completion."""


class RoleConfig(Section):
    rollout: str = ""
    """Device of the rollout; empty is `device`."""
    train: str = ""
    """Device of the training; empty is `device`."""


class Config(Section):
    """A run. Every key can be given in YAML and as `dotted.key=value` on the command line."""

    model: str
    """Folder with config.json, a .gguf file, `package:<name>` for weights shipped in a Python package, or a
    hub id."""
    device: str = "auto"
    """"auto", "cpu", or any plugin's device."""
    roles: RoleConfig = RoleConfig()
    """Devices by role, where they differ."""
    fallback: Literal["none", "reference"] = "none"
    """Whether an op that no plugin serves on the device may run on the slow reference."""
    consistent: bool = False
    """Rollout and trainer give the same log-probs for the same tokens, bit for bit, whatever is batched or
    packed around a sequence; slower (see memory-and-speed.md). Ops that cannot promise it are passed over."""
    ops: dict[str, str] = Field(default_factory=dict)
    """Pins: op -> "<plugin>:<name>"."""
    plugins_off: list[str] = Field(default_factory=list)
    """Plugins not to load, by name."""
    data: DataConfig
    rewards: list[RewardConfig] = Field(min_length=1)
    """One entry for each reward."""
    algo: AlgoConfig = AlgoConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()
