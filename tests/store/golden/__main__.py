"""``python -m tests.store.golden``: writes the golden stores once."""

from tests.store.golden import write

write()
