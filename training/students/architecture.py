"""The architecture that a student config asks for, and what can be said against it before there are weights."""

import difflib
from importlib.util import find_spec
from typing import Any

from logit_store.errors import ConfigError, StudentError
from training.config import StudentConfig
from training.students.sizes import sized_fields

REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What transformers and torch raise where they cannot make what was asked of them: few fields are checked, others fail
where they are used."""


def student_architecture(config: StudentConfig, vocabulary_size: int, longest: int) -> Any:
    """The student's transformers config, of a model with at least the store's vocabulary and ``longest`` positions.

    Reads no weights. Raises ConfigError: a new student's fields make no sense. StudentError: there is no such model,
    its head is narrower than the vocabulary, its context shorter than ``longest``, its fields do not fit together, or
    the layers are not there.
    """
    architecture = _architecture(config, vocabulary_size, longest)
    text_config = architecture.get_text_config()
    if text_config.vocab_size < vocabulary_size:
        raise StudentError(
            f"the student has {text_config.vocab_size} token rows and the store's vocabulary {vocabulary_size}: "
            f"it needs at least as many (student.config.vocab_size={vocabulary_size})"
        )
    context = getattr(text_config, "max_position_embeddings", None)
    if context is not None and context < longest:
        raise StudentError(f"the student's context is {context}, but sequences of {longest} positions are trained")
    pad = getattr(text_config, "pad_token_id", None)
    if pad is not None and pad >= text_config.vocab_size:
        raise StudentError(
            f"the student's pad_token_id {pad} is beyond its {text_config.vocab_size} token rows: choose one of them, "
            "or none (student.config.pad_token_id=null)"
        )
    heads, groups = (getattr(text_config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups:
        raise StudentError(
            f"the student's {heads} attention heads do not divide among {groups} of keys and values: choose a "
            "num_key_value_heads that divides num_attention_heads"
        )
    return architecture


def check_student(config: StudentConfig, vocabulary_size: int, longest: int) -> None:
    """Refuse a student that cannot be built, without a weight in memory. Raises ConfigError, StudentError."""
    if config.config is not None:
        _check_fields(config.config)
    model = skeleton(student_architecture(config, vocabulary_size, longest))
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(f"student.gradient_checkpointing: {type(model).__name__} cannot, leave it out")
    if config.from_teacher is not None:
        from training.students.layers import check_cut

        check_cut(config.from_teacher, skeleton(_pretrained_config(config)), model)
    if config.lora is not None:
        from training.students.adapters import check_targets

        if find_spec("peft") is None:
            raise ConfigError("student.lora needs peft, which is not installed: run `make setup`, or leave lora out")
        check_targets(model, config.lora)


def skeleton(architecture: Any) -> Any:
    """A causal language model without memory for its weights: shapes and names alone. Raises StudentError."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    except REFUSALS as error:
        raise StudentError(f"the student cannot be built: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())


def _architecture(config: StudentConfig, vocabulary_size: int, longest: int) -> Any:
    from transformers import AutoConfig

    if config.size is not None:
        fields = sized_fields(config.size, config.architecture or "qwen3", vocabulary_size, longest)
        return AutoConfig.for_model(**fields)
    if config.config is not None:
        return _new({"vocab_size": vocabulary_size, **config.config})
    pretrained = _pretrained_config(config)
    if config.from_teacher is None:
        return pretrained
    from training.students.layers import cut_config

    return cut_config(config.from_teacher, pretrained)


def _pretrained_config(config: StudentConfig) -> Any:
    from transformers import AutoConfig

    assert config.pretrained is not None
    name, revision = config.pretrained
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except REFUSALS as error:
        raise StudentError(f"the student cannot be built: {one_line(error)}") from error


def _new(fields: dict[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**fields)
    except (*REFUSALS, StrictDataclassError) as error:
        raise ConfigError(f"student.config: {one_line(error)}") from error


def _check_fields(fields: dict[str, Any]) -> None:
    """Refuse a field that the architecture does not know: transformers would keep it and use it for nothing."""
    kind = fields["model_type"]
    known = _new({"model_type": kind})
    unknown = [key for key in fields if not hasattr(known, key)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(known.to_dict()), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"student.config: {kind} has no {unknown[0]!r}{hint}")
