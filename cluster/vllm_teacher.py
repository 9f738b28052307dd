"""The vLLM backend: prompt log-probs of the real engine. Only this file imports vllm.

vLLM returns log-probs of the top k only, so the tail mass is what the kept entries leave of one: right to
about 1e-7 absolute, not relative. The store's header says `tail: one_minus_kept`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import TeacherConfig
from cluster.phases import Phases
from cluster.targets import Selector
from logit_store import Targets
from logit_store.errors import ConfigError, TeacherError

PADDED_ROWS = 8
"""Extra entries asked for, in case rows of a padded head beyond the vocabulary come among the first k."""

ROWS_PER_CALL = 64
"""Rows per call of the engine: flat log-probs take 28 kB per token at k = 256 before they become arrays."""


class VllmTeacher:
    """A causal language model in vLLM, with a float32 LM head (a bfloat16 head ties adjacent log-probs)."""

    def __init__(self, folder: Path, config: TeacherConfig, selector: Selector, longest: int) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(
                f"teacher.backend is vllm, but vllm cannot be imported ({error}): run `make setup`, "
                "or set teacher.backend=transformers"
            ) from error
        assert selector.targets.k
        self.vocabulary_size, self.k, self.phases = selector.vocabulary_size, selector.targets.k, Phases()
        self.batch_tokens, self.oom_splits = config.batch_tokens, 0
        self.num_logprobs = min(self.k + PADDED_ROWS, self.vocabulary_size)
        self.engine: Any = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype=config.dtype,
            max_model_len=longest + 1,  # the engine refuses a prompt as long as its context
            max_logprobs=self.num_logprobs,
            max_num_batched_tokens=max(config.batch_tokens, longest + 1),
            enable_prefix_caching=False,
            hf_overrides={"head_dtype": "float32"},
            gpu_memory_utilization=config.gpu_memory_utilization,
            disable_log_stats=True,
            seed=0,
        )

    def score(self, rows: Sequence[np.ndarray], numbers: Sequence[int]) -> list[Targets]:
        """Targets of each row of at least two token ids."""
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=self.num_logprobs, flat_logprobs=True
        )
        targets: list[Targets] = []
        for start in range(0, len(rows), ROWS_PER_CALL):
            prompts = [TokensPrompt(prompt_token_ids=row.tolist()) for row in rows[start : start + ROWS_PER_CALL]]
            outputs = self.engine.generate(prompts, params, use_tqdm=False)
            targets += [self._targets(output.prompt_logprobs) for output in outputs]
        return targets

    def close(self) -> None:
        """End the engine's process."""
        self.engine.llm_engine.engine_core.shutdown()

    def _targets(self, flat: Any) -> Targets:
        """From flat log-probs: at each position the prompt's own token first, then the top entries."""
        starts, ends = flat.start_indices[1:], flat.end_indices[1:]  # [0] is the first token: nothing predicts it
        ids = np.asarray(flat.token_ids, np.int64)
        logprobs = np.asarray(flat.logprobs, np.float32)
        parts = [self._position(ids[a:b], logprobs[a:b]) for a, b in zip(starts, ends, strict=True)]
        head_ids, head_logprobs, next_logprob, tail = (np.stack(column) for column in zip(*parts, strict=True))
        return Targets.of_heads(head_ids, head_logprobs, next_logprob, tail)

    def _position(self, ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, ...]:
        next_id, next_logprob = ids[0], logprobs[0]
        real = ids[1:] < self.vocabulary_size
        head_ids, head_logprobs = ids[1:][real], logprobs[1:][real]
        if len(head_ids) < self.k:
            raise TeacherError(
                f"{len(ids) - 1 - len(head_ids)} of the engine's top entries are rows beyond the vocabulary of "
                f"{self.vocabulary_size}: this teacher's padded rows are not trained. Use teacher.backend=transformers"
            )
        order = np.lexsort((head_ids, -head_logprobs))[: self.k]
        head_ids, head_logprobs = head_ids[order], head_logprobs[order]
        kept = np.exp(head_logprobs.astype(np.float64)).sum()
        kept += 0.0 if (head_ids == next_id).any() else np.exp(float(next_logprob))
        with np.errstate(divide="ignore"):
            tail = np.log(np.maximum(1.0 - kept, 0.0)) if self.k < self.vocabulary_size else -np.inf
        return head_ids.astype(np.int32), head_logprobs, np.float32(next_logprob), np.float32(tail)  # type: ignore[return-value]
