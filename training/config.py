"""The config of one student run. What the store knows (K, V, temperatures, tokenizer) is not typed again here."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from logit_store.config import Config

TAILS = ("ghost", "ground_truth", "renormalise", "uniform")


class RunConfig(Config):
    """Where the run lives."""

    path: str
    """Directory of the run: config, metrics, checkpoints, TensorBoard, and the model at the end. Local."""
    seed: int = 0
    """Decides weights of a new student, the order of rows, and dropout."""


class DataConfig(Config):
    """What the student learns from."""

    store: str
    """Path or URL of a logit store; of a token store when `loss.alpha` is 0."""


class StudentConfig(Config):
    """The student model: one that exists, or a new one from an architecture."""

    model: str | None = None
    """Hub id or directory of a causal language model to start from."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    config: dict[str, Any] | None = None
    """A new model: `model_type` and the fields of its transformers config. `vocab_size` defaults to the store's V."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if (self.model is None) == (self.config is None):
            raise ValueError("give either `model` (start from one) or `config` (make a new one)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs `model_type`, e.g. llama or qwen3")
        return self


class LossConfig(Config):
    """alpha · T² · KL(teacher ‖ student at temperature T) + (1 − alpha) · cross-entropy."""

    alpha: float = Field(0.9, ge=0.0, le=1.0)
    """Weight of the soft labels; 0 is plain cross-entropy and needs no labels."""
    temperature: float = Field(1.0, gt=0.0)
    """T. Other than 1, it must be among the store's `temperatures`."""
    tail: Literal["ghost", "ground_truth", "renormalise", "uniform"] = "ghost"
    """What becomes of the mass outside the head: see `training/losses.py`."""
    chunk_positions: int | None = Field(None, ge=1)
    """Positions whose logits exist at once; chosen from V where it is not given."""


class ScheduleConfig(Config):
    """How long, how large, how fast. Everything counts tokens: positions that carry loss, over all ranks."""

    total_tokens: int = Field(ge=1)
    """Tokens of the whole run."""
    tokens_per_step: int = Field(ge=1)
    """Tokens of one optimizer step; at least the longest sequence."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Tokens, padding included, of one forward pass on one rank. Changes memory, never the loss."""
    lr: float = Field(gt=0.0)
    """Peak learning rate."""
    warmup_tokens: int = Field(0, ge=0)
    """Tokens over which the learning rate grows linearly from 0."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls after the warm-up."""
    min_lr_ratio: float = Field(0.1, ge=0.0, le=1.0)
    """Final learning rate over the peak."""


class OptimizerConfig(Config):
    """AdamW and clipping, where the DeepSpeed JSON does not bring its own `optimizer`, `gradient_clipping`."""

    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2)
    """Decay rates of the moments."""
    eps: float = Field(1e-8, gt=0.0)
    """Added to the denominator."""
    weight_decay: float = Field(0.1, ge=0.0)
    """Decoupled weight decay."""
    gradient_clipping: float = Field(1.0, ge=0.0)
    """Largest norm of the gradient; 0 does not clip."""


class CurriculumScheduleConfig(Config):
    """DeepSpeed's `schedule_config` with tokens in place of steps."""

    total_curriculum_tokens: int | None = Field(None, ge=1)
    """fixed_linear, fixed_root: tokens at which `max_difficulty` is reached."""
    difficulty_step: int = Field(8, ge=1)
    """fixed_linear, fixed_root: lengths are multiples of this."""
    root_degree: int = Field(2, ge=1)
    """fixed_root: difficulty grows with the root of this degree."""
    difficulty: list[int] | None = None
    """fixed_discrete: the lengths."""
    max_tokens: list[int] | None = None
    """fixed_discrete: the tokens up to which each length holds; one fewer than lengths."""


