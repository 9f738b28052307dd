"""The config of the teacher's side: one file serves ``decant tokenize`` and ``decant cache``."""

from math import inf
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from logit_store.codec.levels import CodecConfig
from logit_store.config import Config


class SourceConfig(Config):
    """Where documents come from: a dataset of the Hub, or files. They are text, conversations or token ids."""

    dataset: str | None = None
    """Hub dataset id (`org/name`). Each file is fetched into the Hub cache where it is read, at `revision`."""
    name: str | None = None
    """Configuration of the Hub dataset, where it has several."""
    revision: str | None = None
    """Branch, tag or commit of the Hub dataset; the commit it stands for is recorded."""
    split: str = "train"
    """Split of the Hub dataset."""
    files: list[str] = []
    """Paths, globs or fsspec URLs of files. With `dataset`: which files of its repository."""
    format: Literal["json", "parquet", "arrow", "lines", "text"] | None = None
    """Format of `files`; taken from the ending where it is not given. `json`: an object per line. `lines`: each
    line of a text that is not blank a document. `text`: each file a document. All three may be compressed, as .gz or
    .zst. A document, with all of its tokens, must fit into the memory of one task: some 250 bytes for each of its
    characters, so that `text` is for files of a few megabytes."""
    text_column: str | None = None
    """Column that holds a document's text (`text`, unless one of the next two is given)."""
    messages_column: str | None = None
    """Column that holds a conversation, a list of {role, content}, rendered by the tokenizer's chat template."""
    ids_column: str | None = None
    """Column that holds a document's token ids, which are taken as they are: nothing is put before or after them."""
    mask_column: str | None = None
    """With `ids_column`: column of as many 0s and 1s, where 1 means that predicting this token carries loss."""

    @model_validator(mode="before")
    @classmethod
    def _text_unless_said_otherwise(cls, values: Any) -> Any:
        kinds = ("text_column", "messages_column", "ids_column")
        if isinstance(values, dict) and all(values.get(kind) is None for kind in kinds):
            return {**values, "text_column": "text"}
        return values

    @model_validator(mode="after")
    def _has_origin(self) -> Self:
        if self.dataset is None and not self.files:
            raise ValueError("give `dataset` (a Hub id) or `files`")
        if self.dataset is not None and self.format is not None:
            raise ValueError("`format` is for `files` without a `dataset`, which has its own: leave it out")
        return self

    @model_validator(mode="after")
    def _has_one_kind(self) -> Self:
        if sum(kind is not None for kind in (self.text_column, self.messages_column, self.ids_column)) != 1:
            raise ValueError("give one of `text_column`, `messages_column` and `ids_column`, and leave out the others")
        if self.mask_column is not None and self.ids_column is None:
            raise ValueError("`mask_column` belongs to `ids_column`: a mask of other data comes from tokens.loss_on")
        if self.mask_column is not None and self.mask_column == self.ids_column:
            raise ValueError("`mask_column` and `ids_column` are the same column")
        return self

    @property
    def content_column(self) -> str:
        """The column that becomes tokens."""
        return str(self.text_column or self.messages_column or self.ids_column)


