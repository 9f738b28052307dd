"""LoRA: what is trained, what is frozen, and what a merged student computes."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from logit_store.errors import ConfigError
from training.config import LoraConfig
from training.students.adapters import check_targets, merged_state, with_lora
from training.students.models import num_parameters

V = 100
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 16},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
}  # fmt: skip


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=V, **KINDS[kind])).eval()


def randomise(model: Any) -> None:
    """As if it had learned something: B is 0 at first, and the product with it."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=torch.arange(5, 17)[None], use_cache=False).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_the_merged_weights_compute_what_the_adapted_model_does(kind: str, targets: str) -> None:
    model, plain = make_model(kind), make_model(kind)
    some = ["c_attn", "mlp.c_proj"] if kind == "gpt2" else ["q_proj", "self_attn.v_proj"]
    config = LoraConfig(rank=3, alpha=5.0, target_modules=some if targets == "some" else "all-linear")
    check_targets(model, config)
    adapted = with_lora(model, config, seed=3).eval()
    torch.testing.assert_close(logits(adapted), logits(plain))  # B = 0: it begins as the model itself
    randomise(adapted)
    state = merged_state(adapted)
    before = logits(adapted)
    assert (before - logits(plain)).abs().max() > 0.01
    plain.load_state_dict(state)
    torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(adapted), before)  # and the adapted model is as it was


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_merging_rounds_once_to_the_dtype_that_is_saved(dtype: torch.dtype | None) -> None:
    adapted = with_lora(make_model("qwen3").bfloat16(), LoraConfig(rank=3), seed=3)
    randomise(adapted)
    name = "model.layers.1.mlp.up_proj"
    layer = adapted.get_base_model().get_submodule(name)
    a_KD, b_WK = (matrix["default"].weight.detach().double() for matrix in (layer.lora_A, layer.lora_B))
    exact = layer.base_layer.weight.detach().double() + b_WK @ a_KD * layer.scaling["default"]
    merged = merged_state(adapted, dtype)[f"{name}.weight"]
    assert merged.dtype == (dtype or torch.bfloat16)
    torch.testing.assert_close(merged.double(), exact, rtol=1e-6 if dtype else 2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_are_trained_and_the_loss_finds_decoder_and_head(kind: str) -> None:
    model = make_model(kind)
    decoder, head, size = model.get_decoder(), model.get_output_embeddings(), sum(p.numel() for p in model.parameters())
    adapted = with_lora(model, LoraConfig(rank=2), seed=0)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert adapted.get_decoder() is decoder
    assert adapted.get_output_embeddings() is head
    assert adapted.config.get_text_config().vocab_size == V
    counts = num_parameters(adapted)
    assert counts["parameters"] == size
    assert counts["trainable_parameters"] == sum(p.numel() for p in adapted.parameters()) - size


def test_the_seed_decides_the_adapters() -> None:
    first, again, other = (with_lora(make_model("qwen3"), LoraConfig(rank=2), seed).state_dict() for seed in (0, 0, 1))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("target", ["q_porj", "lm_head", "embed_tokens", "proj", "norm"])
def test_a_target_that_is_no_linear_layer_is_refused(target: str) -> None:
    message = f"Qwen3ForCausalLM has no linear layer named '{target}'; choose from down_proj, gate_proj, k_proj, o_proj"
    with pytest.raises(ConfigError, match=message):
        check_targets(make_model("qwen3"), LoraConfig(target_modules=["q_proj", target]))
