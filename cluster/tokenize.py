"""`decant tokenize`: documents become rows of tokens, in shards that every teacher can score."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from cluster import ray_cluster, ray_tasks
from cluster.config import CacheConfig, ClusterConfig, TokensConfig
from cluster.corpus.chat import ChatEncoder, chat_template
from cluster.corpus.documents import Document
from cluster.corpus.files import SourceFile, find_files
from cluster.corpus.reader import Corpus, corpus_identity, first_documents, take, wanted_columns
from cluster.corpus.scan import Scan, Wanted, keep_scan, known_scan, scan_files
from cluster.corpus.windows import Encoder, IdsEncoder, TextEncoder, document_rows
from cluster.job.progress import shard_progress
from cluster.tokenizer import load_tokenizer
from logit_store import Storage, TokenRow, TokenStore, writer
from logit_store.errors import ConfigError, CorpusError
from logit_store.format import MANIFEST, MAX_VOCABULARY_SIZE, record_name
from logit_store.identity import HEADER_IDENTITY, digest, digest_json
from logit_store.vocabulary import describe_tokenizer, tokenizer_files, vocabulary_size

IDENTITY = HEADER_IDENTITY["tokens"]
NOT_YET_KNOWN = ("corpus", "num_shards")
"""Fields of the identity for which the corpus has to be looked through."""

BYTES_PER_SHARD = 4 * 2**20
"""About a million tokens: four bytes of text make one."""

FEW_BYTES = 32 * 2**20
"""The driver looks through a corpus of this size by itself: that takes a second, and starting a cluster takes more."""

MAX_TASKS = 4096
"""A task costs the driver some 10 kB of memory and 5 ms, so that more shards than this share tasks."""

READERS_PER_FILE = 16
"""Tasks that read one compressed file, each from its beginning on: decompressing is some fifty times as fast as
tokenising, so that sixteen half files more cost less than a fifth."""

BATCH_DOCUMENTS = 256

TRIED_CHARACTERS = 64 * 2**10
"""Of a document that the driver makes tokens of: some 250 bytes of memory for each."""


class Job(NamedTuple):
    """What all tasks share, by Ray's object store."""

    tokens: TokensConfig
    header: dict[str, Any]
    corpus: Corpus
    template: str | None
    """Text of the chat template, for conversations."""


def tokenize(config: CacheConfig) -> TokenStore:
    """Make the token store that ``config.tokens`` describes, or find it made; return it opened.

    The driver sees names, counts and records, and a few documents to try the config on before a cluster is started.
    Raises ConfigError, CorpusError, StoreError.
    """
    tokens, storage = config.tokens, Storage(config.tokens.path)
    files = find_files(tokens.source)
    wanted = wanted_columns(files, tokens.source, tokens.columns)
    tokenizer = _tokenizer(tokens)
    template = chat_template(tokens, tokenizer)
    header = _header(tokens, tokenizer, wanted)
    writer.check(storage, header, [field for field in IDENTITY if field not in NOT_YET_KNOWN])
    _try_out(files, wanted, header, make_encoder(tokens, tokenizer, template))
    with _Cluster(config.cluster) as cluster:
        scans = _scan(files, wanted, cluster)
        header |= _corpus_fields(tokens, files, scans, template)
        writer.check(storage, header, IDENTITY)
        if not storage.exists(MANIFEST):
            cluster.start()
            header = writer.begin(storage, header, IDENTITY)
            _make_shards(storage, Job(tokens, header, Corpus.of_scans(files, scans, wanted.kinds), template))
            writer.finish(storage, header, tokenizer_files(tokenizer))
    return TokenStore.open(tokens.path)