class TokensConfig(Config):
    """Token shards: made by `decant tokenize`, read by every teacher."""

    path: str
    """Where the token shards are written. A path or fsspec URL."""
    source: SourceConfig
    tokenizer: str
    """Hub id or directory of the tokenizer."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of the tokenizer on the Hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the tokenizer. Nothing of it runs otherwise."""
    window: int = Field(1024, ge=2)
    """Longest sequence in tokens. Longer documents become consecutive windows; of conversations and masked ids, windows
    in which nothing carries loss are left out."""
    pieces: Literal["windows", "powers_of_two"] = "windows"
    """`powers_of_two`: documents become pieces of 2^i tokens, the largest first, so that a length curriculum finds
    whole sequences of every length whose context is what the teacher saw. What is left below 8 tokens is one piece."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Conversations only: which tokens carry loss. `assistant`: what the template's generation markers enclose."""
    chat_template: str | None = None
    """Conversations only: path or URL of a Jinja template that replaces the tokenizer's."""
    columns: list[str] = []
    """Columns of the dataset that rows carry along, such as `url`: text, whole numbers, floats or booleans."""
    num_shards: int | None = Field(None, ge=1, le=1_000_000)
    """Shards of about equal numbers of documents. One shard is the unit of work, retry and commit. Without it, one for
    each 4 MiB of text (uncompressed; of Parquet, as the footers give it), which is about a million tokens."""
    held_out: float = Field(0.01, ge=0.0, lt=1.0)
    """Share of documents, chosen by the hash of their text, that no training reads."""

    @model_validator(mode="after")
    def _chat_keys_belong_to_chats(self) -> Self:
        if self.source.messages_column is None and (self.chat_template is not None or self.loss_on != "assistant"):
            key = "chat_template" if self.chat_template is not None else "loss_on"
            raise ValueError(f"`{key}` is for conversations: give source.messages_column, or leave it out")
        return self


class TeacherConfig(Config):
    """The model whose labels are cached."""

    model: str
    """Hub id or directory of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """Engine that scores: `vllm` is faster on GPUs, `transformers` runs everywhere."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the weights while scoring. The softmax is always float32."""
    quantization: str | None = None
    """transformers: `8bit` or `4bit` (bitsandbytes, on GPUs). vLLM: the name of a method that it knows, as `fp8`. A
    checkpoint that was saved quantised needs nothing here."""
    batch_tokens: int = Field(8192, ge=1)
    """Tokens of a scoring batch. Rows of a batch have equal lengths: padding would change the labels."""
    tensor_parallel: int = Field(1, ge=1)
    """vLLM only: GPUs that share each layer."""
    pipeline_parallel: int = Field(1, ge=1)
    """vLLM only: groups of GPUs that take the layers in turn."""
    device_map: Literal["auto"] | None = None
    """transformers only: `auto` spreads a model that is larger than one GPU over all GPUs of its worker."""
    compile: bool = False
    """transformers only: torch.compile of the decoder. Pays on GPUs with rows of few different lengths."""
    gpu_memory_utilization: float = Field(0.85, gt=0.0, le=1.0)
    """vLLM only: its share of the GPU's memory. The softmax over the vocabulary lives outside of it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Nothing of it runs otherwise."""
    pickled_weights: bool = False
    """Load weights from pickle files (*.bin), which can run any code. Refused otherwise."""

    @model_validator(mode="after")
    def _fits_the_backend(self) -> Self:
        vllm_only, transformers_only = ("tensor_parallel", "pipeline_parallel"), ("device_map", "compile")
        foreign = transformers_only if self.backend == "vllm" else vllm_only
        changed = [name for name in foreign if getattr(self, name) != type(self).model_fields[name].default]
        if changed:
            raise ValueError(f"{changed[0]} is not for teacher.backend={self.backend}: leave it out")
        if self.backend == "transformers" and self.quantization not in (None, "8bit", "4bit"):
            raise ValueError(f"quantization={self.quantization}: teacher.backend=transformers knows 8bit and 4bit")
        return self

    @property
    def num_gpus(self) -> int:
        """GPUs that the engine itself splits the model over."""
        return self.tensor_parallel * self.pipeline_parallel


