"""What is looked at before a run begins: everything against everything, without a model in memory."""

from typing import Any, NamedTuple

from logit_store import LogitStore, TokenStore, open_store
from logit_store.errors import ConfigError, StoreError
from training.architecture import check_student
from training.batches import BatchPlan, Prefix
from training.config import TrainConfig
from training.engine import deepspeed_config
from training.evaluation import held_out_prefixes
from training.models import check_tokenizer


class Prepared(NamedTuple):
    """A run whose inputs have been looked at: nothing in it can be wrong any more that costs no model to see."""

    config: TrainConfig
    store: LogitStore | TokenStore
    plan: BatchPlan
    held_out: list[Prefix]
    longest: int
    """Positions of the longest sequence that the student sees, held-out rows included."""
    identity: dict[str, Any]
    engine_config: dict[str, Any]
    warnings: list[str]


def prepare(config: TrainConfig) -> Prepared:
    """Open the store and check everything against everything; nothing is written, no model is loaded.

    Raises ConfigError, StoreError, StudentError.
    """
    store = open_store(config.data.store)
    _check_loss(config, store)
    engine_config = deepspeed_config(config)
    rows_N = store.rows("train")
    schedule = config.schedule
    plan = BatchPlan(rows_N, store.lengths_N[rows_N], schedule.tokens_per_step, config.run.seed, config.curriculum)
    if not len(plan.rows_N):
        raise StoreError(f"{config.data.store} has no rows to train on: all are held out, or of one token")
    longest = int(plan.positions_N.max())
    longest = min(longest, config.curriculum.max_difficulty) if config.curriculum else longest
    if schedule.tokens_per_step < longest:
        raise ConfigError(
            f"schedule.tokens_per_step {schedule.tokens_per_step} is less than the longest sequence, "
            f"{longest} positions"
        )
    held_out = held_out_prefixes(store, config.evaluation.max_rows)
    if not held_out:
        raise StoreError(f"{config.data.store} has no held-out rows: tokenize with a larger tokens.held_out")
    longest = max(longest, *(prefix.positions for prefix in held_out))
    check_student(config.student, int(store.manifest["vocabulary_size"]), longest)
    differing = check_tokenizer(config.student, store.manifest)
    warnings = [f"the student's tokenizer differs from the store's in its {part}" for part in differing]
    identity = {key: store.manifest.get(key) for key in ("text_id", "labels_id", "codec", "tail")}
    identity |= {"deepspeed": engine_config}  # by content: the JSON may be edited under the same name
    return Prepared(config, store, plan, held_out, longest, identity, engine_config, warnings)


def _check_loss(config: TrainConfig, store: LogitStore | TokenStore) -> None:
    temperature = config.loss.temperature
    if config.loss.alpha == 0:
        return
    if not isinstance(store, LogitStore):
        raise StoreError(
            f"{config.data.store} holds tokens without labels: set loss.alpha=0, or make a logit store (`decant cache`)"
        )
    stored = [1.0, *store.manifest["temperatures"]]
    if temperature not in stored:
        raise ConfigError(
            f"loss.temperature {temperature}: the store serves {stored}. Cache again with "
            f"targets.temperatures=[{temperature}], or choose one of these"
        )
    positions = store.num_positions - int(sum(store.lengths_N[row] - 1 for row in store.left_out))
    if store.manifest["forced_ids"] or store.shards.total("entries") != store.manifest["k"] * positions:
        kind = (store.manifest["labels"].get("targets") or {}).get("kind", "another kind")
        raise ConfigError(
            f"{config.data.store} holds targets of kind {kind}, or ids that are always kept: this trainer learns from "
            "heads of one size only. Cache again with targets.kind=top_k and without targets.always"
        )
