"""What is looked at before a run begins: everything against everything, without a model in memory."""

from typing import Any, NamedTuple

from logit_store import LogitStore
from logit_store.errors import ConfigError, StoreError
from training.attention import check_attention
from training.batches import BatchPlan, Prefix
from training.config import TrainConfig
from training.engine import deepspeed_config
from training.evaluation import held_out_prefixes
from training.models import check_architecture, check_tokenizer
from training.source import AnyStore, Source, open_source
from training.trackers import check_trackers


class Prepared(NamedTuple):
    """A run whose inputs have been looked at: nothing in it can be wrong any more that costs no model to see."""

    config: TrainConfig
    source: Source
    plan: BatchPlan
    held_out: list[Prefix]
    longest: int
    identity: dict[str, Any]
    engine_config: dict[str, Any]
    warnings: list[str]


def prepare(config: TrainConfig) -> Prepared:
    """Open the store and check everything against everything; nothing is written, no model is loaded.

    Raises ConfigError, StoreError, StudentError.
    """
    source = open_source(config.data)
    for store in source.stores:
        _check_loss(config, store)
    widths = {store.manifest.get("k") for store in source.stores}
    if config.data.mixture is not None and len(widths) > 1:
        raise ConfigError(f"data.mixture: heads of one size are needed, and the stores' k are {widths}: `decant slice`")
    engine_config = deepspeed_config(config)
    check_attention(config.student, engine_config)
    check_trackers(config.watch)
    plan = _plan(config, source)
    schedule = config.schedule
    longest = int(plan.positions_N.max())
    longest = min(longest, config.curriculum.max_difficulty) if config.curriculum else longest
    if schedule.tokens_per_step < longest:
        raise ConfigError(
            f"schedule.tokens_per_step {schedule.tokens_per_step} is less than the longest sequence, "
            f"{longest} positions"
        )
    held_out = held_out_prefixes(source, config.evaluation.max_rows)
    if not held_out:
        raise StoreError(f"{_named(source)} has no held-out rows: tokenize with a larger tokens.held_out")
    check_architecture(config.student)
    differing = check_tokenizer(config.student, source.manifest)
    warnings = [f"the student's tokenizer differs from the store's in its {part}" for part in differing]
    identity = source.identity()
    identity |= {"deepspeed": engine_config}  # by content: the JSON may be edited under the same name
    return Prepared(config, source, plan, held_out, longest, identity, engine_config, warnings)


def _plan(config: TrainConfig, source: Source) -> BatchPlan:
    rows_N, schedule = source.rows("train"), config.schedule
    lengths_N = source.lengths_N[rows_N]
    plan = BatchPlan(rows_N, lengths_N, schedule.tokens_per_step, config.run.seed, config.curriculum, source.order)
    if not len(plan.rows_N):
        raise StoreError(f"{_named(source)} has no rows to train on: all are held out, or of one token")
    source.check_shares(plan.rows_N, plan.positions_N)
    return plan


def _named(source: Source) -> str:
    return ", ".join(store.storage.url for store in source.stores)


def _check_loss(config: TrainConfig, store: AnyStore) -> None:
    temperature = config.loss.temperature
    if config.loss.alpha == 0:
        return
    if not isinstance(store, LogitStore):
        raise StoreError(
            f"{store.storage.url} holds tokens without labels: set loss.alpha=0, or make a logit store (`decant cache`)"
        )
    stored = [1.0, *store.manifest["temperatures"]]
    if temperature not in stored:
        raise ConfigError(
            f"loss.temperature {temperature} on {store.storage.url}: the store serves {stored}. Cache again with "
            f"targets.temperatures=[{temperature}], or choose one of these"
        )
    positions = store.num_positions - int(sum(store.lengths_N[row] - 1 for row in store.left_out))
    if store.manifest["forced_ids"] or store.shards.total("entries") != store.manifest["k"] * positions:
        kind = (store.manifest["labels"].get("targets") or {}).get("kind", "another kind")
        raise ConfigError(
            f"{store.storage.url} holds targets of kind {kind}, or ids that are always kept: this trainer learns from "
            "heads of one size only. Cache again with targets.kind=top_k and without targets.always"
        )