class CurriculumConfig(Config):
    """Sequence length over tokens: DeepSpeed's schedule types. Rows are cut to prefixes of that length."""

    schedule_type: Literal["fixed_linear", "fixed_root", "fixed_discrete"] = "fixed_linear"
    min_difficulty: int = Field(ge=1)
    """Positions per sequence at the start."""
    max_difficulty: int = Field(ge=1)
    """Positions per sequence at the end."""
    schedule_config: CurriculumScheduleConfig

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        schedule = self.schedule_config
        if self.min_difficulty > self.max_difficulty:
            raise ValueError(f"min_difficulty {self.min_difficulty} is above max_difficulty {self.max_difficulty}")
        if self.schedule_type != "fixed_discrete":
            if schedule.total_curriculum_tokens is None:
                raise ValueError(f"{self.schedule_type} needs schedule_config.total_curriculum_tokens")
            return self
        if not schedule.difficulty or schedule.max_tokens is None:
            raise ValueError("fixed_discrete needs schedule_config.difficulty and schedule_config.max_tokens")
        if len(schedule.max_tokens) != len(schedule.difficulty) - 1:
            raise ValueError("schedule_config.max_tokens must have one entry fewer than schedule_config.difficulty")
        if schedule.max_tokens != sorted(schedule.max_tokens) or min(schedule.difficulty) < 1:
            raise ValueError("schedule_config.max_tokens must ascend and schedule_config.difficulty be positive")
        if max(schedule.difficulty) > self.max_difficulty:
            raise ValueError(f"schedule_config.difficulty goes beyond max_difficulty {self.max_difficulty}")
        return self


class EvaluationConfig(Config):
    """Held-out evaluation: at the end always, and every `every_tokens`."""

    every_tokens: int | None = Field(None, ge=1)
    """Tokens between evaluations."""
    max_rows: int | None = Field(None, ge=1)
    """Evaluate on the first so many held-out rows."""


class CheckpointConfig(Config):
    """Checkpoints for resuming; the newest is kept."""

    every_tokens: int | None = Field(None, ge=1)
    """Tokens between checkpoints. Without it there is none, and a killed run starts again."""


class LauncherConfig(Config):
    """How `decant train` starts ranks: on this machine, or on a Ray cluster (without Ray, several machines need the
    `deepspeed` command itself).
    """

    kind: Literal["deepspeed", "ray"] = "deepspeed"
    """`deepspeed`: its launcher, here. `ray`: workers of Ray Train on a cluster that is running."""
    ranks: int | None = Field(None, ge=1)
    """Ranks; with `deepspeed` every GPU where it is not given, one without a GPU. `ray` has to be told."""
    address: str | None = None
    """ray: the cluster, e.g. HEAD:6379, or `auto` on one of its nodes."""
    restarts: int = Field(0, ge=0)
    """ray: how often ranks that died are started again; they go on from the newest checkpoint."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind == "ray" and (self.address is None or self.ranks is None):
            raise ValueError("kind ray needs `address` (a cluster that is running) and `ranks`")
        if self.kind == "deepspeed" and (self.address is not None or self.restarts):
            raise ValueError("`address` and `restarts` belong to kind ray")
        return self


class TrainConfig(Config):
    """One run of `decant train`."""

    run: RunConfig
    data: DataConfig
    student: StudentConfig
    loss: LossConfig = LossConfig()
    schedule: ScheduleConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    curriculum: CurriculumConfig | None = None
    """Without it every row is used at its full length."""
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deepspeed: str | None = None
    """Path of a DeepSpeed JSON. It passes through; batch sizes, accumulation and scheduler are ours."""
    launcher: LauncherConfig = LauncherConfig()

    @model_validator(mode="after")
    def _steps_hold_a_row(self) -> Self:
        longest = self.curriculum.max_difficulty if self.curriculum else 0
        if self.schedule.tokens_per_step < longest:
            raise ValueError(
                f"schedule.tokens_per_step {self.schedule.tokens_per_step} is less than "
                f"curriculum.max_difficulty {longest}"
            )
        return self
