"""The student: a causal language model of transformers, with its loss inside the module that DeepSpeed owns."""

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from training.attention import VARLEN, flatten
from training.config import LossConfig
from training.data import MicroBatch
from training.losses import (
    LossSums,
    WeightedTargets,
    chunked_losses,
    default_chunk_positions,
    forward_kl,
    position_losses,
)


class Predictions(NamedTuple):
    """What evaluation needs of N positions."""

    ce_N: Tensor
    kl_N: Tensor
    """KL(teacher ‖ student) at T = 1, with the tail as the run's loss treats it; NaN without labels."""
    top_id_N: Tensor
    top_probability_N: Tensor


class Student(nn.Module):
    """A model and its loss. ``forward`` gives loss sums: inside one module, ZeRO-3 gathers the head for it."""

    def __init__(
        self, model: Any, vocabulary_size: int, loss: LossConfig, attention: Literal["padded", "varlen"] = "padded"
    ) -> None:
        super().__init__()
        self.attention = attention
        self.model = model
        self.vocabulary_size, self.loss = vocabulary_size, loss
        if attention == "varlen":
            model.set_attn_implementation(VARLEN)
        self.chunk = loss.chunk_positions or default_chunk_positions(model.config.get_text_config().vocab_size)

    def forward(self, batch: MicroBatch) -> LossSums | Predictions:
        """Loss sums of a micro-batch; its predictions in eval mode."""
        hidden_ND = self._hidden(batch)
        num_chunks = max(1, -(-batch.max_positions // self.chunk))
        if self.training:
            return chunked_losses(self._head, hidden_ND, batch.next_ids_N, batch.targets, num_chunks, self._losses)
        bounds = [len(hidden_ND) * i // num_chunks for i in range(num_chunks + 1)]
        parts = []
        for start, stop in pairwise(bounds):
            labels = tuple(teacher.part(start, stop) for teacher in batch.targets)
            parts.append(self._predict(self._head(hidden_ND[start:stop]), batch.next_ids_N[start:stop], labels))
        return Predictions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """States of the valid positions. No sequence sees another, nor its padding."""
        if self.attention == "varlen":
            flat = flatten(batch)
            return self.model.get_decoder()(**flat.arguments(), use_cache=False).last_hidden_state[0][flat.valid_S]
        output = self.model.get_decoder()(input_ids=batch.input_ids_BL, use_cache=False)
        return output.last_hidden_state[batch.valid_BL]

    def _head(self, hidden_ND: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden_ND)

    def _losses(self, logits_NW: Tensor, next_ids_N: Tensor, teachers: tuple[WeightedTargets, ...]) -> LossSums:
        """The weighted mean of every teacher's loss: cross-entropy, the same in each, stays as it is."""
        loss, size = self.loss, self.vocabulary_size
        sums = [
            LossSums(*(weight * term for term in position_losses(
                logits_NW, next_ids_N, targets, size, loss.alpha, loss.temperature, loss.tail
            )))
            for weight, targets in teachers or ((1.0, None),)
        ]  # fmt: skip
        return sums[0] if len(sums) == 1 else LossSums(*(torch.stack(terms).sum() for terms in zip(*sums, strict=True)))

    def _predict(self, logits_NW: Tensor, next_ids_N: Tensor, teachers: tuple[WeightedTargets, ...]) -> Predictions:
        log_q_NV = logits_NW[:, : self.vocabulary_size].float().log_softmax(-1)
        top_N, ids_N = log_q_NV.max(-1)
        kl_N = torch.zeros_like(top_N) if teachers else torch.full_like(top_N, torch.nan)
        for weight, targets in teachers:
            kl_N += weight * forward_kl(log_q_NV, targets, next_ids_N, 1.0, self.loss.tail)
        return Predictions(-log_q_NV.gather(-1, next_ids_N[:, None])[:, 0], kl_N, ids_N, top_N.exp())
