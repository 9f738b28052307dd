"""The store of soft labels: format, writer, reader. Needs numpy, pyarrow and fsspec, nothing heavier."""

from logit_store.reader import LogitStore, TokenStore, open_store
from logit_store.rows import SPLITS, LogitRow, Targets, TokenRow
from logit_store.storage import Storage

__all__ = ["SPLITS", "LogitRow", "LogitStore", "Storage", "Targets", "TokenRow", "TokenStore", "open_store"]
