"""The config of one student run. What the store knows (K, V, temperatures, tokenizer) is not typed again here."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from logit_store.config import Config
from training.students.sizes import SIZES


class RunConfig(Config):
    """Where the run lives."""

    path: str
    """Directory of the run: config, metrics, checkpoints, TensorBoard, and the model at the end. Local."""
    seed: int = 0
    """Decides weights of a new student, the order of rows, and dropout."""


class WeightedStoreConfig(Config):
    """One store of several."""

    store: str
    """Path or URL."""
    weight: float = Field(1.0, gt=0.0, allow_inf_nan=False)
    """Its share, relative to the other stores' weights."""


class DataConfig(Config):
    """What the student learns from: one of `store`, `teachers` and `mixture`."""

    store: str | None = None
    """Path or URL of a logit store; of a token store when `loss.alpha` is 0."""
    teachers: list[WeightedStoreConfig] | None = Field(None, min_length=1)
    """Logit stores of several teachers over one set of token shards. Weights are shares of the distillation loss."""
    mixture: list[WeightedStoreConfig] | None = Field(None, min_length=1)
    """Stores of different texts under one tokenizer. Weights are shares of the positions trained on."""
    ahead: int = Field(2, ge=1)
    """Steps that are read and decoded while the student computes."""
    threads: int = Field(2, ge=1)
    """Threads of each rank that do so."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        given = [name for name in ("store", "teachers", "mixture") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"not {' and '.join(given)} at once" if given else "and none of them is there"
            raise ValueError(
                f"give one of `store` (one store), `teachers` (several over the same rows) and `mixture` (several "
                f"texts), {what}"
            )
        return self

    @property
    def stores(self) -> list[WeightedStoreConfig]:
        """Every store that is named, in order; a single one has weight 1."""
        return self.teachers or self.mixture or [WeightedStoreConfig(store=str(self.store))]


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
    """A new model by the number of its parameters without the embedding: a name of
    training/students/sizes.py, as `160m`."""
    architecture: Literal["qwen3", "llama"] | None = None
    """What `size` is built as; qwen3 where it is not given."""
    from_teacher: FromTeacherConfig | None = None
    lora: LoraConfig | None = None
    """Train small matrices beside the frozen weights of `model` or `from_teacher`; the result has them merged."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    attention: Literal["padded", "varlen"] = "padded"
    """How a micro-batch keeps its sequences apart: `padded` as rows of one array; `varlen` one after the other without
    padding, for FlashAttention 2 on a GPU in bf16 or fp16 (`flash-attn` installed)."""
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


class TowardsConfig(Config):
    """How a number changes with the tokens seen."""

    kind: Literal["linear", "cosine"]
    """A straight line, or half a wave of a cosine. What stays needs none; `{kind: constant}` is no schedule."""
    to: float = Field(ge=0.0, allow_inf_nan=False)
    """Where it ends; it starts at the number itself."""
    over_tokens: int = Field(ge=1)
    """Tokens after which it is there, and stays."""


