"""Whether a store's labels serve the loss that a run asks for: checked before a model is loaded."""

from collections.abc import Sequence

from logit_store import LogitStore, TokenStore
from logit_store.errors import ConfigError, StoreError
from training.config import LossConfig
from training.losses import LEGAL_TAILS
from training.losses.temperatures import MIN_KNOTS, interpolation_error

PROBED_ROWS = 32
"""Rows over which the error of interpolated log-partitions is measured."""


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
    if loss.tail == "sampled" and (low, high) != (only := stored[0] if stored else 1.0, only):
        came = low if low == high else f"from {low} to {high}"
        raise ConfigError(
            f"{name} {came}: the draws of {store.storage.url} are from the distribution at {only} alone. Set "
            f"loss.temperature={only}, or cache again with another targets.temperatures"
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
    rows = store.rows("train")[:PROBED_ROWS]
    error = max((interpolation_error(store[int(row)].targets.log_partition_PS, stored) for row in rows), default=0.0)
    return [
        f"log-partitions between the stored temperatures {served} are interpolated; with one of those left out, it was "
        f"off by at most {error:.2g} nats over {len(rows)} rows"
    ]
