"""A span of numbers on the command line: `A:B`, as Python writes it."""

import re

from logit_store.errors import ConfigError


def parse_span(text: str | None, size: int, option: str, of: str) -> range:
    """``range(size)[A:B]`` of ``"A:B"``, in which either may be left out; all of it for None.

    ``option`` and ``of`` (what there are ``size`` of) are words for errors. Raises ConfigError: it is no such span, or
    nothing is in it.
    """
    if text is None:
        return range(size)
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if match is None:
        raise ConfigError(f"{option} {text}: give A:B, which is A up to but without B, such as 0:20 or 100:")
    start, stop = (int(side) if side else None for side in match.groups())
    span = range(size)[start:stop]
    if not span:
        raise ConfigError(f"{option} {text}: nothing is in it; there are {size:,} {of}, counted from 0")
    return span
