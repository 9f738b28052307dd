"""A causal language model as transformers loads it: what is refused before its weights are read, and how they are."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.config import TeacherConfig
from cluster.memory import is_out_of_memory
from logit_store.errors import TeacherError


def check_architecture(folder: Path, trust_remote_code: bool = False) -> Any:
    """The config of the model in ``folder``. Raises TeacherError where it is none that predicts next tokens.

    Reads the config alone, so that it can be called before a cluster starts. An encoder, or a decoder that was saved
    without its LM head, would be loaded all the same, with random numbers for what it lacks.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
        raise TeacherError(f"{folder} is no model that transformers can read: {_one_line(error)}") from error
    architectures = getattr(config, "architectures", None) or []
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return config
    if not set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        named = ", ".join(architectures) or "no architecture"
        raise TeacherError(
            f"{folder} holds {named} (model type {config.model_type}), which has no causal LM head: a teacher must "
            "predict next tokens, as a …ForCausalLM does"
        )
    return config


def load_model(folder: Path, config: TeacherConfig, device: str) -> Any:
    """The model, ready to score on ``device`` or, with ``device_map``, spread over what there is.

    Raises TeacherError: no causal LM, a library or GPU that the config needs is missing, weights are missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a worker's bars would land in the driver's terminal
    check_architecture(folder, config.trust_remote_code)
    options = _options(config, device)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.pickled_weights else True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        hint = "" if config.pickled_weights else ". Weights in pickle files (*.bin) need teacher.pickled_weights=true"
        raise TeacherError(f"the teacher in {folder} cannot be loaded: {_one_line(error)}{hint}") from error
    if loading["missing_keys"]:
        raise TeacherError(f"{folder} lacks weights of the model: {', '.join(sorted(loading['missing_keys'])[:3])}, …")
    model = (model if "device_map" in options else model.to(device)).eval()
    widen_head(model.get_output_embeddings())
    return model


def widen_head(head: torch.nn.Module) -> None:
    """Make a linear ``head`` of half precision give float32 logits, as vLLM's does here.

    In bfloat16 a logit between 16 and 32 is rounded to the next eighth: more than the store's codec may cost, and one
    in seven of the first eight ids ties with its neighbour. A GPU sums the products in float32 anyway, and leaves them
    there for nothing; a CPU keeps a float32 copy of the weights. Heads of other classes are left as they are.
    """
    if type(head) is not torch.nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return
    if head.weight.device.type == "cpu":  # of its own: an embedding that is tied to it stays half
        head.weight = torch.nn.Parameter(head.weight.float(), requires_grad=False)

    def forward(hidden_XD: Tensor) -> Tensor:
        weight_WD, bias_W = head.weight, head.bias
        if hidden_XD.is_cuda:
            logits_NW = torch.mm(hidden_XD.flatten(0, -2), weight_WD.T, out_dtype=torch.float32)
            logits_XW = logits_NW.unflatten(0, hidden_XD.shape[:-1])
        else:
            logits_XW = torch.nn.functional.linear(hidden_XD.float(), weight_WD.float())
        return logits_XW if bias_W is None else logits_XW + bias_W

    # accelerate's hook, where weights are kept elsewhere between uses, calls the forward that it found.
    setattr(head, "_old_forward" if hasattr(head, "_hf_hook") else "forward", forward)


def _options(config: TeacherConfig, device: str) -> dict[str, Any]:
    """What ``from_pretrained`` needs beyond a plain load."""
    options: dict[str, Any] = {}
    if config.device_map or config.quantization:
        _require("accelerate", f"teacher.{'device_map' if config.device_map else 'quantization'}")
    if config.device_map or device.startswith("cuda"):  # straight to the GPU: a node's workers have one host memory
        options["device_map"] = config.device_map or {"": device}
    if config.quantization:
        if not device.startswith("cuda") or not torch.cuda.is_available():
            raise TeacherError(
                f"teacher.quantization={config.quantization} needs a CUDA GPU, and the worker has none: give it one "
                "with cluster.gpus_per_worker=1, or leave quantization out"
            )
        _require("bitsandbytes", f"teacher.quantization={config.quantization}")
        from transformers import BitsAndBytesConfig

        bits = {"8bit": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True}}[config.quantization]
        compute = {"bnb_4bit_compute_dtype": getattr(torch, config.dtype)} if config.quantization == "4bit" else {}
        options["quantization_config"] = BitsAndBytesConfig(**bits, **compute)
    return options


def _require(library: str, setting: str) -> None:
    if find_spec(library) is None:
        raise TeacherError(f"{setting} needs the library {library}, which is not installed: `pip install {library}`")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
