"""The trained student as a Hugging Face directory that `AutoModelForCausalLM` and vLLM load."""

import sys
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from logit_store import LogitStore, TokenStore
from training.config import StudentConfig, TrainConfig
from training.run_folder import RunFolder, writing
from training.students.model_card import model_card
from training.students.models import save_tokenizer


def save_student(
    model: Any, config: TrainConfig, stores: Sequence[LogitStore | TokenStore], result: dict[str, Any], run: RunFolder
) -> None:
    """Write the student's directory: weights, config, the tokenizer of ``stores``, a model card with ``result``.

    Of a LoRA student the weights are merged, and the adapter alone is written beside, for `student.model`; a student of
    some of a teacher's layers has no such model on any disk. The weights must be whole, and stay as they are. Raises
    StudentError: they cannot be written.
    """
    with writing(run.model):
        plain_model(model, config.student).save_pretrained(run.model)
        save_tokenizer(stores[0].files(), run.model)
        card = model_card(config, [store.manifest for store in stores], result)
        (run.model / "README.md").write_text(card, encoding="utf-8")
    if config.student.lora is not None and config.student.model is not None:
        with writing(run.adapter):
            model.save_pretrained(run.adapter, save_embedding_layers=False)  # or peft asks the Hub about them
            (run.adapter / "README.md").unlink()  # peft's is an empty form


def plain_model(model: Any, config: StudentConfig) -> Any:
    """The student as an ordinary model of transformers on the CPU: adapters merged, in the dtype to save."""
    dtype = getattr(torch, config.save_dtype) if config.save_dtype is not None else None
    state = model.state_dict()
    if config.lora is not None:
        from training.students.adapters import merged_state

        state, model = merged_state(model, dtype), model.get_base_model()
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict({name: _on_cpu(tensor, dtype) for name, tensor in state.items()}, assign=True)
    plain.tie_weights()  # what was one tensor is one tensor again, and is saved once
    plain.generation_config = _savable(model.generation_config)
    return plain


def _savable(generation: Any) -> Any:
    """A generation config as transformers agrees to save it: it loads older ones of the Hub that it then refuses, as
    ``{"temperature": 0.6}`` without `do_sample`.

    The first that passes: as it is; with sampling, which is what a temperature is for; the special tokens alone.
    """
    from transformers import GenerationConfig

    if _passes(generation):
        return generation
    saved, change = deepcopy(generation), "do_sample=true"
    saved.do_sample = True
    if not _passes(saved):
        ids = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if ids["pad_token_id"] == -1:  # as models without one say it
            del ids["pad_token_id"]
        saved, change = GenerationConfig(**ids), "its special tokens alone"
    print(
        f"warning: the base model's generation_config.json breaks transformers' rules: it is saved with {change}",
        file=sys.stderr,
    )
    return saved


def _passes(generation: Any) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


def _on_cpu(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
