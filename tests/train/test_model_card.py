"""The card of a student says what it learned from, and nothing that gives access to it."""

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from training.config import TrainConfig
from training.students.model_card import model_card, public

RESULT = {
    "parameters": 1_234_567,
    "trainable_parameters": 1_234_567,
    "steps": 20,
    "tokens": 6000,
    "warnings": ["log-partitions are off by at most 0.01 nats"],
    "held_out": {"loss": 3.25, "perplexity": 25.79, "positions": 812.0, "agreement": float("nan"), "by_length": {}},
}
MANIFEST = {
    "text_id": "a" * 64,
    "labels_id": "b" * 64,
    "vocabulary_size": 400,
    "tokenizer_name": "org/tokenizer",
    "k": 16,
    "labels": {"teacher": "c" * 64, "dtype": "bfloat16", "quantization": "fp8", "targets": {"kind": "top_p"}},
    "provenance": {"teacher": {"model": "Qwen/Qwen3-32B"}},
}


def config(student: dict[str, Any], store: str = "s3://bucket/store", alpha: float = 0.9) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "run": {"path": "runs/one"},
            "data": {"store": store},
            "student": student,
            "loss": {"alpha": alpha},
            "schedule": {"total_tokens": 6000, "tokens_per_step": 300, "lr": 0.01},
        }
    )


def card(student: dict[str, Any], manifest: dict[str, Any] = MANIFEST, **options: Any) -> Any:
    return ModelCard(model_card(config(student, **options), [manifest], RESULT))


def test_it_names_store_teacher_figures_and_config() -> None:
    found = card({"model": "Qwen/Qwen3-0.6B", "lora": {}})
    assert found.data.library_name == "transformers"
    assert found.data.base_model == "Qwen/Qwen3-0.6B"
    assert found.data.tags == ["decant", "knowledge-distillation", "lora"]
    assert found.data.license is None
    for fact in (
        "a" * 64, "b" * 64, "c" * 64, "Qwen/Qwen3-32B, scored in bfloat16, quantised fp8", "top_p, at most 16 ids",
        "org/tokenizer, 400 ids", "| parameters | 1,234,567 |", "| tokens | 6,000 |", "| loss | 3.2500 |",
        "| positions | 812 |", "- log-partitions are off", "AutoModelForCausalLM.from_pretrained", "vllm serve",
    ):  # fmt: skip
        assert fact in found.text, fact
    assert "agreement" not in found.text  # it is NaN
    written = yaml.safe_load(found.text.split("```yaml")[1].split("```")[0])
    assert TrainConfig.model_validate(written) == config({"model": "Qwen/Qwen3-0.6B", "lora": {}})


@pytest.mark.parametrize(
    ("student", "base_model", "words"),
    [
        ({"size": "25m"}, None, "new, qwen3 of size 25m"),
        ({"config": {"model_type": "llama"}}, None, "new, llama"),
        ({"model": "/home/alice/runs/1/model"}, None, "adapted from `.../model`"),
        ({"model": "gpt2"}, "gpt2", "adapted from `gpt2`"),
        ({"from_teacher": {"model": "Qwen/Qwen3-8B"}}, "Qwen/Qwen3-8B", "begun with alternate layers of"),
        ({"from_teacher": {"model": "a/b", "layers": [0, 3]}}, "a/b", "begun with layers 0, 3 of `a/b`"),
    ],
)
def test_it_says_where_the_weights_come_from(student: dict[str, Any], base_model: str | None, words: str) -> None:
    found = card(student)
    assert found.data.base_model == base_model
    assert words in found.text


def test_a_store_of_tokens_has_no_teacher() -> None:
    manifest = {key: MANIFEST[key] for key in ("text_id", "vocabulary_size", "tokenizer_name")}
    found = card({"size": "25m"}, manifest, alpha=0.0)
    assert found.data.tags == ["decant"]
    assert "trained on the tokens of a decant store by cross-entropy alone" in found.text
    assert "| labels | none: a store of tokens |" in found.text


def test_a_weight_that_changes_is_told_whole() -> None:
    grows = {"alpha": 0.0, "alpha_schedule": {"kind": "linear", "to": 0.5, "over_tokens": 3000}}
    raw = config({"size": "25m"}).model_dump(mode="json") | {"loss": grows}
    text = model_card(TrainConfig.model_validate(raw), [MANIFEST], RESULT)
    assert "a weight of 0 at first and 0.5 after 3,000 tokens in the loss" in text
    assert "a weight of 0.9 in the loss" in card({"size": "25m"}).text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("s3://KEY:SECRET@bucket/store", "s3://***@bucket/store"),
        ("s3://KEY:SEC/RET@x@bucket/store", "s3://***@bucket/store"),
        ("https://host/store?X-Amz-Signature=SECRET&b=1", "https://host/store?***"),
        ("https://account.blob/store?sv=1&sig=SECRET", "https://account.blob/store?***"),
        ("abfs://container@account/store", "abfs://container@account/store"),
        ("a token hf_SECRETSECRETSECRET", "a token hf_***"),
        ("/home/alice/store", ".../store"),
        ("~/store", ".../store"),
        ("../../alice/store", ".../store"),
        ("file:///home/alice/store", ".../store"),
        ("runs/demo/store", "runs/demo/store"),
        (["/home/alice/a", {"b": "/home/alice/c"}, 3], [".../a", {"b": ".../c"}, 3]),
    ],
)
def test_secrets_and_folders_of_this_machine_are_masked(value: Any, shown: Any) -> None:
    assert public(value) == shown


def test_no_secret_is_anywhere_in_a_card() -> None:
    secret = "s3://KEY:SECRET@bucket/store?sig=SECRET"
    manifest = {**MANIFEST, "tokenizer_name": secret, "provenance": {"teacher": {"model": secret}}}
    for student in ({"model": secret}, {"from_teacher": {"model": secret}}):
        text = str(card(student, manifest, store=secret))
        assert "SECRET" not in text
        assert "KEY" not in text
