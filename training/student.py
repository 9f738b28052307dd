"""The student: a causal language model of transformers, with its loss inside the module that DeepSpeed owns."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.config import LossConfig
from training.data import MicroBatch
from training.head import OutputHead
from training.losses import LossSums, Objective, linear_losses
from training.losses.fused import default_chunk
from training.mixing import Mixing


class Predictions(NamedTuple):
    """What evaluation needs of N positions."""

    ce_N: Tensor
    top_id_N: Tensor
    top_probability_N: Tensor


class Student(nn.Module):
    """A model and its loss. ``forward`` gives loss sums: inside one module, ZeRO-3 gathers the head for it."""

    def __init__(self, model: Any, vocabulary_size: int, loss: LossConfig, stored: Sequence[float] = ()) -> None:
        """``stored`` are the temperatures that the labels' log-partitions are of. Raises StudentError."""
        super().__init__()
        self.model = model
        self.mixing = Mixing(loss)
        self.head = OutputHead(model)
        self.objective = Objective(
            vocabulary_size, tail=loss.tail, divergence=loss.divergence, beta=loss.beta, z_loss=loss.z_loss,
            stored=tuple(stored),
        )  # fmt: skip
        self.chunk = loss.chunk_positions

    def forward(self, batch: MicroBatch) -> LossSums | Predictions:
        """Loss sums of a micro-batch; its predictions in eval mode."""
        hidden_ND = self._hidden(batch)
        if not self.training:
            return Predictions(*self.head.apply(partial(self._predictions, batch.next_ids_N), hidden_ND))
        objective = self.objective._replace(alpha=self.mixing.alpha, temperature=self.mixing())
        return LossSums.of(self.head.apply(partial(self._losses, batch, objective), hidden_ND))

    def _hidden(self, batch: MicroBatch) -> Tensor:
        output = self.model.get_decoder()(input_ids=batch.input_ids_BL, use_cache=False)
        return output.last_hidden_state[batch.valid_BL]

    def _losses(
        self, batch: MicroBatch, objective: Objective, hidden_ND: Tensor, weight_WD: Tensor, bias_W: Tensor | None
    ) -> Tensor:
        finish, ids_N = self.head.finish, batch.next_ids_N
        return linear_losses(hidden_ND, weight_WD, bias_W, finish, ids_N, batch.targets, objective, self.chunk)

    def _predictions(
        self, next_ids_N: Tensor, hidden_ND: Tensor, weight_WD: Tensor, bias_W: Tensor | None
    ) -> tuple[Tensor, ...]:
        chunk = self.chunk or default_chunk(weight_WD)
        chunks = zip(hidden_ND.split(chunk), next_ids_N.split(chunk), strict=True)
        parts = [self._predict(nn.functional.linear(hidden, weight_WD, bias_W), ids) for hidden, ids in chunks]
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    def _predict(self, logits_NW: Tensor, next_ids_N: Tensor) -> Predictions:
        logits_NW = self.head.finish(logits_NW.float())
        log_q_NV = logits_NW[:, : self.objective.vocabulary_size].log_softmax(-1)
        top_N, ids_N = log_q_NV.max(-1)
        return Predictions(-log_q_NV.gather(-1, next_ids_N[:, None])[:, 0], ids_N, top_N.exp())
