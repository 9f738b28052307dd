"""What is looked at before a run begins: everything against everything, without a model in memory."""

from typing import Any, NamedTuple

from logit_store import LogitStore, TokenStore, open_store
from logit_store.errors import StoreError
from training.batches import BatchPlan, Prefix
from training.check_loss import check_loss
from training.config import TrainConfig
from training.engine import deepspeed_config
from training.evaluation import held_out_prefixes
from training.models import check_architecture, check_tokenizer
from training.plan import custom_identity, make_plan, plan_warnings


class Prepared(NamedTuple):
    """A run whose inputs have been looked at: nothing in it can be wrong any more that costs no model to see."""

    config: TrainConfig
    store: LogitStore | TokenStore
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
    store = open_store(config.data.store)
    warnings = check_loss(config, store)
    engine_config = deepspeed_config(config)
    plan = make_plan(config, store)
    held_out = held_out_prefixes(store, config.evaluation.max_rows)
    if not held_out:
        raise StoreError(f"{config.data.store} has no held-out rows: tokenize with a larger tokens.held_out")
    check_architecture(config.student)
    differing = check_tokenizer(config.student, store.manifest)
    warnings += [f"the student's tokenizer differs from the store's in its {part}" for part in differing]
    identity = {key: store.manifest.get(key) for key in ("text_id", "labels_id", "codec", "tail")}
    warnings += plan_warnings(plan, config, len(store.rows("train")))
    identity |= custom_identity(config)
    identity |= {"deepspeed": engine_config}  # by content: the JSON may be edited under the same name
    return Prepared(config, store, plan, held_out, plan.longest, identity, engine_config, warnings)
