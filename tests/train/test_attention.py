"""No sequence of a micro-batch sees another: padded rows, and rows laid one after the other."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from logit_store.errors import ConfigError
from tests.store.made import V, make_row, write_store
from training.config import LossConfig, StudentConfig
from training.curriculum.batches import Prefix
from training.data.micro_batch import collate
from training.data.source import Source
from training.students.attention import check_attention, flatten
from training.students.student import Student

SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
MODELS: dict[str, Any] = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
PREFIXES = [Prefix(0, 9), Prefix(1, 21), Prefix(2, 1), Prefix(3, 14)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, 24, 8) for _ in range(4)]
    return Source.of(write_store(str(tmp_path_factory.mktemp("attention") / "store"), [rows]))


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config, kind = MODELS[request.param]
    return kind(config(**SIZES)).double()


@pytest.fixture(scope="module")
def varlen_on_cpu() -> str:
    """FlashAttention's contract for sequences laid one after the other, in plain torch: bounds in, each alone."""

    def attend(module: Any, q_1HSD: Tensor, k_1GSD: Tensor, v_1GSD: Tensor, attention_mask: Any, scaling: float,
               cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, max_length_q: int, **_options: Any) -> Any:  # fmt: skip
        assert attention_mask is None
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        assert cu_seq_lens_q.dtype == torch.int32
        bounds = cu_seq_lens_q.tolist()
        assert max(b - a for a, b in pairwise(bounds)) <= max_length_q
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[:, :, a:b] for x in (q_1HSD, k_1GSD, v_1GSD)), is_causal=True, scale=scaling, enable_gqa=True
            )
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts, 2).transpose(1, 2), None

    AttentionInterface.register("varlen_on_cpu", attend)
    return "varlen_on_cpu"


def gradients(student: Student, source: Source, prefixes: list[Prefix]) -> tuple[float, list[Tensor]]:
    loss = student(collate(source, prefixes)).loss
    return loss.item(), list(torch.autograd.grad(loss, list(student.parameters())))


def test_a_rows_loss_does_not_change_with_its_batch_mates(source: Source, model: Any) -> None:
    student = Student(model, V, LossConfig(alpha=0.6))
    together, of_all = gradients(student, source, PREFIXES)
    alone = [gradients(student, source, [prefix]) for prefix in PREFIXES]
    assert together == pytest.approx(sum(loss for loss, _ in alone), rel=1e-12)
    for found, *parts in zip(of_all, *(each for _, each in alone), strict=True):
        torch.testing.assert_close(found, sum(parts), rtol=0, atol=1e-12)


def test_a_row_behind_another_is_as_alone_as_a_padded_one(
    source: Source, model: Any, varlen_on_cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.students.student.VARLEN", varlen_on_cpu)
    padded, of_padded = gradients(Student(model, V, LossConfig(alpha=0.6)), source, PREFIXES)
    student = Student(model, V, LossConfig(alpha=0.6), attention="varlen")
    flat, of_flat = gradients(student, source, PREFIXES)
    assert flat == pytest.approx(padded, rel=1e-10)
    for a, b in zip(of_flat, of_padded, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_flat_holds_what_is_no_padding_in_order(source: Source) -> None:
    batch = collate(source, PREFIXES)
    flat = flatten(batch._replace(valid_N=batch.valid_N[3:]))  # three positions are fed and carry no loss
    ids = np.concatenate([source.tokens(row).input_ids_T[:n] for row, n in PREFIXES])
    assert flat.input_ids_1S[0].tolist() == ids.tolist()
    assert flat.position_ids_1S[0].tolist() == [*range(9), *range(21), 0, *range(14)]
    assert flat.bounds.tolist() == [0, 9, 30, 31, 45]
    assert flat.longest == 21
    assert flat.valid_N.tolist() == list(range(3, 45))
    assert flatten(collate(source, [])).bounds.tolist() == [0, 1]


@pytest.mark.parametrize("attention", ["padded", "varlen"])
def test_which_positions_carry_loss_is_known_without_asking_the_device(
    source: Source, monkeypatch: pytest.MonkeyPatch, attention: Any
) -> None:
    """The meta device holds no values: whatever waits for one fails there."""

    def decode(input_ids: Tensor, **_options: Any) -> Any:
        assert input_ids.shape == ((4, 21) if attention == "padded" else (1, 45))
        return SimpleNamespace(last_hidden_state=torch.empty(*input_ids.shape, 16, device="meta"))

    monkeypatch.setattr("training.students.student.VARLEN", "sdpa")
    student = Student(LlamaForCausalLM(LlamaConfig(**SIZES)), V, LossConfig(), attention=attention)
    monkeypatch.setattr(student.model, "get_decoder", lambda: decode)
    assert student._hidden(collate(source, PREFIXES).to(torch.device("meta"))).shape == (45, 16)


def test_varlen_is_refused_where_it_cannot_run(tmp_path: Path) -> None:
    config = StudentConfig(config={"model_type": "llama"}, attention="varlen")
    with pytest.raises(ConfigError, match=r"student.attention=varlen needs .*bf16 or fp16 in the DeepSpeed JSON"):
        check_attention(config, {})
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="needs a GPU"):
            check_attention(config, {"bf16": {"enabled": True}})
    check_attention(StudentConfig(config={"model_type": "llama"}), {})