def tokenize_shards(job: Job, shards: range) -> list[dict[str, Any]]:
    """Tokenise and commit consecutive shards, in one pass over their documents; how much each of them holds.

    A shard that is committed already, by an attempt of this task that was killed, is passed over.
    """
    storage, num_shards = Storage(job.tokens.path), job.header["num_shards"]
    description = digest_json(job.header["tokenizer"])
    encoder = _encoder_of_process(job.tokens.model_dump_json(), job.template, description)
    bounds = [len(job.corpus) * shard // num_shards for shard in (*shards, shards.stop)]
    documents = job.corpus.read(bounds[0], bounds[-1])
    done = []
    for shard, start, stop in zip(shards, bounds, bounds[1:], strict=False):
        mine = take(documents, stop - start)
        if storage.exists(record_name(shard)):
            record = writer.read_record(storage, shard)
            for _ in mine:
                pass
        else:
            record = writer.commit_tokens(storage, shard, _rows(mine, encoder, job.header), job.header)
        done.append({name: record[name] for name in ("rows", "tokens")})
    return done


def stretches(shards: Sequence[int], longest: int) -> list[range]:
    """Runs of consecutive shards, at most ``longest`` each; ``shards`` ascend."""
    found: list[range] = []
    for shard in shards:
        if found and found[-1].stop == shard and len(found[-1]) < longest:
            found[-1] = range(found[-1].start, shard + 1)
        else:
            found.append(range(shard, shard + 1))
    return found


def _tokenizer(tokens: TokensConfig) -> Any:
    """The config's tokenizer. Raises ConfigError."""
    tokenizer = load_tokenizer(tokens.tokenizer, tokens.tokenizer_revision, tokens.trust_remote_code)
    if vocabulary_size(tokenizer) > MAX_VOCABULARY_SIZE:
        raise ConfigError(f"tokenizer {tokens.tokenizer!r} has ids beyond {MAX_VOCABULARY_SIZE:,}")
    return tokenizer


def make_encoder(tokens: TokensConfig, tokenizer: Any, template: str | None) -> Encoder:
    """What makes tokens of the config's kind of documents. Raises ConfigError: the tokenizer cannot."""
    if template is not None:
        tokenizer.chat_template = template  # the store's tokenizer files carry it to the students
        return ChatEncoder(tokens, tokenizer, template)
    kind = TextEncoder if tokens.source.text_column is not None else IdsEncoder
    return kind(tokens.source, tokenizer)


@lru_cache(maxsize=1)
def _encoder_of_process(tokens_json: str, template: str | None, description: str) -> Encoder:
    """Tasks of one job follow each other in a process: the tokenizer is loaded once, and must be the job's."""
    tokens = TokensConfig.model_validate_json(tokens_json)
    tokenizer = _tokenizer(tokens)
    if digest_json(describe_tokenizer(tokenizer)) != description:
        raise ConfigError(
            f"tokenizer {tokens.tokenizer!r} is another one on {socket.gethostname()} than where the job was begun: "
            "give all nodes the same files, or a Hub id with tokens.tokenizer_revision"
        )
    return make_encoder(tokens, tokenizer, template)


def _rows(documents: Iterator[Document], encoder: Encoder, header: dict[str, Any]) -> list[TokenRow]:
    rows: list[TokenRow] = []
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        rows += _rows_of(batch, encoder, header)
    return rows


def _rows_of(documents: Sequence[Document], encoder: Encoder, header: dict[str, Any]) -> list[TokenRow]:
    pieces = header.get("pieces", "windows")
    return document_rows(documents, encoder, header["window"], header["held_out"], header["columns"], pieces)


def _try_out(files: Sequence[SourceFile], wanted: Wanted, header: dict[str, Any], encoder: Encoder) -> None:
    """Make rows of the first document that gives any, so that what is wrong with all of them is found at once.

    Of a text only its begin: documents may be large, and tokens are larger. Raises CorpusError.
    """
    any_document = False
    for document in first_documents(files, tuple(wanted.kinds)):
        any_document = True
        content = document.values[wanted.content]
        begin = content[:TRIED_CHARACTERS] if isinstance(content, str) else content
        tried = document._replace(values={**document.values, wanted.content: begin})
        if _rows_of([tried], encoder, header):
            return
    if not any_document:
        raise CorpusError("the corpus is empty: it holds no documents")
    what = "text" if isinstance(encoder, TextEncoder) else "tokens that carry loss"
    raise CorpusError(f"the corpus is empty: no document of it has any {what}")


def _scan(files: list[SourceFile], wanted: Wanted, cluster: "_Cluster") -> list[Scan]:
    """What is known of each file: from an earlier command, or from looking through the files now."""
    scans = {i: scan for i, file in enumerate(files) if (scan := known_scan(file, wanted)) is not None}
    unknown = [i for i in range(len(files)) if i not in scans]
    if sum(files[i].num_bytes for i in unknown) <= FEW_BYTES:
        for i in unknown:
            scans[i] = scan_files(wanted, [files[i]])[0]
            keep_scan(files[i], wanted, scans[i])
    elif todo := stretches(unknown, -(-len(files) // MAX_TASKS)):
        cluster.start()
        with shard_progress("scan", len(files), len(scans)) as bar:
            items = [(stretch, files[stretch.start : stretch.stop]) for stretch in todo]
            for stretch, found in ray_tasks.map_tasks(_scan_stretch, wanted, items):
                for i, scan in zip(stretch, found, strict=True):
                    scans[i] = scan
                    keep_scan(files[i], wanted, scan)
                    bar({"tokens": 0})
    return [scans[i] for i in range(len(files))]


def _scan_stretch(wanted: Wanted, item: tuple[range, list[SourceFile]]) -> tuple[range, list[Scan]]:
    return item[0], scan_files(wanted, item[1])


def _make_shards(storage: Storage, job: Job) -> None:
    num_shards = job.header["num_shards"]
    todo = np.flatnonzero(~writer.is_committed(storage, num_shards)).tolist()
    longest = -(-len(todo) // MAX_TASKS)
    if any(file.is_compressed for file in job.corpus.files):
        longest = max(longest, -(-num_shards // (READERS_PER_FILE * len(job.corpus.files))))
    with shard_progress("tokenize", num_shards, num_shards - len(todo)) as bar:
        for records in ray_tasks.map_tasks(tokenize_shards, job, stretches(todo, longest)):
            for record in records:
                bar(record)


def _header(tokens: TokensConfig, tokenizer: Any, wanted: Wanted) -> dict[str, Any]:
    return {
        "kind": TokenStore.kind,
        "tokenizer": describe_tokenizer(tokenizer),
        "tokenizer_name": tokens.tokenizer,
        "vocabulary_size": vocabulary_size(tokenizer),
        "window": tokens.window,
        "held_out": tokens.held_out,
        "columns": {name: wanted.kinds[name] for name in tokens.columns},
        **({} if tokens.pieces == "windows" else {"pieces": tokens.pieces}),  # stores of windows do not name them
    }


def _corpus_fields(
    tokens: TokensConfig, files: list[SourceFile], scans: Sequence[Scan], template: str | None
) -> dict[str, Any]:
    """The header's fields that depend on all of the corpus."""
    num_documents = sum(scan.measure.num_documents for scan in scans)
    num_bytes = sum(scan.measure.num_bytes for scan in scans)
    template_sha256 = None if template is None else digest(template.encode())
    num_shards = tokens.num_shards or min(max(-(-num_bytes // BYTES_PER_SHARD), 1), 1_000_000)
    return {
        "corpus": corpus_identity(tokens.source, files, scans, template_sha256, tokens.loss_on),
        "num_documents": num_documents,
        "num_shards": min(num_shards, num_documents),
    }


class _Cluster(ExitStack):
    """A Ray session that begins when it is first needed: nothing is started to find everything done."""

    def __init__(self, config: ClusterConfig) -> None:
        super().__init__()
        self.config, self.is_started = config, False

    def start(self) -> None:
        """Start or join the cluster, if that has not happened yet."""
        if not self.is_started:
            self.enter_context(ray_cluster.session(self.config))
            self.is_started = True