class TargetsConfig(Config):
    """What is kept of each distribution, beside the next token and the `always` ids, which are kept exactly always."""

    kind: Literal["top_k", "top_p", "counts", "threshold"] = "top_k"
    """`top_k`: the k most probable ids. `top_p`: as few ids as hold a mass of p, at most k. `counts`: draws from what
    is not kept, with replacement, each standing for an equal share of it. `threshold`: ids with a probability of at
    least tau, and the rest by systematic sampling, m = ⌈rest/tau⌉ ids that each stand for rest/m."""
    k: int | None = Field(None, ge=1)
    """top_k: entries of each head (default 64; the vocabulary's size keeps everything). top_p: the most of them."""
    p: float | None = Field(None, gt=0.0, lt=1.0)
    """top_p: mass of the head."""
    draws: int | None = Field(None, ge=1, le=4096)
    """counts: how many draws at each position."""
    tau: float | None = Field(None, ge=1e-4, lt=1.0)
    """threshold: the probability from which ids are kept exactly."""
    always: list[int] = Field([], max_length=1024)
    """Ids whose log-prob is kept exactly at every position, such as an end-of-turn token."""
    temperatures: list[float] = []
    """Temperatures other than 1 that students may train at; each costs 4 bytes per position. Of `counts` and
    `threshold` at most one, and it is then the tempered distribution that is sampled, and served alone."""

    @model_validator(mode="before")
    @classmethod
    def _top_k_keeps_64(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind", "top_k") in ("top_k", "top_p") and values.get("k") is None:
            return {**values, "k": 64}
        return values

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        needs = {"top_k": ("k",), "top_p": ("k", "p"), "counts": ("draws",), "threshold": ("tau",)}[self.kind]
        for name in ("k", "p", "draws", "tau"):
            if (getattr(self, name) is not None) != (name in needs):
                raise ValueError(f"kind={self.kind} {'needs' if name in needs else 'has no'} `{name}`")
        temperatures = self.temperatures
        if any(not 0 < t < inf or t == 1 for t in temperatures) or len(set(temperatures)) < len(temperatures):
            raise ValueError("temperatures must be positive, different and other than 1 (1 is always served)")
        if self.is_sampled and len(self.temperatures) > 1:
            raise ValueError(f"kind={self.kind} samples one distribution: give at most one of `temperatures`")
        if len(set(self.always)) < len(self.always) or any(i < 0 for i in self.always):
            raise ValueError("always must hold different ids, none of them negative")
        return self

    def most_entries(self, vocabulary_size: int) -> int:
        """The most entries that a head can have."""
        if self.kind == "threshold":
            return min(vocabulary_size, int(1 / (self.tau or 1.0)) + 1)  # one more, where rounding lifts several to tau
        return self.k or 0

    @property
    def is_sampled(self) -> bool:
        """Whether ids of the tail are drawn."""
        return self.kind in ("counts", "threshold")


class StoreConfig(Config):
    """The logit store."""

    path: str
    """Where the store is written. A path or fsspec URL."""
    codec: CodecConfig = CodecConfig()
    """How log-probs are stored. Ids and the tail's mass are exact always."""


RAYS_OWN = {
    "CPU": "set cluster.cpus_per_worker",
    "GPU": "set cluster.gpus_per_worker",
    "memory": "leave it out, a worker takes what its model needs",
    "object_store_memory": "leave it out, labels do not pass through the object store",
}
"""Resources that are no custom ones, and what to do instead of naming them."""


class ClusterConfig(Config):
    """The Ray cluster and its teacher workers."""

    address: str | None = None
    """Ray address to join (`auto`, `HOST:6379`, `ray://HOST:10001`); without one, or with `local`, a cluster is started
    on this machine that nobody else can reach."""
    workers: int = Field(2, ge=1)
    """Teacher workers at most. Those that find no place yet wait for one, as an autoscaler brings it."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores, and threads, of a worker."""
    gpus_per_worker: float = Field(0.0, ge=0.0)
    """GPUs of a worker. At 0 the transformers backend scores on the CPU, whatever the machine has; a share of one, as
    0.5, is for that backend alone."""
    resources_per_worker: dict[str, float] = {}
    """Ray's custom resources that a worker needs, as `{"accelerator_type:H100": 0.001}`. Those that Ray knows by itself
    have keys of their own."""
    multi_node_workers: bool = False
    """Whether a worker's GPUs may be on several nodes, as a model needs that is larger than one: they are reserved as a
    placement group, a GPU and `cpus_per_worker` cores at a time, and vLLM starts its processes in it."""
    autoscaling: bool = False
    """Whether the cluster grows: a cluster that has no room for all workers now is then no error."""
    max_attempts: int = Field(8, ge=3)
    """How often a shard may take its worker down, or fail on storage that is out of order, before it is given up."""
    retry_delay_s: float = Field(1.0, ge=0.0)
    """Seconds before a shard or a worker is tried again; doubled with each attempt, at most a minute."""
    hung_after_s: float = Field(7200.0, gt=0.0)
    """Seconds after which a worker that has not answered, while it loads its teacher or has shards, is taken to hang,
    and is replaced: 20 times the longest answer so far, if that is more."""
    max_left_out: int = Field(100, ge=0)
    """Rows that may be left out because they kill workers. More of them end the job: something else must be wrong."""
    price_per_gpu_hour: float | None = Field(None, ge=0.0)
    """Money for a GPU (or, without GPUs, a worker) for an hour: the summary then says what the labels cost."""

    @field_validator("address")
    @classmethod
    def _joins_something(cls, address: str | None) -> str | None:
        if address == "local":  # Ray would start one that others can reach
            return None
        if address is not None and address.startswith(("http://", "https://")):
            raise ValueError(
                f"{address} is where `ray job submit` finds a cluster; to join one give HOST:6379 or ray://HOST:10001"
            )
        return address

    @field_validator("resources_per_worker")
    @classmethod
    def _are_custom_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in RAYS_OWN:
                raise ValueError(f"{name} is Ray's own: {RAYS_OWN[name]}")
            if not 1e-4 <= amount < inf or (amount > 1 and amount % 1):
                raise ValueError(f"{name} is {amount:g}: Ray takes shares from 0.0001 to 1, and whole numbers")
        return resources

    @property
    def reserved(self) -> dict[str, float]:
        """What Ray reserves at a time, on one node: all that a worker needs, or its share of one GPU."""
        gpus = 1.0 if self.multi_node_workers else self.gpus_per_worker
        needs = {"CPU": float(self.cpus_per_worker), "GPU": gpus, **self.resources_per_worker}
        return {name: each for name, each in needs.items() if each > 0}

    @property
    def pieces_per_worker(self) -> int:
        """How often ``reserved`` is reserved for a worker."""
        return int(self.gpus_per_worker) if self.multi_node_workers else 1


class CacheConfig(Config):
    """One run of `decant tokenize` and `decant cache`."""

    tokens: TokensConfig
    teacher: TeacherConfig
    targets: TargetsConfig = TargetsConfig()
    store: StoreConfig
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _workers_have_the_gpus(self) -> Self:
        wanted, have = self.teacher.num_gpus, self.cluster.gpus_per_worker
        if wanted > 1 and have not in (0, wanted):
            raise ValueError(
                f"teacher.tensor_parallel × teacher.pipeline_parallel = {wanted}, but cluster.gpus_per_worker = "
                f"{have:g}: set it to {wanted}"
            )
        if self.teacher.backend == "vllm" and 0 < have < 1:
            raise ValueError(
                f"cluster.gpus_per_worker = {have:g}, but each vLLM engine takes teacher.gpu_memory_utilization of a "
                "whole GPU: set it to 1"
            )
        if wanted == 1 and have > 1 and self.teacher.device_map is None:
            way = "teacher.device_map=auto" if self.teacher.backend == "transformers" else "teacher.tensor_parallel"
            raise ValueError(
                f"cluster.gpus_per_worker = {have:g}, of which this teacher would use one: set it to 1, or spread the "
                f"teacher by {way}"
            )
        if self.teacher.backend == "transformers" and self.teacher.quantization and not have:
            raise ValueError(
                f"teacher.quantization = {self.teacher.quantization} needs a GPU, and cluster.gpus_per_worker = 0: set "
                "it to 1, or leave quantization out"
            )
        if self.cluster.multi_node_workers and (self.teacher.backend != "vllm" or not have):
            raise ValueError("cluster.multi_node_workers is for teacher.backend=vllm with cluster.gpus_per_worker > 0")
        return self
