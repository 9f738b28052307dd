"""One rank of `decant train`: build, step until the tokens are spent, evaluate, save."""

import math
from typing import Any

import numpy as np
import torch

from logit_store.errors import StudentError
from training.batches import Cursor
from training.config import TrainConfig
from training.data import rank_batches
from training.engine import Engine, init_process_group
from training.evaluation import evaluate
from training.export import save_student
from training.models import build_student, num_parameters
from training.prepare import Prepared, prepare
from training.run_folder import RunFolder
from training.schedules import learning_rate
from training.student import Student
from training.watcher import Watcher


def train(config: TrainConfig) -> None:
    """Run this rank to the end. Another run of the same config goes on from its newest checkpoint.

    Raises ConfigError, StoreError, StudentError.
    """
    prepared = prepare(config)
    run = RunFolder(config.run.path)
    run.check(config, prepared.identity)
    if run.result() is not None:
        return
    vocabulary_size = int(prepared.store.manifest["vocabulary_size"])
    model = build_student(config.student, vocabulary_size, prepared.longest, config.run.seed)
    sizes = num_parameters(model)
    init_process_group()
    rank = torch.distributed.get_rank()
    engine = Engine(Student(model, vocabulary_size, config.loss), prepared.engine_config)
    if rank == 0:
        run.begin(config, prepared.identity)
    cursor = _train_steps(prepared, run, engine, _resume(run, engine, rank), rank)
    figures = evaluate(engine, prepared.store, prepared.held_out, config.schedule.micro_batch_tokens, rank)
    result = {**sizes, **_progress(run, cursor), "held_out": figures} if rank == 0 else {}
    with engine.whole_weights():
        if rank == 0:
            save_student(engine.module.model, config, [prepared.store], result, run)
    if rank == 0:
        run.log({"step": cursor.step, "tokens_seen": cursor.tokens_seen, "held_out": figures})
        run.save_result(result)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _progress(run: RunFolder, cursor: Cursor) -> dict[str, Any]:
    seconds = sum(line.get("seconds", 0.0) for line in run.metrics())
    rate = cursor.tokens_seen / seconds
    return {"steps": cursor.step, "tokens": cursor.tokens_seen, "seconds": seconds, "tokens_per_s": rate}


def _resume(run: RunFolder, engine: Engine, rank: int) -> Cursor:
    pointer = engine.same_on_all_ranks(run.checkpoint() if rank == 0 else None)
    cursor = Cursor(**pointer["cursor"]) if pointer else Cursor()
    if pointer:
        if pointer["ranks"] != engine.world_size:
            raise StudentError(
                f"the checkpoint in {run.path} was made by {pointer['ranks']} ranks, and these are "
                f"{engine.world_size}: go on with launcher.ranks={pointer['ranks']}"
            )
        engine.load(run.checkpoints, pointer["tag"])
    if rank == 0:
        run.rewind(cursor.step)
    torch.distributed.barrier()
    return cursor


def _train_steps(prepared: Prepared, run: RunFolder, engine: Engine, cursor: Cursor, rank: int) -> Cursor:
    config, schedule = prepared.config, prepared.config.schedule
    engine.module.train()
    with Watcher(run, config, cursor, rank) as watch:
        while cursor.tokens_seen < schedule.total_tokens:
            before = cursor
            prefixes, length, cursor = prepared.plan.next(cursor)
            budget, temperature = schedule.micro_batch_tokens, config.loss.temperature
            batches = list(rank_batches(prepared.store, prefixes, engine.world_size, rank, budget, temperature))
            # A pure function of seed, step and rank: a resumed run needs no saved generator state.
            torch.manual_seed(int(np.random.SeedSequence([config.run.seed, cursor.step, rank]).generate_state(1)[0]))
            rate = learning_rate(schedule, cursor.tokens_seen)
            terms, norm = engine.step(batches, cursor.tokens_seen - before.tokens_seen, rate)
            watch.step(cursor, {**terms, "lr": rate, "sequence_length": length, "gradient_norm": norm})
            if not all(map(math.isfinite, terms.values())):
                rows = [prefix.row for prefix in prefixes]
                raise StudentError(f"the loss is not finite at step {cursor.step}; rows of the batch: {rows}")
            if _crossed(config.evaluation.every_tokens, before, cursor) and cursor.tokens_seen < schedule.total_tokens:
                watch.evaluation(cursor, evaluate(engine, prepared.store, prepared.held_out, budget, rank))
            if _crossed(config.checkpoint.every_tokens, before, cursor):
                engine.save(run.checkpoints, f"step{cursor.step}")
                if rank == 0:
                    run.point_to(f"step{cursor.step}", cursor._asdict(), engine.world_size)
    return cursor


def _crossed(every: int | None, before: Cursor, after: Cursor) -> bool:
    return every is not None and before.tokens_seen // every != after.tokens_seen // every
