"""Any head that transformers knows, in chunks, with the gradients of the model's own loss; under every ZeRO stage."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from logit_store.errors import StudentError
from training.config import LossConfig, StudentConfig
from training.data.micro_batch import MicroBatch
from training.losses import SparseTargets, WeightedTargets
from training.students.models import build_student
from training.students.student import Predictions, Student

V, W, B, L = 90, 96, 3, 11
# fmt: off
SIZES: dict[str, Any] = {
    "vocab_size": W, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "model_type": "llama"},
    "tied": {**SIZES, "model_type": "qwen3", "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": W, "n_embd": 32, "n_layer": 1, "n_head": 2,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "softcap": {**SIZES, "model_type": "gemma2", "final_logit_softcapping": 0.2},
    "logit_scale": {**SIZES, "model_type": "cohere", "logit_scale": 0.1},
    "logits_scaling": {**SIZES, "model_type": "granite", "logits_scaling": 8.0},
    "experts": {**SIZES, "model_type": "mixtral", "num_local_experts": 2},
}
# fmt: on


def make_model(name: str) -> Any:
    return build_student(StudentConfig(config=MODELS[name]), V, 16, 0)


def make_batch(seed: int = 0) -> MicroBatch:
    """Rows of 11, 7 and 4 positions, some of them masked, with heads of 5 entries."""
    g = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, V, (B, L + 1), generator=g)
    valid_BL = (torch.arange(L) < torch.tensor([11, 7, 4])[:, None]) & (torch.rand(B, L, generator=g) < 0.8)
    next_ids_N = ids_BT[:, 1:][valid_BL]
    log_p_NV = (torch.randn(len(next_ids_N), V, generator=g) * 2).log_softmax(-1)
    logprobs_NK, ids_NK = log_p_NV.topk(5, dim=-1)
    kept_NV = torch.zeros_like(log_p_NV, dtype=torch.bool).scatter(-1, ids_NK, True)
    kept_NV = kept_NV.scatter(-1, next_ids_N[:, None], True)
    tail_N = log_p_NV.masked_fill(kept_NV, -torch.inf).logsumexp(-1)
    partition_NS = torch.stack([(log_p_NV / t).logsumexp(-1) for t in (2.0, 4.0)], 1)
    next_N = log_p_NV.gather(-1, next_ids_N[:, None])[:, 0]
    targets = SparseTargets.of_heads(ids_NK, logprobs_NK, next_N, tail_N, partition_NS)
    lengths_B = torch.full((len(ids_BT),), ids_BT.shape[1] - 1)
    fed_S, valid_N = torch.arange(valid_BL.numel()), valid_BL.flatten().nonzero()[:, 0]
    return MicroBatch(ids_BT[:, :-1], lengths_B, fed_S, valid_N, next_ids_N, (WeightedTargets(1.0, targets),))


@pytest.mark.parametrize("name", list(MODELS))
def test_the_chunked_head_is_the_models_own(name: str) -> None:
    model, batch = make_model(name), make_batch()
    student = Student(model, V, LossConfig(alpha=0.0, chunk_positions=4))
    student.train()
    logits_NW = model(input_ids=batch.input_ids_BL, use_cache=False).logits.flatten(0, 1)[batch.valid_N]
    own = torch.nn.functional.cross_entropy(logits_NW[:, :V], batch.next_ids_N, reduction="sum")
    expected = torch.autograd.grad(own, list(model.parameters()), allow_unused=True)
    loss = student(batch).loss
    torch.testing.assert_close(loss, own)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    student.eval()
    with torch.no_grad():
        predictions = student(batch)
    assert isinstance(predictions, Predictions)
    torch.testing.assert_close(predictions.ce_N.sum(), own.detach())
    assert torch.equal(predictions.top_id_N, logits_NW[:, :V].argmax(-1))
    assert not any("forward" in vars(module) for module in model.modules())  # everything is put back


class ScaledBefore(LlamaForCausalLM):
    """A head that sees other hidden states than the decoder gives."""

    def forward(self, input_ids: Any = None, **options: Any) -> Any:
        output = super().forward(input_ids=input_ids, **options)
        output.logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state / 3)
        return output


def test_other_heads_are_refused() -> None:
    config = LlamaConfig(**{key: value for key, value in SIZES.items() if key != "model_type"})
    with pytest.raises(StudentError, match="ScaledBefore does something to its hidden states before its head"):
        Student(ScaledBefore(config), V, LossConfig())
    model = LlamaForCausalLM(config)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, W, bias=False))
    with pytest.raises(StudentError, match="students need a plain linear layer there"):
        Student(model, V, LossConfig())


def run(name: str, loss: LossConfig, extra: dict[str, Any], steps: int = 4) -> tuple[list[dict[str, float]], Any, Any]:
    """Losses, whole weights and the student after some steps of the real engine."""
    from training.config import OptimizerConfig
    from training.engine import Engine
    from training.engine_config import _adamw

    config = {
        "optimizer": _adamw(OptimizerConfig(weight_decay=0.0)), "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        **extra,
    }  # fmt: skip
    engine = Engine(Student(make_model(name), V, loss, (2.0, 4.0)), config)
    engine.module.train()
    lines = []
    for step in range(steps):
        engine.module.mixing.tokens_seen = 10 * step
        batches = [make_batch(2 * step), make_batch(2 * step + 1)]
        update = engine.step(batches, sum(len(batch.next_ids_N) for batch in batches), 1e-2)
        lines.append({**update.terms, "temperature": engine.module.mixing.last_temperature})
    with engine.whole_weights():
        weights = {key: value.float().clone() for key, value in engine.module.state_dict().items()}
    return lines, weights, engine.module


LEARNED = {"low": 1.0, "high": 4.0, "over_tokens": 20}


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", ["tied", "softcap", "llama"])
def test_zero_gathers_the_head_for_the_fused_loss(one_rank: None, name: str, stage: int) -> None:
    loss = LossConfig(alpha=0.8, chunk_positions=5, z_loss=1e-3, learned_temperature=LEARNED)  # type: ignore[arg-type]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    (plain, plain_weights, _), (split, split_weights, _) = (
        run(name, loss, {"zero_optimization": options}) for options in ({"stage": 0}, zero)
    )
    for a, b in zip(plain, split, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    temperatures = [line["temperature"] for line in plain]
    assert temperatures[0] == temperatures[1] == 2.5  # the reversal begins at zero
    assert len(set(temperatures[1:])) == 3
    for key, value in plain_weights.items():
        torch.testing.assert_close(split_weights[key], value, rtol=1e-4, atol=1e-5)


def test_bfloat16_students_learn_the_same(one_rank: None) -> None:
    loss = LossConfig(alpha=0.8, temperature=2.0, chunk_positions=5)
    exact, *_ = run("softcap", loss, {})
    rounded, *_ = run("softcap", loss, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    for a, b in zip(exact, rounded, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
