"""A tokenizer of the Hub or a directory, as it is loaded everywhere in the cluster."""

from typing import Any

from logit_store.errors import ConfigError


def load_tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer; Python code that comes with it runs where ``trust_remote_code`` says so. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:  # said in either way, or transformers would ask whoever sits at the terminal
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust library raises nothing more special for a file that it cannot parse
        reason = " ".join(str(error).split())
        raise ConfigError(f"no tokenizer can be loaded from {name!r}: {reason}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made up from a model's config.json alone
        raise ConfigError(f"{name!r} has no tokenizer files, only a model's config: no text can be read with it")
    return tokenizer
