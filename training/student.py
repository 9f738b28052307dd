"""The student: a causal language model of transformers, with its loss inside the module that DeepSpeed owns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.config import LossConfig
from training.data import MicroBatch
from training.losses import LossSums, SparseTargets, chunked_losses, default_chunk_positions, position_losses


class Predictions(NamedTuple):
    """What evaluation needs of N positions."""

    ce_N: Tensor
    top_id_N: Tensor
    top_probability_N: Tensor


class Student(nn.Module):
    """A model and its loss. ``forward`` gives loss sums: inside one module, ZeRO-3 gathers the head for it."""

    def __init__(self, model: Any, vocabulary_size: int, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.vocabulary_size, self.loss = vocabulary_size, loss
        self.chunk = loss.chunk_positions or default_chunk_positions(model.config.get_text_config().vocab_size)

    def forward(self, batch: MicroBatch) -> LossSums | Predictions:
        """Loss sums of a micro-batch; its predictions in eval mode."""
        hidden_ND = self._hidden(batch)
        num_chunks = max(1, -(-batch.max_positions // self.chunk))
        if self.training:
            return chunked_losses(self._head, hidden_ND, batch.next_ids_N, batch.targets, num_chunks, self._losses)
        chunks = zip(hidden_ND.tensor_split(num_chunks), batch.next_ids_N.tensor_split(num_chunks), strict=True)
        parts = [self._predict(self._head(hidden), ids) for hidden, ids in chunks]
        return Predictions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _hidden(self, batch: MicroBatch) -> Tensor:
        output = self.model.get_decoder()(input_ids=batch.input_ids_BL, use_cache=False)
        return output.last_hidden_state[batch.valid_BL]

    def _head(self, hidden_ND: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden_ND)

    def _losses(self, logits_NW: Tensor, next_ids_N: Tensor, targets: SparseTargets | None) -> LossSums:
        loss = self.loss
        return position_losses(
            logits_NW, next_ids_N, targets, self.vocabulary_size, loss.alpha, loss.temperature, loss.tail
        )

    def _predict(self, logits_NW: Tensor, next_ids_N: Tensor) -> Predictions:
        log_q_NV = logits_NW[:, : self.vocabulary_size].float().log_softmax(-1)
        top_N, ids_N = log_q_NV.max(-1)
        return Predictions(-log_q_NV.gather(-1, next_ids_N[:, None])[:, 0], ids_N, top_N.exp())