class LearnedTemperatureConfig(Config):
    """Curriculum temperature (arXiv 2211.16231): T is learned against the student, by a reversed gradient.

    T = middle + opening · (high − low) · (sigmoid(rate · w) − ½); w begins at 0, and goes where the distillation loss
    is larger. The paper lets the reversed gradient grow with time, a factor that Adam divides away again; here the
    range opens instead.
    """

    low: float = Field(gt=0.0, allow_inf_nan=False)
    """Lower bound of T."""
    high: float = Field(gt=0.0, allow_inf_nan=False)
    """Upper bound of T."""
    over_tokens: int = Field(ge=1)
    """Tokens over which `opening` goes from 0 to 1, along a cosine: T hardens slowly."""
    rate: float = Field(100.0, gt=0.0, allow_inf_nan=False)
    """Adam moves w as fast as a weight, at the learning rate: too slow for a single number, so this much faster."""

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class LossConfig(Config):
    """alpha · T² · D(teacher ‖ student at temperature T) + (1 − alpha) · cross-entropy + z_loss · (log-sum-exp)²."""

    alpha: float = Field(0.9, ge=0.0, le=1.0)
    """Weight of the soft labels; 0 is plain cross-entropy and needs no labels."""
    alpha_schedule: TowardsConfig | None = None
    """Where alpha goes from there."""
    temperature: float = Field(1.0, gt=0.0, allow_inf_nan=False)
    """T. Other than 1, it must be among the store's `temperatures`."""
    temperature_schedule: TowardsConfig | None = None
    """Where T goes from there: between temperatures of the store, which needs at least two beside 1."""
    learned_temperature: LearnedTemperatureConfig | None = None
    """In place of `temperature` and its schedule; needs what a schedule needs."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "tvd"] = "forward_kl"
    """D: see `training/losses/divergences.py`."""
    beta: float = Field(0.5, gt=0.0, lt=1.0)
    """jsd: the teacher's weight in the mean of both."""
    tail: Literal["ghost", "renormalise", "none", "uniform", "ground_truth", "sampled"] = "ghost"
    """What becomes of the mass outside the head, and what goes with which D: see `training/losses/tails.py`."""
    z_loss: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Weight of the squared log-sum-exp of the logits; 1e-4 is usual."""
    chunk_positions: int | None = Field(None, ge=1)
    """Positions whose logits exist at once; chosen from V where it is not given."""

    @field_validator("alpha_schedule", "temperature_schedule", mode="before")
    @classmethod
    def _constant_is_none(cls, schedule: Any) -> Any:
        return None if schedule == {"kind": "constant"} else schedule

    @model_validator(mode="after")
    def _has_one_course(self) -> Self:
        if self.alpha_schedule is not None and self.alpha_schedule.to > 1:
            raise ValueError(f"alpha_schedule.to {self.alpha_schedule.to} must be between 0 and 1")
        if self.temperature_schedule is not None and self.temperature_schedule.to == 0:
            raise ValueError("temperature_schedule.to must be above 0")
        if self.learned_temperature and self.model_fields_set & {"temperature", "temperature_schedule"}:
            raise ValueError(
                "learned_temperature stands in place of temperature and temperature_schedule: remove these"
            )
        return self

    @property
    def needs_labels(self) -> bool:
        """Whether the soft labels ever count."""
        return self.alpha > 0 or (self.alpha_schedule is not None and self.alpha_schedule.to > 0)

    @property
    def extreme_temperatures(self) -> tuple[float, float]:
        """The lowest and the highest T that can come up."""
        if self.learned_temperature:
            return self.learned_temperature.low, self.learned_temperature.high
        end = self.temperature_schedule.to if self.temperature_schedule else self.temperature
        return min(self.temperature, end), max(self.temperature, end)


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
    """fixed_linear, fixed_root: difficulties are multiples of this."""
    root_degree: int = Field(2, ge=1)
    """fixed_root: difficulty grows with the root of this degree."""
    difficulty: list[int] | None = None
    """fixed_discrete: the difficulties, from `min_difficulty` to `max_difficulty`."""
    max_tokens: list[int] | None = None
    """fixed_discrete: the tokens up to which each difficulty holds; one fewer than difficulties."""
    function: str | None = Field(None, pattern=r"^[\w.]+:\w+$")
    """custom: `module:name` of a Python function that takes tokens and returns the difficulty."""


class PacingConfig(Config):
    """The curriculum's clock stands still while the gradient is restless: volatility is the standard deviation of the
    gradient's norm over its mean, in a running window.
    """

    max_volatility: float = Field(gt=0.0)
    """The clock advances by a step's tokens only where volatility is at most this."""
    window_steps: int = Field(100, ge=2)
    """Steps that the running mean and deviation remember; the clock waits for as many at the start."""


