"""The config of the teacher's side: one file serves ``decant tokenize`` and ``decant cache``."""

from typing import Literal, Self

from pydantic import Field, model_validator

from logit_store.codec.levels import CodecConfig
from logit_store.config import Config


class SourceConfig(Config):
    """Where documents come from: a dataset of the Hub, or files."""

    dataset: str | None = None
    """Hub dataset id (`org/name`). Its repository is fetched once into the Hub cache, at `revision`."""
    name: str | None = None
    """Configuration of the Hub dataset, where it has several."""
    revision: str | None = None
    """Branch, tag or commit of the Hub dataset; the commit it stands for is recorded."""
    split: str = "train"
    """Split of the Hub dataset."""
    files: list[str] = []
    """Paths, globs or fsspec URLs of files. With `dataset`: which files of its repository."""
    format: Literal["json", "parquet", "arrow", "text"] | None = None
    """Format of `files`; taken from the ending where it is not given. Of text files, each is one document."""
    text_column: str = "text"
    """Column that holds a document's text."""

    @model_validator(mode="after")
    def _has_origin(self) -> Self:
        if self.dataset is None and not self.files:
            raise ValueError("give `dataset` (a Hub id) or `files`")
        return self


class TokensConfig(Config):
    """Token shards: made by `decant tokenize`, read by every teacher."""

    path: str
    """Where the token shards are written. A path or fsspec URL."""
    source: SourceConfig
    tokenizer: str
    """Hub id or directory of the tokenizer."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of the tokenizer on the Hub."""
    window: int = Field(1024, ge=2)
    """Longest sequence in tokens. Longer documents become consecutive windows."""
    columns: list[str] = []
    """Columns of the dataset that rows carry along, such as `url`: text, whole numbers, floats or booleans."""
    num_shards: int = Field(16, ge=1, le=1_000_000)
    """Shards of about equal numbers of documents. One shard is the unit of work, retry and commit."""
    held_out: float = Field(0.01, ge=0.0, lt=1.0)
    """Share of documents, chosen by the hash of their text, that no training reads."""


class TeacherConfig(Config):
    """The model whose labels are cached."""

    model: str
    """Hub id or directory of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """Engine that scores. vLLM is faster on GPUs; its tail mass is one minus the kept mass."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the weights while scoring. The softmax is always float32."""
    batch_tokens: int = Field(8192, ge=1)
    """Tokens of a scoring batch. Rows of a batch have equal lengths: padding would change the labels."""
    gpu_memory_utilization: float = Field(0.85, gt=0.0, le=1.0)
    """vLLM only: its share of the GPU's memory."""


class TargetsConfig(Config):
    """What is kept of each distribution."""

    k: int = Field(64, ge=1)
    """Most probable ids kept at each position (`k` equal to the vocabulary keeps everything)."""
    temperatures: list[float] = []
    """Temperatures other than 1 that students may train at; each costs 4 bytes per position."""

    @model_validator(mode="after")
    def _temperatures_are_sane(self) -> Self:
        if any(t <= 0 or t == 1 for t in self.temperatures):
            raise ValueError("temperatures must be positive and other than 1 (1 is always served)")
        return self


class StoreConfig(Config):
    """The logit store."""

    path: str
    """Where the store is written. A path or fsspec URL."""
    codec: CodecConfig = CodecConfig()
    """How log-probs are stored. Ids and the tail's mass are exact always."""


class ClusterConfig(Config):
    """The Ray cluster and its teacher workers."""

    address: str | None = None
    """Ray address to join (`auto`, `HOST:6379`, `ray://HOST:10001`); a local cluster is started without one."""
    workers: int = Field(2, ge=1)
    """Teacher workers."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores, and threads, of a worker."""
    gpus_per_worker: float = Field(0.0, ge=0.0)
    """GPUs of a worker. At 0 the transformers backend scores on the CPU, whatever the machine has."""
    max_restarts: int = Field(3, ge=0)
    """How often a worker, and a shard whose worker died, is started again."""


class CacheConfig(Config):
    """One run of `decant tokenize` and `decant cache`."""

    tokens: TokensConfig
    teacher: TeacherConfig
    targets: TargetsConfig = TargetsConfig()
    store: StoreConfig
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _backend_gives_the_targets(self) -> Self:
        if self.teacher.backend == "vllm" and self.targets.temperatures:
            raise ValueError("targets.temperatures need log-partitions, which teacher.backend=vllm does not give yet")
        return self
