"""`decant tokenize`: documents become rows of tokens, in shards that every teacher can score."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from cluster import ray_cluster
from cluster.config import CacheConfig, TokensConfig
from cluster.corpus import column_types, corpus_identity, load_documents
from cluster.progress import shard_progress
from logit_store import SPLITS, Storage, TokenRow, TokenStore, writer
from logit_store.errors import ConfigError, CorpusError
from logit_store.format import MANIFEST, MAX_VOCABULARY_SIZE
from logit_store.identity import HEADER_IDENTITY, digest
from logit_store.vocabulary import describe_tokenizer, tokenizer_files, vocabulary_size

IDENTITY = HEADER_IDENTITY["tokens"]


def tokenize(config: CacheConfig) -> TokenStore:
    """Make the token store that ``config.tokens`` describes, or find it made; return it opened.

    Raises ConfigError, CorpusError, StoreError.
    """
    tokens = config.tokens
    header = _header(tokens)
    storage = Storage(tokens.path)
    writer.check(storage, header, IDENTITY)
    if not storage.exists(MANIFEST):
        num_shards = header["num_shards"]
        todo = sorted(set(range(num_shards)) - set(writer.committed(storage, num_shards)))
        with ray_cluster.session(config.cluster), shard_progress("tokenize", num_shards, num_shards - len(todo)) as bar:
            header = writer.begin(storage, header, IDENTITY)
            for record in ray_cluster.map_tasks(tokenize_shard, [(tokens, header, shard) for shard in todo]):
                bar(record)
        files = tokenizer_files(load_tokenizer(tokens.tokenizer, tokens.tokenizer_revision))
        writer.finish(storage, header, files)
    return TokenStore.open(tokens.path)


def tokenize_shard(tokens: TokensConfig, header: dict[str, Any], shard: int) -> dict[str, Any]:
    """Tokenise the ``shard``-th of ``num_shards`` stretches of documents and commit it."""
    documents = load_documents(tokens.source)
    num_shards = min(tokens.num_shards, len(documents))
    start, stop = (len(documents) * i // num_shards for i in (shard, shard + 1))
    tokenizer = load_tokenizer(tokens.tokenizer, tokens.tokenizer_revision)
    rows: list[TokenRow] = []
    for first in range(start, stop, 256):
        batch = documents[first : min(first + 256, stop)]
        carried = {name: batch[name] for name in tokens.columns}
        texts = batch[tokens.source.text_column]
        rows += document_rows(texts, tokenizer, tokens.window, tokens.held_out, carried)
    return writer.commit_tokens(Storage(tokens.path), shard, rows, header)


def document_rows(
    texts: list[str],
    tokenizer: Any,
    window: int,
    held_out: float,
    columns: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> list[TokenRow]:
    """Rows of the documents, in order: tokens and one end-of-text token, cut into consecutive windows.

    Each row carries its document's values of ``columns``. Documents without text give no rows. A document's split is
    decided by its text alone, so that a duplicate of a held-out document is held out as well. Raises CorpusError where
    a text is not a string.
    """
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise CorpusError(
                f"a document's text is {type(text).__name__}, not a string: set tokens.source.text_column"
            )
    filled = [i for i, text in enumerate(texts) if text]
    if not filled:
        return []
    rows = []
    for i, ids in zip(filled, tokenizer([texts[i] for i in filled])["input_ids"], strict=True):
        text, carried = texts[i], {name: values[i] for name, values in columns.items()}
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        number = int(digest(text.encode("utf-8", "surrogatepass"))[:16], 16) >> 1  # 63 bits
        split = SPLITS[number < held_out * 2**63]
        for start in range(0, len(ids), window):
            rows.append(TokenRow(number, split, np.asarray(ids[start : start + window], np.int32), None, carried))
    return rows


def load_tokenizer(name: str, revision: str | None) -> Any:
    """A tokenizer from the Hub or a directory. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"no tokenizer at {name!r} (tokens.tokenizer): {reason}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {name!r} has no end-of-text token, and each document must end with one")
    if vocabulary_size(tokenizer) > MAX_VOCABULARY_SIZE:
        raise ConfigError(f"tokenizer {name!r} has ids beyond {MAX_VOCABULARY_SIZE:,}")
    return tokenizer


def _header(tokens: TokensConfig) -> dict[str, Any]:
    corpus = corpus_identity(tokens.source)
    tokenizer = load_tokenizer(tokens.tokenizer, tokens.tokenizer_revision)
    documents = load_documents(tokens.source)
    num_documents = len(documents)
    return {
        "kind": TokenStore.kind,
        "corpus": corpus,
        "num_documents": num_documents,
        "tokenizer": describe_tokenizer(tokenizer),
        "tokenizer_name": tokens.tokenizer,
        "vocabulary_size": vocabulary_size(tokenizer),
        "window": tokens.window,
        "held_out": tokens.held_out,
        "columns": column_types(documents, tokens.columns),
        "num_shards": min(tokens.num_shards, num_documents),
    }
