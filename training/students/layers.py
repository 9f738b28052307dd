"""A student of some of a teacher's layers: which ones, its config, its weights."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from logit_store.errors import StudentError
from training.config import FromTeacherConfig

PER_LAYER = (
    "activation_sparsity_pattern", "attn_type_list", "indexer_types", "intermediate_size", "layer_rope_theta",
    "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "num_attention_heads",
    "num_attention_heads_per_layer", "num_key_value_heads", "sliding_windows", "swiglu_limits",
)  # fmt: skip
"""Keys under which configs of transformers have a value per layer, where it is a list. Other lists may happen to be as
long, as ids that end a text."""


def chosen_layers(config: FromTeacherConfig, num_layers: int) -> list[int]:
    """The teacher's layers that the student takes, of ``num_layers``.

    `alternate` is ``round(i · (num_layers − 1) / (n − 1))``: evenly spaced, with the first and the last. Of 12 layers
    it gives DistilBERT's six (huggingface/transformers, `extract_distilbert.py`). Raises StudentError: out of range.
    """
    if config.layers != "alternate":
        if max(config.layers) >= num_layers:
            raise StudentError(
                f"student.from_teacher.layers asks for layer {max(config.layers)}, and {config.model} has "
                f"{num_layers}, numbered from 0"
            )
        return list(config.layers)
    n = config.num_layers or -(-num_layers // 2)
    if n > num_layers:
        raise StudentError(
            f"student.from_teacher.num_layers is {n}, and {config.model} has {num_layers}: take at most as many"
        )
    last, gaps = num_layers - 1, max(n - 1, 1)
    return [(2 * i * last + gaps) // (2 * gaps) for i in range(n)]


def cut_config(config: FromTeacherConfig, teacher: Any) -> Any:
    """The teacher's transformers config for its chosen layers; lists with a value per layer are cut as well.

    Raises StudentError: the layers are not there, or the config speaks of layers in a way that is not understood.
    """
    num_layers = getattr(teacher, "num_hidden_layers", None)
    if num_layers is None or teacher.get_text_config() is not teacher:
        raise StudentError(
            f"student.from_teacher takes layers of plain decoders, and {config.model} is a {teacher.model_type}, whose "
            "layers are not all in one stack"
        )
    chosen = chosen_layers(config, num_layers)
    fields = teacher.to_dict()
    for key, value in fields.items():
        if isinstance(value, list) and len(value) == num_layers and key in PER_LAYER:
            fields[key] = [value[i] for i in chosen]
        elif isinstance(value, list) and value and "layer" in key:
            raise StudentError(
                f"student.from_teacher: the config of {config.model} lists some of its layers by number in {key}="
                f"{value}, and such lists cannot be cut yet"
            )
    return type(teacher).from_dict(fields | {"num_hidden_layers": len(chosen)})


def check_cut(config: FromTeacherConfig, teacher: Any, student: Any) -> None:
    """Refuse layers that do not fit into the student, by names and shapes alone. Raises StudentError."""
    given = {name: tensor.shape for name, tensor in chosen_weights(config, teacher).items()}
    wanted = {name: tensor.shape for name, tensor in student.state_dict().items()}
    differing = sorted(name for name in {*given, *wanted} if given.get(name) != wanted.get(name))
    if differing:
        raise StudentError(
            f"student.from_teacher: the layers of {config.model} are not alike, and the chosen ones do not fit in "
            f"their new places: {differing[0]} is {_shape(given.get(differing[0]))} in the teacher and "
            f"{_shape(wanted.get(differing[0]))} in the student"
        )


def chosen_weights(config: FromTeacherConfig, teacher: Any) -> dict[str, Tensor]:
    """The teacher's state dict for the student: of its layers the chosen ones, numbered anew. Raises StudentError."""
    layers = getattr(teacher.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise StudentError(
            f"student.from_teacher: {type(teacher).__name__} does not keep its layers in a list `layers` of its "
            "decoder, as Llama, Qwen, Mistral, Gemma and others do: its layers cannot be taken"
        )
    stack = next(name for name, module in teacher.named_modules() if module is layers) + "."
    state = teacher.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(stack)} | dict(
        _renumbered(state, stack, chosen_layers(config, len(layers)))
    )


def _renumbered(state: dict[str, Tensor], stack: str, chosen: Sequence[int]) -> Any:
    for new, old in enumerate(chosen):
        prefix = f"{stack}{old}."
        for name, tensor in state.items():
            if name.startswith(prefix):
                yield f"{stack}{new}.{name.removeprefix(prefix)}", tensor


def _shape(shape: Any) -> str:
    return "missing" if shape is None else str(list(shape))
