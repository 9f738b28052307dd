"""Whether a store's labels serve the loss that a run asks for: checked before a model is loaded."""

from collections.abc import Sequence

import numpy as np

from logit_store import LogitStore, TokenStore
from logit_store.errors import ConfigError, StoreError
from training.config import LossConfig
from training.losses import LEGAL_TAILS
from training.losses.temperatures import MIN_KNOTS, gap_errors

PROBED_ROWS = 32
"""Rows over which the error of interpolated log-partitions is estimated."""
MAX_ERROR = 0.1
"""Largest estimate of that error, in nats, that a run may have. An error of A_T is one of every log p_T at a position,
so that at 0.1 each of the teacher's probabilities is off by a tenth, and what is left for the tail by as much."""


def check_loss(loss: LossConfig, store: LogitStore | TokenStore, stored: Sequence[float]) -> list[str]:
    """Refuse a loss that the store's labels do not serve; warnings, one per thing that is approximate.

    ``stored`` are the temperatures at which every store of the run has log-partitions.
    Raises ConfigError, StoreError.
    """
    if not loss.needs_labels:
        return []
    if not isinstance(store, LogitStore):
        raise StoreError(
            f"{store.storage.url} holds tokens without labels: set loss.alpha=0, or make a logit store (`decant cache`)"
        )
    _check_tail(loss, store)
    return _check_temperature(loss, store, stored)


def drawn_temperature(store: LogitStore) -> float:
    """T of the distribution that a store's draws are from. Its own, whatever the other stores of a run have."""
    stored = store.manifest["temperatures"]
    return float(stored[0]) if stored else 1.0


def _check_tail(loss: LossConfig, store: LogitStore) -> None:
    entries, draws = store.shards.total("entries"), store.shards.total("draws")
    everything_kept = entries == store.num_labelled * store.manifest["vocabulary_size"]
    legal = LEGAL_TAILS[loss.divergence]
    if loss.tail not in legal and not everything_kept:
        raise ConfigError(
            f"loss.tail {loss.tail} does not go with loss.divergence {loss.divergence}, which compares what the "
            f"student gives to ids outside the head: choose a tail of {', '.join(legal)}, or forward_kl"
        )
    kind = (store.manifest["labels"].get("targets") or {}).get("kind", "another kind")
    if loss.tail == "sampled" and not draws:
        raise ConfigError(
            f"loss.tail sampled needs draws, and {store.storage.url} holds none (targets of kind {kind}): choose "
            "another tail, or cache with targets.kind=threshold or counts"
        )
    if loss.tail != "sampled" and not entries:
        raise ConfigError(
            f"loss.tail {loss.tail} needs heads, and {store.storage.url} holds none (targets of kind {kind}): set "
            "loss.tail=sampled"
        )


def _check_temperature(loss: LossConfig, store: LogitStore, stored: Sequence[float]) -> list[str]:
    served, (low, high) = [1.0, *stored], loss.extreme_temperatures
    name = "loss.learned_temperature" if loss.learned_temperature else "loss.temperature"
    drawn_at = drawn_temperature(store)
    if loss.tail == "sampled" and (low, high) != (drawn_at, drawn_at):
        came = low if low == high else f"from {low} to {high}"
        raise ConfigError(
            f"{name} {came}: the draws of {store.storage.url} are from the distribution at {drawn_at} alone. Set "
            f"loss.temperature={drawn_at}, or cache again with another targets.temperatures"
        )
    if low == high:
        if low not in served:
            raise ConfigError(
                f"{name} {low}: the store serves {served}. Cache again with targets.temperatures=[{low}], or choose "
                "one of these"
            )
        return []
    if len(served) < MIN_KNOTS or low < min(served) or high > max(served):
        raise ConfigError(
            f"{name} from {low} to {high}: the store has log-partitions at {served}. A T that changes needs at least "
            f"{MIN_KNOTS} temperatures, 1 included, with {low} and {high} between the lowest and the highest: cache "
            "again with such targets.temperatures"
        )
    return [_check_interpolation(store, stored, low, high, name)]


def _check_interpolation(store: LogitStore, stored: Sequence[float], low: float, high: float, name: str) -> str:
    """How far off interpolated log-partitions may be. Raises ConfigError: too far."""
    rows = store.rows("train")[:PROBED_ROWS]
    columns = [store.manifest["temperatures"].index(temperature) for temperature in stored]
    partitions = [store[int(row)].targets.log_partition_PS[:, columns] for row in rows]
    errors = gap_errors(np.concatenate([np.zeros((1, len(stored)), np.float32), *partitions]), stored, low, high)
    error, served = max(errors.values()), [1.0, *stored]
    if error > MAX_ERROR:
        missing = [round(middle, 2) for middle, found in errors.items() if found > MAX_ERROR]
        raise ConfigError(
            f"{name} from {low} to {high}: log-partitions would be interpolated between those of {store.storage.url} "
            f"at {served}, and may be off by {error:.2g} nats there (at most {MAX_ERROR} is allowed; estimated over "
            f"{len(rows)} rows). Cache again with more targets.temperatures: around {', '.join(map(str, missing))}"
        )
    return (
        f"log-partitions between the stored temperatures {served} are interpolated: by an estimate over {len(rows)} "
        f"rows they are off by at most {error:.2g} nats"
    )
