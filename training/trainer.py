"""One rank of `decant train`: build, step until the tokens are spent, evaluate, save."""

from collections.abc import Sequence

import numpy as np
import torch

from logit_store.errors import DecantError
from training.batches import Cursor, Prefix, micro_batches
from training.checkpoints import Checkpoints, crossed
from training.config import TrainConfig
from training.data import MicroBatch, rank_batches
from training.engine import Engine, Step, any_rank, gather, process_group
from training.evaluation import evaluate
from training.models import build_student, save_tokenizer
from training.prepare import Prepared, prepare
from training.run_folder import RunFolder, writing
from training.schedules import learning_rate
from training.stop import AgreedError, StopRequest
from training.student import Student
from training.watcher import Watcher


def train(config: TrainConfig, stop: StopRequest) -> Cursor | None:
    """Run this rank to the end. Another run of the same config goes on from its newest checkpoint.

    Where any rank is asked to stop, all of them write a checkpoint after the step that they are in, and this
    returns where it stands; None when the run is finished.

    Raises ConfigError, StoreError, StudentError.
    """
    prepared = prepare(config)
    run = RunFolder(config.run.path)
    run.check(config, prepared.identity)
    if run.result() is not None:
        return None
    vocabulary_size = int(prepared.store.manifest["vocabulary_size"])
    longest = max(prepared.longest, *(prefix.positions for prefix in prepared.held_out))
    model = build_student(config.student, vocabulary_size, longest, config.run.seed)
    num_parameters = sum(p.numel() for p in model.parameters())
    with process_group() as rank:
        engine = Engine(Student(model, vocabulary_size, config.loss), prepared.engine_config)
        if rank == 0:
            run.begin(config, prepared.identity)
        checkpoints = Checkpoints(run, engine, rank, config.checkpoint.every_tokens)
        cursor = _train_steps(prepared, run, engine, checkpoints, rank, stop)
        if cursor.tokens_seen < config.schedule.total_tokens:
            return cursor
        _finish(prepared, run, engine, cursor, num_parameters, rank)
    return None


def _train_steps(
    prepared: Prepared, run: RunFolder, engine: Engine, checkpoints: Checkpoints, rank: int, stop: StopRequest
) -> Cursor:
    config, schedule = prepared.config, prepared.config.schedule
    cursor = checkpoints.resume()
    engine.module.train()
    with Watcher(run, config, cursor, rank) as watch:
        while cursor.tokens_seen < schedule.total_tokens:
            before = cursor
            prefixes, length, cursor = prepared.plan.next(cursor)
            batches, error = _read(prepared, prefixes, engine.world_size, rank)
            asked, failed = any_rank([stop.asked, error is not None], engine.device)
            if asked or failed:
                checkpoints.save(before)
                if failed:
                    _fail_together(error, before)
                return before
            # A pure function of seed, step and rank: a resumed run needs no saved generator state.
            torch.manual_seed(int(np.random.SeedSequence([config.run.seed, cursor.step, rank]).generate_state(1)[0]))
            rate = learning_rate(schedule, cursor.tokens_seen)
            step = engine.step(batches, cursor.tokens_seen - before.tokens_seen, rate)
            values = {"lr": rate, "sequence_length": length, "gradient_norm": step.gradient_norm}
            watch.step(cursor, {**step.terms, **values, "skipped": float(not step.applied)})
            if step.not_finite:
                _refuse_rows(step, prefixes, prepared, engine.world_size, cursor)
            if crossed(config.evaluation.every_tokens, before, cursor) and cursor.tokens_seen < schedule.total_tokens:
                budget = schedule.micro_batch_tokens
                watch.evaluation(cursor, evaluate(engine, prepared.store, prepared.held_out, budget, rank))
            checkpoints.save_if_due(before, cursor)
    return cursor


def _finish(prepared: Prepared, run: RunFolder, engine: Engine, cursor: Cursor, num_parameters: int, rank: int) -> None:
    """Evaluate and save the model."""
    budget = prepared.config.schedule.micro_batch_tokens
    figures = evaluate(engine, prepared.store, prepared.held_out, budget, rank)
    with engine.whole_weights():
        if rank == 0:
            with writing(run.model):
                engine.module.model.save_pretrained(run.model)
                save_tokenizer(prepared.store.files(), run.model)
    if rank == 0:
        seconds = sum(line.get("seconds", 0.0) for line in run.metrics())
        progress = {"steps": cursor.step, "tokens": cursor.tokens_seen, "seconds": seconds}
        rate = cursor.tokens_seen / seconds
        run.log({"step": cursor.step, "tokens_seen": cursor.tokens_seen, "held_out": figures})
        run.save_result({"parameters": num_parameters, **progress, "tokens_per_s": rate, "held_out": figures})


def _read(
    prepared: Prepared, prefixes: Sequence[Prefix], num_ranks: int, rank: int
) -> tuple[list[MicroBatch], DecantError | None]:
    """This rank's share of a step, or why it cannot be read: the others must not wait for this rank for ever."""
    budget, temperature = prepared.config.schedule.micro_batch_tokens, prepared.config.loss.temperature
    try:
        return list(rank_batches(prepared.store, prefixes, num_ranks, rank, budget, temperature)), None
    except DecantError as error:
        return [], error


def _fail_together(error: DecantError | None, cursor: Cursor) -> None:
    """Raise on every rank what the first failing one met."""
    first = next(found for found in gather(str(error) if error else None) if found is not None)
    raise AgreedError(f"{first}. The run is saved at step {cursor.step}: mend that, and the same command goes on")


def _refuse_rows(step: Step, prefixes: Sequence[Prefix], prepared: Prepared, num_ranks: int, cursor: Cursor) -> None:
    """Raise on every rank, with the rows of the micro-batches whose loss was not finite."""
    dealt = micro_batches(prefixes, num_ranks, prepared.config.schedule.micro_batch_tokens)
    rows = sorted(prefix.row for rank, i in step.not_finite for prefix in dealt[rank][i])
    raise AgreedError(f"the loss is not finite at step {cursor.step}; rows of the batch: {rows}")
