"""The transformers backend: rows of equal length together, the LM head in chunks with the model's own code."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cluster.config import TeacherConfig
from cluster.job.phases import Phases
from cluster.memory import is_out_of_memory
from cluster.teachers.causal_model import load_model
from cluster.teachers.targets import CHUNK_BYTES, Selector, chunk_positions
from logit_store import Targets
from logit_store.errors import TeacherError

T = TypeVar("T")


class TransformersTeacher:
    """A causal language model of transformers, scoring on one device, or on several with ``device_map``."""

    def __init__(self, folder: Path, config: TeacherConfig, selector: Selector, device: str = "cpu") -> None:
        self.config, self.selector = config, selector
        self.phases, self.batch_tokens = Phases(), config.batch_tokens
        self.oom_splits = 0
        """How often memory ran out, and a batch, or a chunk of its positions, was halved."""
        self._no_room = ""
        self.model: Any = load_model(folder, config, device)
        self.decoder = self.model.get_decoder()
        self.run_decoder = torch.compile(self.decoder, dynamic=True) if config.compile else self.decoder
        embedding = self.model.get_input_embeddings().weight
        # Weights that device_map left on the CPU or on disk are "meta" between uses; their inputs may be anywhere.
        self.device = torch.device(device) if embedding.device.type == "meta" else embedding.device
        self.chunk = chunk_positions(self.model.get_output_embeddings().weight.shape[0], CHUNK_BYTES[self.device.type])
        self._probe()

    @torch.inference_mode()
    def score(self, rows: Sequence[np.ndarray], numbers: Sequence[int]) -> list[Targets]:
        """Targets of each row of at least two token ids; ``numbers`` are the rows' numbers in the store.

        Raises TeacherError where a row does not fit into memory by itself.
        """
        scored: dict[int, Targets] = {}
        for members in equal_length_batches([len(row) for row in rows], self.batch_tokens):
            ids_BT = torch.from_numpy(np.stack([rows[i] for i in members]).astype(np.int64)).to(self.device)
            numbers_B = torch.tensor([numbers[i] for i in members], device=self.device)
            scored |= zip(members, self._score_batch(ids_BT, numbers_B), strict=True)
        return [scored[i] for i in range(len(rows))]

    def close(self) -> None:
        """Nothing was started."""

    def _score_batch(self, ids_BT: Tensor, numbers_B: Tensor) -> list[Targets]:
        """Targets of a batch, of its halves where it does not fit into memory. The next batch is tried whole again: an
        accident decides nothing about what comes after it.
        """
        num_rows, num_positions = ids_BT.shape[0], ids_BT.shape[1] - 1
        with self._measured("forward"):
            hidden_ND = self._within_memory(lambda: self._hidden(ids_BT)[:, :-1].flatten(0, 1))
        if hidden_ND is not None:
            with self._measured("targets"):
                parts = self._targets(hidden_ND, ids_BT, numbers_B)
                if parts is not None:
                    return list(Targets.join(parts).split([num_positions] * num_rows))
        if num_rows > 1:
            del hidden_ND
            halves = zip(ids_BT.tensor_split(2), numbers_B.tensor_split(2), strict=True)
            return [targets for ids, numbers in halves for targets in self._score_batch(ids, numbers)]
        raise TeacherError(
            f"a row of {ids_BT.shape[1]} tokens does not fit into memory, even with the LM head one position at a time "
            f"({self._no_room}): use a smaller tokens.window, a smaller teacher.dtype or a larger machine"
        )

    def _targets(self, hidden_ND: Tensor, ids_BT: Tensor, numbers_B: Tensor) -> list[Targets] | None:
        """Targets of a batch's positions, in parts; None where there is no room for a single one."""
        num_rows, num_positions = ids_BT.shape[0], ids_BT.shape[1] - 1
        rows_N = numbers_B.repeat_interleave(num_positions)
        positions_N = torch.arange(num_positions, device=self.device).repeat(num_rows)
        columns = (hidden_ND, ids_BT[:, 1:].flatten(), rows_N, positions_N)
        waiting = deque(zip(*(column.split(self.chunk) for column in columns), strict=True))
        parts = []
        while waiting:
            chunk = waiting.popleft()
            part = self._within_memory(partial(self._select, *chunk))
            if part is not None:
                parts.append(part)
            elif len(chunk[0]) > 1:
                first, second = zip(*(column.tensor_split(2) for column in chunk), strict=True)
                waiting.extendleft((second, first))
            else:
                return None
        return parts

    def _within_memory(self, work: Callable[[], T]) -> T | None:
        """What ``work`` gives; None, counted as a split, where memory ran out."""
        try:
            return work()
        except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
            if not is_out_of_memory(error):
                raise
            self._no_room = " ".join(str(error).split())
        # Outside of the handler, whose traceback holds on to the tensors of the failed attempt.
        self.oom_splits += 1
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return None

    def _select(self, hidden_ND: Tensor, *columns: Tensor) -> Targets:
        logits_NW = self._head(hidden_ND)
        return self.selector.select(logits_NW, *(column.to(logits_NW.device) for column in columns))

    @contextmanager
    def _measured(self, phase: str) -> Iterator[None]:
        """Count the block as ``phase``, to the end of its work on a GPU."""
        with self.phases.measure(phase):
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()

    def _hidden(self, ids_BT: Tensor) -> Tensor:
        output = self.run_decoder(input_ids=ids_BT, use_cache=False)
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
        """Refuse a model whose chunked logits are not its own, or whose positions see the tokens after them. A row is
        scored as well: what that cannot do here is said before there is any work.
        """
        ids_1T = torch.arange(8, device=self.device)[None] % self.selector.vocabulary_size
        self._score_batch(ids_1T, torch.zeros(1, dtype=torch.long, device=self.device))
        self.phases.take()
        own_TW = self.model(input_ids=ids_1T, use_cache=False).logits[0].float()
        chunked_TW = torch.cat([self._head(h) for h in self._hidden(ids_1T)[0].split(3)]).float()
        other_ids_1T = torch.cat([ids_1T[:, :-1], ids_1T[:, :1]], 1)
        other_TW = self.model(input_ids=other_ids_1T, use_cache=False).logits[0].float()
        # One unit in the last place of the scoring dtype, for matrix products of other shapes, times 8.
        allowed = 8 * torch.finfo(getattr(torch, self.config.dtype)).eps * max(1.0, float(own_TW.abs().max()))
        for what, error_TW in (
            ("logits computed in chunks differ from the model's own", own_TW - chunked_TW.to(own_TW.device)),
            ("logits differ with a token that comes after them", (own_TW - other_TW)[:-1]),
        ):
            if not (error := float(error_TW.abs().max())) <= allowed:
                raise TeacherError(
                    f"{type(self.model).__name__}: {what} by {error:.2g} (allowed: {allowed:.2g}). This architecture "
                    "is not supported by the transformers backend"
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
    original = vars(module).get("forward")
    module.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        if original is None:  # the class's own
            del module.forward
        else:
            module.forward = original
