"""The student: a causal language model of transformers, with its loss inside the module that DeepSpeed owns."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from training.config import LossConfig
from training.data.micro_batch import MicroBatch
from training.losses import LossSums, Objective, WeightedTargets, linear_losses, soft_losses
from training.losses.fused import default_chunk, wide_linear
from training.losses.head import OutputHead
from training.losses.mixing import Mixing
from training.students.attention import VARLEN, flatten


class Predictions(NamedTuple):
    """What evaluation needs of N positions."""

    ce_N: Tensor
    kl_N: Tensor
    """KL(teacher ‖ student) as the student's ``measure`` has it, without the loss's factor T²; NaN without one."""
    top_id_N: Tensor
    top_probability_N: Tensor


class Student(nn.Module):
    """A model and its loss. ``forward`` gives loss sums: inside one module, ZeRO-3 gathers the head for it."""

    def __init__(
        self, model: Any, vocabulary_size: int, loss: LossConfig, stored: Sequence[float] = (),
        attention: Literal["padded", "varlen"] = "padded", measure: Objective | None = None,
    ) -> None:  # fmt: skip
        """``stored`` are the temperatures that the labels' log-partitions are of. Raises StudentError.

        ``measure`` is how distances to the teacher are measured in eval mode.
        """
        super().__init__()
        self.measure = measure
        self.attention = attention
        self.model = model
        self.mixing = Mixing(loss)
        self.head = OutputHead(model)
        if attention == "varlen":  # only now: heads are probed anywhere, and it runs on GPUs alone
            model.set_attn_implementation(VARLEN)
        self.objective = Objective(
            vocabulary_size, tail=loss.tail, divergence=loss.divergence, beta=loss.beta, z_loss=loss.z_loss,
            stored=tuple(stored),
        )  # fmt: skip
        self.chunk = loss.chunk_positions

    def forward(self, batch: MicroBatch) -> LossSums | Predictions:
        """Loss sums of a micro-batch; its predictions in eval mode."""
        hidden_ND = self._hidden(batch)
        if not self.training:
            return Predictions(*self.head.apply(partial(self._predictions, batch), hidden_ND))
        objective = self.objective._replace(alpha=self.mixing.alpha, temperature=self.mixing.temperature())
        return LossSums.of(self.head.apply(partial(self._losses, batch, objective), hidden_ND))

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """States of the valid positions. No sequence sees another, nor its padding."""
        if self.attention == "varlen":
            flat = flatten(batch)
            output = self.model.get_decoder()(**flat.arguments(), use_cache=False)
            return output.last_hidden_state[0].index_select(0, flat.valid_N)
        output = self.model.get_decoder()(input_ids=batch.input_ids_BL, use_cache=False)
        return output.last_hidden_state.flatten(0, 1).index_select(0, batch.valid_N)

    def _losses(
        self, batch: MicroBatch, objective: Objective, hidden_ND: Tensor, weight_WD: Tensor, bias_W: Tensor | None
    ) -> Tensor:
        finish, ids_N = self.head.finish, batch.next_ids_N
        return linear_losses(hidden_ND, weight_WD, bias_W, finish, ids_N, batch.targets, objective, self.chunk)

    def _predictions(
        self, batch: MicroBatch, hidden_ND: Tensor, weight_WD: Tensor, bias_W: Tensor | None
    ) -> tuple[Tensor, ...]:
        chunk, parts = self.chunk or default_chunk(weight_WD), []
        for start in range(0, max(len(hidden_ND), 1), chunk):  # once at least, for columns of no positions
            at = slice(start, start + chunk)
            logits_CW = self.head.finish(wide_linear(hidden_ND[at], weight_WD, bias_W))
            teachers = [WeightedTargets(weight, targets.part(at)) for weight, targets in batch.targets]
            parts.append(self._predict(logits_CW, batch.next_ids_N[at], teachers))
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    def _predict(self, logits_CW: Tensor, next_ids_C: Tensor, teachers: Sequence[WeightedTargets]) -> Predictions:
        log_q_CV = logits_CW[:, : self.objective.vocabulary_size].log_softmax(-1)
        top_C, ids_C = log_q_CV.max(-1)
        kl_C = torch.full_like(top_C, torch.nan)
        if self.measure is not None and teachers:
            by_teacher = [w * soft_losses(logits_CW, next_ids_C, targets, self.measure) for w, targets in teachers]
            kl_C = sum(by_teacher, torch.zeros_like(top_C)) / self.measure.temperature**2  # losses are scaled by T²
        return Predictions(-log_q_CV.gather(-1, next_ids_C[:, None])[:, 0], kl_C, ids_C, top_C.exp())
