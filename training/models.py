"""Models of students: loaded or new, checked against the store they are to learn from."""

import difflib
from pathlib import Path
from typing import Any

import torch

from logit_store.errors import ConfigError, StudentError
from training.config import StudentConfig


def build_student(config: StudentConfig, vocabulary_size: int, longest: int, seed: int) -> Any:
    """The model in float32: loaded, or new with weights decided by ``seed``.

    Raises StudentError: it cannot be loaded, its head is narrower than the vocabulary or its context
    shorter than ``longest`` positions, or its head does more than one matrix product.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        if config.model is not None:
            model = AutoModelForCausalLM.from_pretrained(config.model, revision=config.revision, dtype=torch.float32)
        else:
            fields = {"vocab_size": vocabulary_size, **(config.config or {})}
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudentError(f"the student cannot be built: {' '.join(str(error).split())}") from error
    text_config = model.config.get_text_config()
    if text_config.vocab_size < vocabulary_size:
        raise StudentError(
            f"the student has {text_config.vocab_size} token rows and the store's vocabulary {vocabulary_size}: "
            f"it needs at least as many (student.config.vocab_size={vocabulary_size})"
        )
    context = getattr(text_config, "max_position_embeddings", None)
    if context is not None and context < longest:
        raise StudentError(f"the student's context is {context}, but sequences of {longest} positions are trained")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    _check_plain_head(model)
    return model


def check_architecture(config: StudentConfig) -> None:
    """Refuse a new student's config that its architecture does not know. Raises ConfigError."""
    if config.config is None:
        return
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    fields = dict(config.config)
    kind = fields.pop("model_type")
    try:
        known = AutoConfig.for_model(kind)
        unknown = [key for key in fields if not hasattr(known, key)]
        AutoConfig.for_model(kind, **fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"student.config: {' '.join(str(error).split())}") from error
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(known.to_dict()), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"student.config: {kind} has no {unknown[0]!r}{hint}")


@torch.no_grad()
def _check_plain_head(model: Any) -> None:
    """Refuse a model whose logits are more than its output embedding applied to its decoder's last state."""
    training, decoder = model.training, model.get_decoder()
    model.eval()
    ids_1T = torch.arange(4)[None]
    output = decoder(input_ids=ids_1T, use_cache=False)
    output.last_hidden_state = output.last_hidden_state * 1000  # a cap does nothing to a new model's small logits
    original, decoder.forward = decoder.forward, lambda *_arguments, **_options: output
    own = model(input_ids=ids_1T, use_cache=False).logits
    decoder.forward = original
    plain = model.get_output_embeddings()(output.last_hidden_state)
    model.train(training)
    if not torch.allclose(own, plain, rtol=1e-4, atol=1e-4):
        raise StudentError(
            f"{type(model).__name__} does more to its logits than one matrix product (soft-capping or a scale): "
            "such students are not supported yet"
        )


def check_tokenizer(config: StudentConfig, manifest: dict[str, Any]) -> list[str]:
    """Compare the student's own tokenizer with the store's; warnings, one per part that differs harmlessly.

    A new student has none of its own. Raises StudentError where an id stands for another token.
    """
    if config.model is None:
        return []
    from transformers import AutoTokenizer

    from logit_store.vocabulary import describe_tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision)
    except (OSError, ValueError) as error:
        raise StudentError(f"no tokenizer beside student.model {config.model!r}: {error}") from error
    own, stored = describe_tokenizer(tokenizer), manifest["tokenizer"]
    if own["vocabulary_sha256"] != stored["vocabulary_sha256"]:
        raise StudentError(
            f"the tokenizer of student {config.model!r} and that of the store ({manifest['tokenizer_name']!r}) give "
            "different ids to tokens: labels would be for other tokens. Use a student with the store's tokenizer, "
            "or make a store with the student's"
        )
    return [part for part, sha256 in own["parts_sha256"].items() if stored["parts_sha256"].get(part) != sha256]


def save_tokenizer(files: dict[str, bytes], folder: Path) -> None:
    """Write a store's tokenizer files into a model directory."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name.removeprefix("tokenizer/")).write_bytes(data)
