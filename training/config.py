"""The config of one student run. What the store knows (K, V, temperatures, tokenizer) is not typed again here."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from logit_store.config import Config
from training.sizes import SIZES

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


class FromTeacherConfig(Config):
    """A student made of some of a teacher's layers, with their weights, its embedding, its last norm and its head."""

    model: str
    """Hub id or directory of the teacher; of any model with the store's tokenizer."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    layers: Literal["alternate"] | list[int] = "alternate"
    """Which layers, counted from 0, in their order in the student. `alternate` spaces them evenly from the first to the
    last: of 12, the six 0, 2, 4, 7, 9, 11, which DistilBERT took (arXiv 1910.01108)."""
    num_layers: int | None = Field(None, ge=1)
    """alternate: how many; half of them, rounded up, where it is not given."""

    @model_validator(mode="after")
    def _lists_layers_once(self) -> Self:
        if self.layers == "alternate":
            return self
        if self.num_layers is not None:
            raise ValueError("`num_layers` goes with layers: alternate; a list says by itself how many there are")
        if not self.layers or min(self.layers) < 0:
            raise ValueError("`layers` must name at least one layer; the first is 0")
        return self


class LoraConfig(Config):
    """Low-rank adaptation (arXiv 2106.09685) through peft: the weights stay, W + alpha / rank · B·A is learned."""

    rank: int = Field(16, ge=1)
    """Width of A and B."""
    alpha: float = Field(32.0, gt=0.0)
    """Scale of what is learned, over the rank."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout of the inputs of A."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers by the last parts of their names, as `q_proj`; `all-linear` is every one but the head."""

    @model_validator(mode="after")
    def _has_targets(self) -> Self:
        if not self.target_modules:
            raise ValueError("`target_modules` must name at least one linear layer, or be all-linear")
        return self


ORIGINS = ("model", "config", "size", "from_teacher")


class StudentConfig(Config):
    """The student model: one that exists, a new one by its size or its config, or some layers of a teacher."""

    model: str | None = None
    """Hub id or directory of a causal language model to start from."""
    revision: str | None = None
    """Branch, tag or commit of `model` on the Hub."""
    config: dict[str, Any] | None = None
    """A new model: `model_type` and the fields of its transformers config. `vocab_size` defaults to the store's V."""
    size: str | None = None
    """A new model by the number of its parameters without the embedding: a name of training/sizes.py, as `160m`."""
    architecture: Literal["qwen3", "llama"] | None = None
    """What `size` is built as; qwen3 where it is not given."""
    from_teacher: FromTeacherConfig | None = None
    lora: LoraConfig | None = None
    """Train small matrices beside the frozen weights of `model` or `from_teacher`; the result has them merged."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the saved weights. Without it they keep the dtype they were trained in: float32, or what `bf16` or
    `fp16` of the DeepSpeed JSON makes of it."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        given = [name for name in ORIGINS if getattr(self, name) is not None]
        if len(given) != 1:
            came = " and ".join(f"`{name}`" for name in given) or "none of them"
            raise ValueError(
                "give one of `model` (start from one), `size` or `config` (make a new one) and `from_teacher` (take "
                f"some of its layers), not {came}"
            )
        return self

    @model_validator(mode="after")
    def _fits_its_origin(self) -> Self:
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs `model_type`, e.g. llama or qwen3")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"no size is called {self.size!r}: choose one of {', '.join(SIZES)}, or give a `config`")
        if self.size is None and self.architecture is not None:
            raise ValueError("`architecture` goes with `size`")
        if self.model is None and self.revision is not None:
            raise ValueError("`revision` goes with `model`")
        if self.lora is not None and self.pretrained is None:
            raise ValueError("`lora` goes with `model` or `from_teacher`: weights of a new student must be trained")
        return self

    @property
    def pretrained(self) -> tuple[str, str | None] | None:
        """Name and revision of the model that the weights come from; None of a new one."""
        if self.from_teacher is not None:
            return self.from_teacher.model, self.from_teacher.revision
        return None if self.model is None else (self.model, self.revision)


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
    """How `decant train` starts ranks on this machine (several machines: the `deepspeed` command itself)."""

    ranks: int | None = Field(None, ge=1)
    """Ranks; every GPU where it is not given, one without a GPU."""


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
