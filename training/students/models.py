"""Models of students: loaded, new, or some layers of a teacher, checked against the store they are to learn from."""

from pathlib import Path
from typing import Any

import torch

from logit_store.errors import StudentError
from training.config import StudentConfig
from training.students.architecture import REFUSALS, one_line, student_architecture


def build_student(config: StudentConfig, vocabulary_size: int, longest: int, seed: int) -> Any:
    """The model in float32: loaded, cut from a teacher, or new with weights decided by ``seed``.

    With `lora` it is a ``peft.PeftModel`` around that model. Raises ConfigError; StudentError: it cannot be loaded, its
    head is narrower than the vocabulary or its context shorter than ``longest`` positions.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    architecture = student_architecture(config, vocabulary_size, longest)
    try:
        model = _with_weights(config, architecture, seed)
    except REFUSALS as error:
        raise StudentError(f"the student cannot be built: {one_line(error)}") from error
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.lora is None:
        return model
    from training.students.adapters import with_lora

    if config.gradient_checkpointing:
        model.enable_input_require_grads()  # a recomputed layer needs a gradient to pass on, and embeddings are frozen
    return with_lora(model, config.lora, seed, config.revision)


def num_parameters(model: Any) -> dict[str, int]:
    """How many ``parameters`` the student has when it is saved, and how many ``trainable_parameters`` are learned."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)  # merged when it is saved
    return {"parameters": sum(p.numel() for p in model.parameters()) - added, "trainable_parameters": trainable}


def _with_weights(config: StudentConfig, architecture: Any, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    if config.from_teacher is not None:
        from training.students.layers import chosen_weights

        # In the dtype it was saved in, and float32 for the layers that are taken only: the teacher may be large.
        weights = chosen_weights(config.from_teacher, _pretrained(config, "auto"))
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
        model.load_state_dict(weights)
        return model
    if config.model is not None:
        return _pretrained(config, torch.float32)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)


def _pretrained(config: StudentConfig, dtype: Any) -> Any:
    """The model that weights come from. Raises StudentError where some are missing: they would be random numbers."""
    from transformers import AutoModelForCausalLM

    assert config.pretrained is not None
    name, revision = config.pretrained
    model, loading = AutoModelForCausalLM.from_pretrained(
        name, revision=revision, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise StudentError(f"{name} lacks weights of the model: {', '.join(sorted(loading['missing_keys'])[:3])}, …")
    return model


def check_tokenizer(config: StudentConfig, manifest: dict[str, Any]) -> list[str]:
    """Compare the student's own tokenizer with the store's; warnings, one per part that differs harmlessly.

    A new student has none of its own. Raises StudentError where an id stands for another token.
    """
    if config.pretrained is None:
        return []
    from transformers import AutoTokenizer

    from logit_store.vocabulary import describe_tokenizer

    name, revision = config.pretrained
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StudentError(f"no tokenizer beside the student's model {name!r}: {error}") from error
    own, stored = describe_tokenizer(tokenizer), manifest["tokenizer"]
    if own["vocabulary_sha256"] != stored["vocabulary_sha256"]:
        raise StudentError(
            f"the tokenizer of student {name!r} and that of the store ({manifest['tokenizer_name']!r}) give "
            "different ids to tokens: labels would be for other tokens. Use a student with the store's tokenizer, "
            "or make a store with the student's"
        )
    return [part for part, sha256 in own["parts_sha256"].items() if stored["parts_sha256"].get(part) != sha256]


def save_tokenizer(files: dict[str, bytes], folder: Path) -> None:
    """Write a store's tokenizer files into a model directory."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name.removeprefix("tokenizer/")).write_bytes(data)
