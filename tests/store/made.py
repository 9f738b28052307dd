"""Rows of random distributions, and stores of them, for the store's tests."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from logit_store import SPLITS, LogitRow, LogitStore, Storage, Targets, TokenRow, TokenStore, writer
from logit_store.encode import text_sha256
from logit_store.identity import labels_id, text_id

V = 64
LABELS = {"teacher": "t" * 64}
TOKENIZER = {"vocabulary_sha256": "v" * 64, "parts_sha256": {}}


def make_row(
    rng: np.random.Generator,
    length: int,
    k: int | Sequence[int],
    vocabulary_size: int = V,
    temperatures: int = 1,
    forced_ids: Sequence[int] = (),
    max_draws: int = 0,
    columns: dict[str, Any] | None = None,
    masked: bool = False,
) -> LogitRow:
    """A row of random distributions, some of them peaked. ``k``: entries of each head, or one number per position."""
    ids = rng.integers(0, vocabulary_size, length).astype(np.int32)
    num_positions = max(length - 1, 0)
    scores = rng.normal(size=(num_positions, vocabulary_size)) * rng.choice([0.1, 3.0, 15.0])
    logprobs_PV = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True) if num_positions else scores
    counts = [k] * num_positions if isinstance(k, int) else k
    split = SPLITS[int(rng.integers(2))]
    mask = rng.random(num_positions) < 0.7 if masked else None
    tokens = TokenRow(int(rng.integers(2**62)), split, ids, mask, columns or {})
    return LogitRow(tokens, targets_of(logprobs_PV, ids, counts, rng, temperatures, forced_ids, max_draws))


def targets_of(
    logprobs_PV: np.ndarray,
    ids_T: np.ndarray,
    counts: Sequence[int],
    rng: np.random.Generator,
    temperatures: int = 0,
    forced_ids: Sequence[int] = (),
    max_draws: int = 0,
) -> Targets:
    """Targets of dense distributions: heads of the most probable ids, the exact tail, draws from it."""
    p = len(logprobs_PV)
    order_PV = np.argsort(-logprobs_PV, axis=1, kind="stable")
    heads = [order_PV[t, : counts[t]] for t in range(p)]
    tail, draws = [], []
    for t in range(p):
        rest = np.exp(logprobs_PV[t])
        rest[heads[t]] = 0
        rest[ids_T[t + 1]] = 0
        rest[list(forced_ids)] = 0
        tail.append(rest.sum())
        m = int(rng.integers(max_draws + 1)) if tail[-1] > 0 else 0
        draws.append(rng.choice(len(rest), m, p=rest / rest.sum()) if m else np.zeros(0, np.int64))
    logprobs_PV = logprobs_PV.astype(np.float32)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.array(tail))
    return Targets(
        np.array(counts[:p], np.int32).reshape(p),
        np.concatenate([np.zeros(0), *heads]).astype(np.int32),
        np.concatenate([np.zeros(0), *(logprobs_PV[t, heads[t]] for t in range(p))]).astype(np.float32),
        logprobs_PV[np.arange(p), ids_T[1 : p + 1]],
        log_tail.astype(np.float32),
        rng.normal(size=(p, temperatures)).astype(np.float32),
        logprobs_PV[:, list(forced_ids)].reshape(p, len(forced_ids)),
        np.array([len(d) for d in draws], np.int32).reshape(p),
        np.concatenate([np.zeros(0), *draws]).astype(np.int32),
    )


def make_header(num_shards: int, **changes: Any) -> dict[str, Any]:
    """A header as `decant cache` writes it, with a vocabulary of ``V``."""
    header = {
        "kind": "logits",
        "labels_id": labels_id(LABELS),
        "labels": LABELS,
        "num_shards": num_shards,
        "k": 8,
        "temperatures": [2.0],
        "forced_ids": [],
        "codec": {"kind": "lossy", "max_kl": 1e-4, "max_error": 0.5},
        "columns": {},
        "vocabulary_size": V,
        "tokenizer": TOKENIZER,
        "tokenizer_name": "toy",
        "window": 1024,
        "tail": "exact",
    }
    return header | changes


def write_store(url: str, shards: Sequence[Sequence[LogitRow]], **changes: Any) -> LogitStore:
    """A finished logit store of these rows; ``changes`` go into its header, ``tokenizer_json`` beside it."""
    tokenizer_json = changes.pop("tokenizer_json", b"{}")
    storage = Storage(url)
    texts = [text_sha256([row.tokens for row in rows]) for rows in shards]
    changes = {"text_id": text_id(TOKENIZER["vocabulary_sha256"], texts), **changes}  # type: ignore[arg-type]
    header = make_header(len(shards), **changes)
    header = writer.begin(storage, header, ["labels_id"])
    for shard, rows in enumerate(shards):
        writer.commit_logits(storage, shard, rows, header)
    writer.finish(storage, header, {"tokenizer/tokenizer.json": tokenizer_json})
    return LogitStore.open(url)


def write_tokens(url: str, shards: Sequence[Sequence[TokenRow]], **changes: Any) -> TokenStore:
    """A finished token store of these rows."""
    storage = Storage(url)
    header = make_header(len(shards), kind="tokens", **changes)
    header = writer.begin(storage, header, ["kind"])
    for shard, rows in enumerate(shards):
        writer.commit_tokens(storage, shard, rows, header)
    writer.finish(storage, header, {"tokenizer/tokenizer.json": b"{}"})
    return TokenStore.open(url)
