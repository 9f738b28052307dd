"""One rank of `decant train`: build, step until the tokens are spent, evaluate, save."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from logit_store.errors import DecantError
from training.checkpoints import Checkpoints, crossed
from training.config import TrainConfig
from training.curriculum.batches import Cursor
from training.curriculum.plan import end_warnings
from training.data.feed import Feed, Step
from training.engine import Engine, Update, any_rank, process_group, raise_together, same_on_all_ranks
from training.prepare import Prepared, prepare
from training.run_folder import RunFolder
from training.schedules import learning_rate
from training.stop import AgreedError, StopRequest
from training.students.export import save_student
from training.students.models import build_student, num_parameters
from training.students.student import Student
from training.watching.evaluation import Figures, evaluate, kl_measure
from training.watching.flops import model_flops
from training.watching.watcher import Watcher


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
    vocabulary_size = int(prepared.source.manifest["vocabulary_size"])
    model = build_student(config.student, vocabulary_size, prepared.longest, config.run.seed)
    sizes, flops = num_parameters(model), model_flops(model)
    source, attention = prepared.source, config.student.attention
    student = Student(model, vocabulary_size, config.loss, source.temperatures, attention, kl_measure(source))
    with process_group() as rank:
        engine = Engine(student, prepared.engine_config)
        if rank == 0:
            run.begin(config, prepared.identity)
        checkpoints = Checkpoints(run, engine, rank, config.checkpoint.every_tokens)
        cursor = checkpoints.resume()
        with Watcher(run, config, cursor, rank, flops, engine) as watch:
            cursor = _train_steps(prepared, engine, checkpoints, watch, cursor, stop)
            if cursor.tokens_seen < config.schedule.total_tokens:
                return cursor
            checkpoints.save(cursor)  # whatever ends the run from here on, its steps are not lost
            figures = _evaluate(prepared, engine, checkpoints, watch, cursor)
        warnings = [*prepared.warnings, *end_warnings(prepared.plan, cursor)]
        _save(prepared, run, engine, cursor, {**sizes, "warnings": warnings, "held_out": figures}, rank)
    return None


def _train_steps(
    prepared: Prepared, engine: Engine, checkpoints: Checkpoints, watch: Watcher, cursor: Cursor, stop: StopRequest
) -> Cursor:
    """Step until the tokens are spent, or a rank is asked to stop; where the run stands then."""
    config, schedule = prepared.config, prepared.config.schedule
    mixing, rank = engine.module.mixing, checkpoints.rank
    engine.module.train()
    with Feed(config, prepared.source, prepared.plan, engine.world_size, rank) as feed:
        while cursor.tokens_seen < schedule.total_tokens:
            before = cursor
            step, error = _read(feed, before)
            asked, failed = any_rank([stop.asked, error is not None], engine.device)
            if failed:
                with _saved_on_errors(checkpoints, before):
                    raise_together(error)
            if asked:
                checkpoints.save(before)
                return before
            assert step is not None
            cursor = step.cursor
            mixing.tokens_seen = before.tokens_seen
            # A pure function of seed, step and rank: a resumed run needs no saved generator state.
            torch.manual_seed(int(np.random.SeedSequence([config.run.seed, cursor.step, rank]).generate_state(1)[0]))
            rate = learning_rate(schedule, cursor.tokens_seen)
            update = engine.step(step.batches, cursor.tokens_seen - before.tokens_seen, rate)
            if not prepared.plan.can_run_ahead:  # ranks must agree to the bit where the next step depends on it
                cursor = prepared.plan.paced(before, cursor, same_on_all_ranks(update.gradient_norm))
            settings = {"lr": rate, "alpha": mixing.alpha, "temperature": mixing.last_temperature}
            settings |= {"clock": cursor.clock, "gradient_norm": update.gradient_norm}
            watch.step(step, {**update.terms, **settings, "skipped": float(not update.applied)})
            if update.not_finite:
                _refuse_rows(update, step)
            checkpoints.save_if_due(before, cursor)
            if crossed(config.evaluation.every_tokens, before, cursor) and cursor.tokens_seen < schedule.total_tokens:
                _evaluate(prepared, engine, checkpoints, watch, cursor)
    return cursor


def _evaluate(prepared: Prepared, engine: Engine, checkpoints: Checkpoints, watch: Watcher, cursor: Cursor) -> Figures:
    """Held-out figures at ``cursor``. Where a rank cannot read its rows, all of them save and stop."""
    budget = prepared.config.schedule.micro_batch_tokens
    with _saved_on_errors(checkpoints, cursor):
        figures = evaluate(engine, prepared.source, prepared.held_out, budget, watch.rank)
    watch.evaluation(cursor, figures)
    return figures


def _save(
    prepared: Prepared, run: RunFolder, engine: Engine, cursor: Cursor, figures: dict[str, Any], rank: int
) -> None:
    """Save the model, and then the figures, which mark the run as finished."""
    result = {**figures, **_progress(run, cursor)} if rank == 0 else {}
    with engine.whole_weights():
        if rank == 0:
            save_student(engine.module.model, prepared.config, prepared.source.stores, result, run)
    if rank == 0:
        run.save_result(result)


def _progress(run: RunFolder, cursor: Cursor) -> dict[str, Any]:
    seconds = sum(line.get("seconds", 0.0) for line in run.metrics())
    rate = cursor.tokens_seen / seconds
    return {"steps": cursor.step, "tokens": cursor.tokens_seen, "seconds": seconds, "tokens_per_s": rate}


def _read(feed: Feed, cursor: Cursor) -> tuple[Step | None, DecantError | None]:
    """This rank's share of a step, or why it cannot be read: the others must not wait for this rank for ever."""
    try:
        return feed.next(cursor), None
    except DecantError as error:
        return None, error


@contextmanager
def _saved_on_errors(checkpoints: Checkpoints, cursor: Cursor) -> Iterator[None]:
    """Save at ``cursor`` what ends on an error that all ranks know of, and say so."""
    try:
        yield
    except AgreedError as error:
        checkpoints.save(cursor)
        raise AgreedError(
            f"{error}. The run is saved at step {cursor.step}: mend that, and the same command goes on"
        ) from error


def _refuse_rows(update: Update, step: Step) -> None:
    """Raise on every rank, with the rows of the micro-batches that brought a loss or a gradient that is not finite."""
    rows = sorted(prefix.row for rank, i in update.not_finite for prefix in step.dealt[rank][i])
    is_gradient = all(map(math.isfinite, update.terms.values()))
    what = "the gradient is not finite, although the loss is," if is_gradient else "the loss is not finite"
    raise AgreedError(f"{what} at step {step.cursor.step}; rows of the batch: {rows}")