class ScheduledConfig(Config):
    """A difficulty over tokens: DeepSpeed's schedule types and keys, with tokens in place of steps."""

    schedule_type: Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"] = "fixed_linear"
    min_difficulty: int = Field(ge=1)
    """Difficulty at the start."""
    max_difficulty: int = Field(ge=1)
    """Difficulty at the end."""
    schedule_config: CurriculumScheduleConfig
    cycles: int = Field(1, ge=1)
    """How often the schedule is gone through; after the last time it stays at its end."""
    cycle_tokens: int | None = Field(None, ge=1)
    """Tokens after which the next cycle begins."""

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.min_difficulty > self.max_difficulty:
            raise ValueError(f"min_difficulty {self.min_difficulty} is above max_difficulty {self.max_difficulty}")
        if (self.cycles > 1) != (self.cycle_tokens is not None):
            raise ValueError("cycles beyond one need cycle_tokens, and cycle_tokens needs cycles")
        needed = {"fixed_discrete": ("difficulty", "max_tokens"), "custom": ("function",)}
        for key in needed.get(self.schedule_type, ("total_curriculum_tokens",)):
            if getattr(self.schedule_config, key) is None:
                raise ValueError(f"{self.schedule_type} needs schedule_config.{key}")
        if self.schedule_type == "fixed_discrete":
            self._check_discrete(self.schedule_config.difficulty or [], self.schedule_config.max_tokens or [])
        return self

    def _check_discrete(self, difficulty: list[int], max_tokens: list[int]) -> None:
        if len(max_tokens) != len(difficulty) - 1:
            raise ValueError("schedule_config.max_tokens must have one entry fewer than schedule_config.difficulty")
        if max_tokens != sorted(max_tokens):
            raise ValueError("schedule_config.max_tokens must ascend")
        low, high = self.min_difficulty, self.max_difficulty
        if min(difficulty) < low or max(difficulty) > high:
            raise ValueError(f"schedule_config.difficulty must stay from min_difficulty {low} to max_difficulty {high}")


class CurriculumConfig(ScheduledConfig):
    """Sequence length over tokens; difficulties are positions per sequence."""

    mode: Literal["prefix", "bucket"] = "prefix"
    """`prefix`: every row is cut to the current length. `bucket`: only rows that fit in it, whole, those of a step of
    about one length; for token shards made with `tokens.pieces: powers_of_two`."""
    boundary: Literal["token", "sentence", "line"] = "token"
    """prefix: where a row is cut. At the current length, or at the last end of a sentence or line before it."""
    pacing: PacingConfig | None = None
    """Without it the clock of both curricula is the tokens seen."""

    @model_validator(mode="after")
    def _whole_rows_are_not_cut(self) -> Self:
        if self.mode == "bucket" and self.boundary != "token":
            raise ValueError("`boundary` says where rows are cut, and mode=bucket cuts none: leave it out")
        return self


class RowCurriculumConfig(ScheduledConfig):
    """Which rows are trained on: the easiest so many percent for the teacher; difficulties are percents, 5 to 100."""

    metric: Literal["loss", "entropy"] = "loss"
    """What of the teacher's labels makes a row difficult: the teacher's mean loss on its tokens, or the mean entropy of
    its predictions."""
    min_difficulty: int = Field(ge=5, le=100)
    """Percent of the rows at the start."""
    max_difficulty: int = Field(100, ge=5, le=100)
    """Percent of the rows at the end."""


class EvaluationConfig(Config):
    """Held-out evaluation: at the end always, and every `every_tokens`."""

    every_tokens: int | None = Field(None, ge=1)
    """Tokens between evaluations."""
    max_rows: int | None = Field(None, ge=1)
    """Evaluate on the first so many held-out rows."""


class CheckpointConfig(Config):
    """Checkpoints for resuming; the newest is kept."""

    every_tokens: int | None = Field(None, ge=1)
    """Tokens between checkpoints. Without it there is none before the last step, and a killed run starts again."""


class WandbConfig(Config):
    """Metrics to Weights & Biases."""

    project: str
    """Project that the run appears in."""
    entity: str | None = None
    """Team or user; the account's own where it is not given."""
    name: str | None = None
    """Name of the run; that of its directory where it is not given."""
    mode: Literal["online", "offline"] = "online"
    """offline writes below the run's directory, for `wandb sync`."""


class MlflowConfig(Config):
    """Metrics to MLflow."""

    experiment: str
    """Experiment that the run appears in."""
    tracking_uri: str | None = None
    """Server or folder; MLFLOW_TRACKING_URI, or MLflow's own default, where it is not given."""
    name: str | None = None
    """Name of the run; that of its directory where it is not given."""


class WatchConfig(Config):
    """Where figures go beside `metrics.jsonl` and TensorBoard, which are always written."""

    peak_tflops: float | None = Field(None, gt=0.0)
    """What one device can do at the dtype trained in, dense, for MFU. Known GPUs have their bf16 figure."""
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None


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
    row_curriculum: RowCurriculumConfig | None = None
    """Instead of a curriculum of lengths, or beside it: easy rows first, as the teacher finds them."""
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()
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
