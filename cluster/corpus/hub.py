"""A dataset of the Hub: the commit it is pinned to, the files that a split consists of, and fetching one of them."""

from pathlib import Path
from typing import Any, NamedTuple

from cluster.config import SourceConfig
from cluster.remembered import recall, remember
from logit_store.errors import CorpusError
from logit_store.identity import digest_json

FORMATS = {"json": "json", "parquet": "parquet", "arrow": "arrow", "text": "lines"}
"""What `datasets` calls a repository's format, and what it is here: there each line of a text file is a document."""

CONVERTED = "the Hub keeps a copy of most datasets as Parquet: set tokens.source.revision to refs/convert/parquet"


class Snapshot(NamedTuple):
    """A dataset at one commit."""

    dataset: str
    commit: str
    folder: str | None
    """Its place in this machine's Hub cache, where the Hub itself cannot be asked."""


def resolve(dataset: str, revision: str | None) -> Snapshot:
    """The commit that a revision stands for now; without the Hub, the one that this machine knows of.

    Raises CorpusError: the Hub has no such dataset or revision, or cannot be asked and nothing is known.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    key = digest_json([dataset, revision])
    try:
        commit = str(HfApi().dataset_info(dataset, revision=revision).sha)
    except (OfflineModeIsEnabled, httpx.TransportError) as error:
        return _in_cache(dataset, revision) or _resolved_before(dataset, key, error)
    except (HfHubHTTPError, HFValidationError) as error:
        raise _cannot_be_fetched(dataset, error) from error
    remember("commits", key, commit)
    return Snapshot(dataset, commit, None)


def _in_cache(dataset: str, revision: str | None) -> Snapshot | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(dataset, repo_type="dataset", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return Snapshot(dataset, Path(folder).name, folder)


def _resolved_before(dataset: str, key: str, error: Exception) -> Snapshot:
    commit = recall("commits", key)
    if commit is None:
        raise _cannot_be_fetched(dataset, error) from error
    return Snapshot(dataset, str(commit), None)


def _cannot_be_fetched(what: str, error: Exception) -> CorpusError:
    reason = " ".join(str(error).split())
    return CorpusError(f"dataset {what!r} cannot be fetched from the Hub or its cache: {reason}")


def data_files(snapshot: Snapshot, source: SourceConfig) -> tuple[str, list[str]]:
    """Format and paths of the files that the split consists of, as `datasets` understands the repository.

    The answer is remembered, so that the same command works without the Hub later on. Offline and for the first
    time, only what lies in the Hub cache can be seen: the corpus is what was fetched of that commit.
    Raises CorpusError.
    """
    key = digest_json([*snapshot[:2], source.name, source.split, source.files])
    known = recall("datasets", key)
    if known is None:
        known = _ask_datasets(snapshot, source)
        if snapshot.folder is None:
            remember("datasets", key, known)
    return known[0], known[1]


def fetch(snapshot: Snapshot, path: str) -> str:
    """Local path of a file of the repository, which is fetched where this node's cache lacks it. Raises CorpusError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return str(hf_hub_download(snapshot.dataset, path, repo_type="dataset", revision=snapshot.commit))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _cannot_be_fetched(f"{snapshot.dataset}/{path}", error) from error


def url(snapshot: Snapshot, path: str) -> str:
    """Where a part of the file can be read: its place in this node's cache, or else its URL on the Hub."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(snapshot.dataset, path, repo_type="dataset", revision=snapshot.commit)
    return cached if isinstance(cached, str) else f"hf://datasets/{snapshot.dataset}@{snapshot.commit}/{path}"


def _ask_datasets(snapshot: Snapshot, source: SourceConfig) -> tuple[str, list[str]]:
    builder = _builder(snapshot, source)
    files = {str(split): paths for split, paths in (builder.config.data_files or {}).items()}
    if builder.name not in FORMATS:
        raise CorpusError(
            f"dataset {snapshot.dataset!r} is kept as {builder.name}, not {_listed(FORMATS)}: {CONVERTED}"
        )
    if source.split not in files:
        raise CorpusError(
            f"dataset {snapshot.dataset!r} has no split {source.split!r}: it has {_listed(files)} (tokens.source.split)"
        )
    root = snapshot.folder or f"hf://datasets/{snapshot.dataset}@{snapshot.commit}"
    return FORMATS[builder.name], [str(path).removeprefix(f"{root}/") for path in files[source.split]]


def _builder(snapshot: Snapshot, source: SourceConfig) -> Any:
    import datasets

    where = {"path": snapshot.folder} if snapshot.folder else {"path": snapshot.dataset, "revision": snapshot.commit}
    try:
        return datasets.load_dataset_builder(**where, name=source.name, data_files=source.files or None)
    except RuntimeError as error:  # "Dataset scripts are no longer supported"
        raise CorpusError(f"dataset {snapshot.dataset!r} is made by a script, which is not run: {CONVERTED}") from error
    except FileNotFoundError as error:  # also EmptyDatasetError; the message lists every ending that there is
        wanted = f"no file that matches {source.files}" if source.files else "no data files"
        raise CorpusError(f"dataset {snapshot.dataset!r} at {snapshot.commit} has {wanted}") from error
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CorpusError(f"dataset {snapshot.dataset!r} cannot be used: {reason} (tokens.source.name)") from error


def _listed(names: Any) -> str:
    return ", ".join(names)
