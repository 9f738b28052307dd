"""What a run reads: the rows of one store, of several teachers of the same rows, or of a mixture of texts, as one."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logit_store import LogitStore, Targets, TokenRow, TokenStore, open_store
from logit_store.errors import ConfigError, IdentityError, StoreError
from logit_store.identity import digest_json
from training.config import DataConfig, WeightedStoreConfig

AnyStore = TokenStore | LogitStore


class Text(NamedTuple):
    """Token shards with the labels of one or more teachers, or with none."""

    weight: float
    """Share of the positions trained on, relative to the other texts'."""
    stores: tuple[AnyStore, ...]
    """Stores of the same rows."""
    store_weights: tuple[float, ...]
    """Weight of each store's labels; they add up to 1."""


class SourceRow(NamedTuple):
    """A row with the labels that were asked for."""

    tokens: TokenRow
    labels: tuple[Targets, ...]
    """Of each store of the row's text, in order; empty from token stores, or where no labels were wanted."""


class Source:
    """The rows of all texts, numbered consecutively text after text; to a batch plan it is one store."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.texts = tuple(texts)
        self.starts = np.cumsum([0] + [len(text.stores[0]) for text in texts])
        """Number of each text's first row, and of all rows."""
        self.manifest: dict[str, Any] = texts[0].stores[0].manifest
        """The first store's: its vocabulary is every store's."""

    @classmethod
    def of(cls, store: AnyStore) -> "Source":
        """The rows of one store."""
        return cls([Text(1.0, (store,), (1.0,))])

    @property
    def stores(self) -> list[AnyStore]:
        """Every store of every text."""
        return [store for text in self.texts for store in text.stores]

    @property
    def name(self) -> str:
        """Where it all is, for messages."""
        return ", ".join(store.storage.url for store in self.stores)

    @property
    def has_labels(self) -> bool:
        """Whether there is a teacher."""
        return all(isinstance(store, LogitStore) for store in self.stores)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def lengths_N(self) -> NDArray[np.int32]:
        """Tokens of each row."""
        return np.concatenate([text.stores[0].lengths_N for text in self.texts])

    @cached_property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which every store has log-partitions."""
        of_each = [store.manifest["temperatures"] for store in self.stores if isinstance(store, LogitStore)]
        return tuple(t for t in (of_each[0] if of_each else ()) if all(t in other for other in of_each))

    @cached_property
    def _masked_shards(self) -> list[NDArray[np.bool_]]:
        """For each text, which of its shards have rows with positions that carry no loss."""
        tables = [text.stores[0].shards for text in self.texts]
        return [np.asarray(t.columns.get("bytes.loss_mask", np.zeros(len(t)))) > 0 for t in tables]

    @property
    def has_masks(self) -> bool:
        """Whether some positions carry no loss."""
        return any(masked.any() for masked in self._masked_shards)

    def may_be_masked(self, row: int) -> bool:
        """Whether a row is of a shard with loss masks: known without reading it."""
        text, place = self.place(row)
        shard, _ = text.stores[0].shards.shard_of(place)
        return bool(self._masked_shards[self.texts.index(text)][shard])

    def rows(self, split: str | None) -> NDArray[np.int64]:
        """Numbers of the rows in ``split``, or of all (None), that have the labels of every store, ascending."""
        found = []
        for start, text in zip(self.starts, self.texts, strict=False):
            rows = text.stores[0].rows(split)
            for other in text.stores[1:]:  # teachers may have left out different rows
                rows = np.intersect1d(rows, other.rows(split), assume_unique=True)
            found.append(start + rows)
        return np.concatenate(found)

    def place(self, row: int) -> tuple[Text, int]:
        """The text that a row belongs to, and its number there. Raises IndexError."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} rows")
        at = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.texts[at], row - int(self.starts[at])

    def tokens(self, row: int) -> TokenRow:
        """A row without its labels. Raises IndexError, CorruptError."""
        text, row = self.place(row)
        return text.stores[0].tokens(row)

    def __getitem__(self, row: int) -> SourceRow:
        """A row with its labels. Raises IndexError, CorruptError."""
        text, row = self.place(row)
        found = [store[row] for store in text.stores if isinstance(store, LogitStore)]
        tokens = found[0].tokens if found else text.stores[0].tokens(row)
        return SourceRow(tokens, tuple(labelled.targets for labelled in found))

    def order(self, seed: int, epoch: int, rows_N: NDArray[np.int64], positions_N: NDArray[np.int64]) -> NDArray[Any]:
        """An epoch's order of the rows of a mixture, as places in ``rows_N``: see ``mixed_order``."""
        text_N = np.searchsorted(self.starts, rows_N, side="right") - 1
        return mixed_order(seed, epoch, text_N, positions_N, [text.weight for text in self.texts])

    def check_shares(self, rows_N: NDArray[np.int64], positions_N: NDArray[np.int64]) -> None:
        """Refuse weights by which some text would hardly be read. Raises ConfigError: see ``row_shares``."""
        text_N = np.searchsorted(self.starts, rows_N, side="right") - 1
        row_shares(text_N, positions_N, [text.weight for text in self.texts])

    def identity(self) -> dict[str, Any]:
        """What of the stores decides a run's numbers. A single store is named by its own ids."""
        stores = self.stores
        of_each = [_identity(store) for store in stores]
        if len(stores) == 1:
            return of_each[0]
        texts = [text.stores[0].manifest["text_id"] for text in self.texts]
        weights = [[text.weight, *text.store_weights] for text in self.texts]
        return {
            "text_id": texts[0] if len(texts) == 1 else digest_json(texts),
            "labels_id": digest_json([[s["labels_id"] for s in of_each], weights]) if self.has_labels else None,
            "stores": of_each,
            "weights": weights,
        }

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files."""
        return self.stores[0].files()


def _identity(store: AnyStore) -> dict[str, Any]:
    """What of a store decides a run's numbers: its labels, and of which rows there are none, for these are not dealt.

    Rows that are left out are no part of ``labels_id``: the same teacher may have failed on others another time.
    """
    identity = {key: store.manifest.get(key) for key in ("text_id", "labels_id", "codec", "tail")}
    if left_out := sorted(getattr(store, "left_out", {})):
        identity["left_out"] = {"rows": len(left_out), "sha256": digest_json(left_out)}
    return identity


def open_source(config: DataConfig) -> Source:
    """Open the stores that a config names.

    Raises StoreError: one cannot be opened, or is of another kind than the first; IdentityError: teachers labelled
    different rows, or texts of a mixture have different tokenizers.
    """
    opened = [open_store(entry.store) for entry in config.stores]
    for entry, store in zip(config.stores[1:], opened[1:], strict=True):
        _check_kind(config.stores[0], opened[0], entry, store)
    if config.mixture is not None:
        for entry, store in zip(config.stores[1:], opened[1:], strict=True):
            _check_vocabulary(config.stores[0], opened[0], entry, store)
        return Source([Text(e.weight, (store,), (1.0,)) for e, store in zip(config.stores, opened, strict=True)])
    for entry, store in zip(config.stores, opened, strict=True):
        if config.teachers is not None and not isinstance(store, LogitStore):
            raise StoreError(f"{entry.store} holds tokens without labels: data.teachers takes logit stores")
        _check_text(config.stores[0], opened[0], entry, store)
    total = sum(entry.weight for entry in config.stores)
    return Source([Text(1.0, tuple(opened), tuple(entry.weight / total for entry in config.stores))])


def _check_kind(a: WeightedStoreConfig, first: AnyStore, b: WeightedStoreConfig, other: AnyStore) -> None:
    if first.kind != other.kind:
        raise StoreError(f"{a.store} holds {first.kind} and {b.store} {other.kind}: give stores of one kind")


def _check_text(a: WeightedStoreConfig, first: AnyStore, b: WeightedStoreConfig, other: AnyStore) -> None:
    if first.manifest["text_id"] != other.manifest["text_id"]:
        raise IdentityError(
            f"{a.store} and {b.store} are of different text (text_id {first.manifest['text_id'][:12]} and "
            f"{other.manifest['text_id'][:12]}): data.teachers needs stores made from the same token shards; stores of "
            "different text go under data.mixture"
        )


def _check_vocabulary(a: WeightedStoreConfig, first: AnyStore, b: WeightedStoreConfig, other: AnyStore) -> None:
    ours, theirs = (store.manifest["tokenizer"]["vocabulary_sha256"] for store in (first, other))
    sizes = [store.manifest["vocabulary_size"] for store in (first, other)]
    if ours != theirs or sizes[0] != sizes[1]:
        raise IdentityError(
            f"the tokenizers of {a.store} and {b.store} give different ids to tokens (vocabularies of {sizes[0]:,} and "
            f"{sizes[1]:,}): a mixture needs one tokenizer"
        )
    if first.manifest.get("forced_ids") != other.manifest.get("forced_ids"):
        raise StoreError(
            f"{a.store} and {b.store} keep different ids at every position (targets.always): the stores of a mixture "
            "must keep the same"
        )


def mixed_order(
    seed: int, epoch: int, text_N: NDArray[np.int64], positions_N: NDArray[np.int64], weights: Sequence[float]
) -> NDArray[np.int64]:
    """One epoch of a mixture: N rows, as places in ``text_N``, drawn from each text in proportion to its weight.

    Each text has epochs of its own, which go on across the mixture's: all of its rows come, in an order of its own,
    before any comes again. Its draws are spread evenly over the epoch, one at a random place of each of as many equal
    stretches, so that every batch is close to the weights.
    """
    bounds = np.concatenate([[0.0], np.cumsum(row_shares(text_N, positions_N, weights))])
    places, taken = [], []
    for text in range(len(weights)):
        first, last = (_drawn(e * len(text_N), bounds[text], bounds[text + 1]) for e in (epoch, epoch + 1))
        count, member = last - first, np.flatnonzero(text_N == text)
        places.append((np.arange(count) + _generator(seed, epoch, text, 0).random(count)) / count)
        own_epochs = range(first // len(member), -(-last // len(member)))
        endless = np.concatenate([_generator(seed, e, text, 1).permutation(len(member)) for e in own_epochs])
        taken.append(member[endless[first - own_epochs.start * len(member) :][:count]])
    return np.concatenate(taken)[np.argsort(np.concatenate(places), kind="stable")]


def row_shares(
    text_N: NDArray[np.int64], positions_N: NDArray[np.int64], weights: Sequence[float]
) -> NDArray[np.float64]:
    """Each text's share of the rows drawn, so that its weight is its share of their positions when rows are whole.

    weight / mean positions of the text's rows, normalised. Raises ConfigError: a text has no rows, or so small a
    weight that it would get less than two rows of an epoch.
    """
    counts = np.bincount(text_N, minlength=len(weights))
    if not counts.all():
        raise ConfigError(f"store {int(counts.argmin()) + 1} of data.mixture has no rows to train on: remove it")
    shares_M = np.array(weights) * counts / np.bincount(text_N, positions_N, len(weights))
    shares_M /= shares_M.sum()
    if shares_M.min() * len(text_N) < 2:
        raise ConfigError(
            f"store {int(shares_M.argmin()) + 1} of data.mixture gets {shares_M.min() * len(text_N):.2f} of "
            f"{len(text_N):,} rows per epoch by its weight, and the least is 2: give it more, or remove it"
        )
    return shares_M


def _drawn(num_places: int, low: float, high: float) -> int:
    """Draws of the text between these bounds after so many places; over all texts they add up to the places."""
    return round(num_places * high) - round(num_places * low)


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
