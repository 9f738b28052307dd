"""The transformers backend: rows of equal length together, the LM head in chunks with the model's own code."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.config import TeacherConfig
from cluster.phases import Phases
from cluster.targets import Selector, chunk_positions
from logit_store import Targets
from logit_store.errors import TeacherError


class TransformersTeacher:
    """A causal language model of transformers, scoring on one device."""

    def __init__(self, folder: Path, config: TeacherConfig, selector: Selector, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a worker's bars would land in the driver's terminal
        self.config, self.selector, self.device = config, selector, device
        self.phases, self.batch_tokens, self.oom_splits = Phases(), config.batch_tokens, 0
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, config.dtype))
        self.model.to(self.device).eval()
        self.decoder = self.model.get_decoder()
        width = self.model.get_output_embeddings().weight.shape[0]
        self.chunk = chunk_positions(width)
        self._probe()

    @torch.inference_mode()
    def score(self, rows: Sequence[np.ndarray], numbers: Sequence[int]) -> list[Targets]:
        """Targets of each row of at least two token ids; ``numbers`` are the rows' numbers in the store."""
        scored: dict[int, Targets] = {}
        for members in equal_length_batches([len(row) for row in rows], self.batch_tokens):
            ids_BT = torch.from_numpy(np.stack([rows[i] for i in members]).astype(np.int64)).to(self.device)
            numbers_B = torch.tensor([numbers[i] for i in members], device=self.device)
            scored |= zip(members, self._score_batch(ids_BT, numbers_B), strict=True)
        return [scored[i] for i in range(len(rows))]

    def close(self) -> None:
        """Nothing was started."""

    def _score_batch(self, ids_BT: Tensor, numbers_B: Tensor) -> list[Targets]:
        num_rows, num_tokens = ids_BT.shape
        hidden_BTD = self._hidden(ids_BT)
        hidden_ND = hidden_BTD[:, :-1].reshape(num_rows * (num_tokens - 1), -1)
        next_ids_N = ids_BT[:, 1:].reshape(-1)
        rows_N = numbers_B.repeat_interleave(num_tokens - 1)
        positions_N = torch.arange(num_tokens - 1, device=self.device).repeat(num_rows)
        chunks = [slice(start, start + self.chunk) for start in range(0, len(hidden_ND), self.chunk)]
        parts = [
            self.selector.select(self._head(hidden_ND[at]), next_ids_N[at], rows_N[at], positions_N[at])
            for at in chunks
        ]
        whole = Targets(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        return [Targets(*row) for row in zip(*(np.split(column, num_rows) for column in whole), strict=True)]

    def _hidden(self, ids_BT: Tensor) -> Tensor:
        output = self.decoder(input_ids=ids_BT, use_cache=False)
        self.output_type = type(output)
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def _head(self, hidden_ND: Tensor) -> Tensor:
        """Logits of the hidden states. The model's own forward runs, with its decoder standing still: so
        soft-capping, logit scales and whatever else a model does after its head are right by construction.
        """
        ids_1N = torch.zeros(1, len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
        with _returning(self.decoder, self.output_type(last_hidden_state=hidden_ND[None])):
            logits_NW: Tensor = self.model(input_ids=ids_1N, use_cache=False).logits[0]
        return logits_NW

    @torch.inference_mode()
    def _probe(self) -> None:
        """Refuse a model whose chunked logits are not its own."""
        ids_1T = torch.arange(8, device=self.device)[None] % self.selector.vocabulary_size
        own_TW = self.model(input_ids=ids_1T, use_cache=False).logits[0].float()
        chunked_TW = torch.cat([self._head(h) for h in self._hidden(ids_1T)[0].split(3)]).float()
        error = float((own_TW - chunked_TW).abs().max())
        # One unit in the last place of the scoring dtype, for matrix products of other shapes, times 8.
        allowed = 8 * torch.finfo(getattr(torch, self.config.dtype)).eps * max(1.0, float(own_TW.abs().max()))
        if not error <= allowed:
            raise TeacherError(
                f"{type(self.model).__name__}: logits computed in chunks differ from the model's own by {error:.2g} "
                f"(allowed: {allowed:.2g}). This architecture is not supported by the transformers backend"
            )


def equal_length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows in batches of one length each, at most ``batch_tokens`` tokens (or one row), longest first.

    A pure function of the shard and the config: padding, and whatever else a batch depends on, moves labels.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(lengths):
        by_length[length].append(i)
    for length in sorted(by_length, reverse=True):
        rows_per_batch = max(1, batch_tokens // length)
        members = by_length[length]
        yield from (members[start : start + rows_per_batch] for start in range(0, len(members), rows_per_batch))


@contextmanager
def _returning(module: torch.nn.Module, output: Any) -> Iterator[None]:
    """Within the block, ``module`` computes nothing and returns ``output``."""
    original = module.forward
    module.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        module.forward = original
