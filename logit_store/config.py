"""One YAML per run: typed, documented, and an unknown key is an error that names the nearest real one."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from logit_store.errors import ConfigError

CREDENTIALS = re.compile(
    r"://[^@/:\s]*:(?!:|\d{1,5}/)[^@\s]*@|https?://[^/?#@\s]*@"
    r"|://\S*[?#&][^=&\s]*(?:sig(nature)?|token|secret|pass(word|wd)?|key(id)?|auth(orization)?|credentials?)=",
    re.IGNORECASE,
)
"""In a URL: `user:password@` (a password may hold any character; not `host:port/…@…`, nor what is behind a first `/` or
`::`), a parameter that opens or signs it, or of the web a user, which may be a token. Elsewhere a user alone is none:
`abfs://container@account`."""

KEEP_CREDENTIALS = (
    "is a URL with credentials, and would be written into stores and logs: leave them out, and give them to every "
    "node by its environment, its role, or fsspec's own config (~/.config/fsspec)"
)


class Config(BaseModel):
    """Base of every config section: frozen, strictly typed, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


ConfigT = TypeVar("ConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``2e-6`` as text; this loader reads it as the number that everybody means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path`` as YAML, apply ``a.b=c`` overrides (values are YAML too) and validate it as ``cls``.

    Raises ConfigError: the file is missing or not YAML; a key is unknown, missing or of the wrong type.
    """
    raw = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(cls, raw, str(path))


def parse_config(cls: type[ConfigT], raw: dict[str, Any], source: str) -> ConfigT:
    """Validate ``raw`` as ``cls``; ``source`` names it in errors. Raises ConfigError, also for a URL with credentials,
    which is not repeated.
    """
    for key, value in _strings(raw):
        if CREDENTIALS.search(value):
            raise ConfigError(f"{key} {KEEP_CREDENTIALS}")
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(cls, dict(problem)) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML, as it is saved with a run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist (current folder: {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {path} must hold `key: value` lines, not {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override of {key!r}: {parent!r} is a value, not a section")
    try:
        section[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override of {key!r}: the value is not YAML") from None


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a nested config, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def _explain(cls: type[Config], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "config"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(cls, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    given = problem["input"]
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {type(given).__name__} {given!r}"


def _known_keys(cls: type[Config], parents: list[str]) -> list[str]:
    model: Any = cls
    for parent in parents:
        field = model.model_fields.get(parent)
        candidates = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
