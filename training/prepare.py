"""What is looked at before a run begins: everything against everything, without a model in memory."""

from typing import Any, NamedTuple

from logit_store.errors import StoreError
from training.config import TrainConfig
from training.curriculum.batches import BatchPlan, Prefix
from training.curriculum.plan import custom_identity, make_plan, plan_warnings
from training.data.source import Source, open_source
from training.engine_config import decisive_part, deepspeed_config
from training.losses.check import check_loss
from training.students.architecture import check_student
from training.students.attention import check_attention
from training.students.models import check_tokenizer
from training.watching.evaluation import carry_loss, held_out_prefixes
from training.watching.trackers import check_trackers


class Prepared(NamedTuple):
    """A run whose inputs have been looked at: nothing in it can be wrong any more that costs no model to see."""

    config: TrainConfig
    source: Source
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
    source = open_source(config.data)
    warnings = [warning for store in source.stores for warning in check_loss(config.loss, store, source.temperatures)]
    engine_config = deepspeed_config(config)
    check_attention(config.student, engine_config)
    check_trackers(config.watch)
    plan = make_plan(config, source)
    held_out = held_out_prefixes(source, config.evaluation.max_rows)
    if not held_out:
        raise StoreError(f"{source.name} has no held-out rows: tokenize with a larger tokens.held_out")
    if not carry_loss(source, held_out):
        raise StoreError(
            f"{source.name}: no position of the {len(held_out)} held-out rows carries loss, as their loss masks are "
            "empty: raise evaluation.max_rows, or tokenize with a larger tokens.held_out or other loss masks"
        )
    longest = max(plan.longest, *(prefix.positions for prefix in held_out))
    check_student(config.student, int(source.manifest["vocabulary_size"]), longest)
    differing = check_tokenizer(config.student, source.manifest)
    warnings += [f"the student's tokenizer differs from the store's in its {part}" for part in differing]
    warnings += plan_warnings(plan, config, len(source.rows("train")))
    identity = source.identity() | custom_identity(config)
    identity |= {"deepspeed": decisive_part(engine_config)}  # by content: the JSON may be edited under the same name
    return Prepared(config, source, plan, held_out, longest, identity, engine_config, warnings)
