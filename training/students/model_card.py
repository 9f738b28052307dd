"""The README.md of a student's directory: what it learned from, how, and how well."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from training.config import TrainConfig


def model_card(config: TrainConfig, manifests: Sequence[dict[str, Any]], result: dict[str, Any]) -> str:
    """Markdown with the Hub's front matter. ``manifests`` are the stores', ``result`` as the run saves it.

    No licence is named: it is the publisher's to choose. What a card must not tell is masked: credentials in URLs,
    tokens of the Hub, folders of this machine.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["decant", *(["knowledge-distillation"] if config.loss.needs_labels else []), *_lora_tag(config)],
        base_model=_base_model(config),
    )
    content = "\n".join(
        [
            "---",
            data.to_yaml(),
            "---",
            "",
            "# " + ("Student distilled" if config.loss.needs_labels else "Model trained") + " by decant",
            "",
            _introduction(config, manifests),
            "",
            "## Figures",
            "",
            *_table(("", ""), _training_figures(result)),
            "",
            "On held-out rows, which no training reads (the loss in nats per token):",
            "",
            *_table(("figure", "held out"), _held_out_figures(result["held_out"])),
            "",
            *_warnings(result),
            "## Labels",
            "",
            *_table(("", ""), [fact for manifest in manifests for fact in _labels(manifest)]),
            "",
            "## Loading",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPOSITORY")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER_OR_REPOSITORY")',
            "```",
            "",
            "vLLM: `vllm serve THIS_FOLDER_OR_REPOSITORY`.",
            "",
            "## Config of the run",
            "",
            "```yaml",
            yaml.safe_dump(public(config.model_dump(mode="json", exclude_none=True)), sort_keys=False).strip(),
            "```",
            "",
        ]
    )
    return str(ModelCard(content))


SECRETS = (
    (re.compile(r"://[^\s@]*:[^\s]*@"), "://***@"),
    (re.compile(r"(?<=://)([^\s?]*)\?\S*"), r"\1?***"),  # whatever signs a URL stands in its query
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),
)
"""Parts of a text that give access to something, and what a card says in their place."""


def public(value: Any) -> Any:
    """A nested config as a card may show it: secrets masked, of a local folder outside the working directory its name.

    A user before the host of a URL is no secret (``abfs://container@account``), unless a password follows it.
    """
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    if not isinstance(value, str):
        return value
    for pattern, mask in SECRETS:
        value = pattern.sub(mask, value)
    local = value.removeprefix("file://")
    return f".../{Path(local).name}" if local.startswith(("/", "~", "..")) else value


def _introduction(config: TrainConfig, manifests: Sequence[dict[str, Any]]) -> str:
    origin = _origin(config)
    if not config.loss.needs_labels:
        return f"A causal language model, {origin}, trained on the tokens of a decant store by cross-entropy alone."
    teachers = " and ".join(f"`{_teacher(manifest)}`" for manifest in manifests)
    weight, course = f"{config.loss.alpha:g}", config.loss.alpha_schedule
    if course is not None:
        weight += f" at first and {course.to:g} after {course.over_tokens:,} tokens"
    return (
        f"A causal language model, {origin}, that learned from the soft labels of {teachers}:\n"
        f"the teacher's predictions were computed once and stored, and have a weight of {weight} in the "
        "loss,\nbeside cross-entropy."
    )


def _origin(config: TrainConfig) -> str:
    student = config.student
    if student.from_teacher is not None:
        layers = student.from_teacher.layers
        which = "alternate layers" if layers == "alternate" else f"layers {', '.join(map(str, layers))}"
        return f"begun with {which} of `{public(student.from_teacher.model)}`"
    if student.model is not None:
        adapted = " by LoRA, merged into its weights" if student.lora is not None else ""
        return f"adapted from `{public(student.model)}`{adapted}"
    if student.size is not None:
        return f"new, {student.architecture or 'qwen3'} of size {student.size}"
    return f"new, {(student.config or {})['model_type']}"


def _lora_tag(config: TrainConfig) -> list[str]:
    return ["lora"] if config.student.lora is not None else []


def _base_model(config: TrainConfig) -> str | None:
    """The Hub id that the weights come from; a folder of this machine is none."""
    if config.student.pretrained is None:
        return None
    name, _ = config.student.pretrained
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and not Path(name).exists()
    return name if is_hub_id else None


def _teacher(manifest: dict[str, Any]) -> str:
    provenance = manifest.get("provenance") or {}
    return str(public((provenance.get("teacher") or {}).get("model", "a teacher without a name")))


def _labels(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    labels = manifest.get("labels") or {}
    facts = {"text": f"`{manifest['text_id']}` (text_id)"}
    facts |= {"tokenizer": f"{public(manifest.get('tokenizer_name'))}, {manifest['vocabulary_size']:,} ids"}
    if "labels_id" not in manifest:
        return [*facts.items(), ("labels", "none: a store of tokens")]
    kind = (labels.get("targets") or {}).get("kind", "unknown")
    facts |= {
        "labels": f"`{manifest['labels_id']}` (labels_id)",
        "teacher": f"{_teacher(manifest)}, scored in {labels.get('dtype', 'an unknown dtype')}"
        + (f", quantised {labels['quantization']}" if labels.get("quantization") else ""),
        "teacher's weights": f"`{labels.get('teacher', 'unknown')}`",
        "targets": f"{kind}, at most {manifest['k']:,} ids of a position",
    }
    return list(facts.items())


def _training_figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    trained, parameters = result["trainable_parameters"], f"{result['parameters']:,}"
    if trained != result["parameters"]:
        parameters += f", by {trained:,} trained ones"
    return [("parameters", parameters), ("tokens", f"{result['tokens']:,}"), ("steps", f"{result['steps']:,}")]


def _held_out_figures(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Single numbers alone; agreement is NaN where there is no teacher to agree with."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float) and value == value}
    return [(name.replace("_", " "), _number(value)) for name, value in numbers.items()]


def _warnings(result: dict[str, Any]) -> list[str]:
    """What the run was warned of, such as how far off interpolated labels may be."""
    if not result["warnings"]:
        return []
    return ["Warnings of the run:", "", *(f"- {public(warning)}" for warning in result["warnings"]), ""]


def _number(value: float) -> str:
    return f"{value:.4f}" if value % 1 else f"{value:,.0f}"


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    lines = [header, ("---", "---"), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines]
