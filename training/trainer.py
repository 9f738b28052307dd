"""One rank of `decant train`: build, step until the tokens are spent, evaluate, save."""

import math

import numpy as np
import torch

from logit_store.errors import StudentError
from training.batches import Cursor
from training.config import TrainConfig
from training.engine import Engine, init_process_group
from training.evaluation import Figures, evaluate
from training.feed import Feed
from training.flops import ModelFlops, model_flops
from training.models import build_student, save_tokenizer
from training.prepare import Prepared, prepare
from training.run_folder import RunFolder, writing
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
    vocabulary_size = int(prepared.source.manifest["vocabulary_size"])
    longest = max(prepared.longest, *(prefix.positions for prefix in prepared.held_out))
    model = build_student(config.student, vocabulary_size, longest, config.run.seed)
    num_parameters, flops = sum(p.numel() for p in model.parameters()), model_flops(model)
    init_process_group()
    rank = torch.distributed.get_rank()
    student = Student(model, vocabulary_size, config.loss, prepared.source.temperatures, config.student.attention)
    engine = Engine(student, prepared.engine_config)
    if rank == 0:
        run.begin(config, prepared.identity)
    cursor, figures = _train_steps(prepared, run, engine, _resume(run, engine, rank), rank, flops)
    with engine.whole_weights():
        if rank == 0:
            with writing(run.model):
                engine.module.model.save_pretrained(run.model)
                save_tokenizer(prepared.source.files(), run.model)
    if rank == 0:
        seconds = sum(line.get("seconds", 0.0) for line in run.metrics())
        progress = {"steps": cursor.step, "tokens": cursor.tokens_seen, "seconds": seconds}
        rate = cursor.tokens_seen / seconds
        run.save_result({"parameters": num_parameters, **progress, "tokens_per_s": rate, "held_out": figures})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


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


def _train_steps(
    prepared: Prepared, run: RunFolder, engine: Engine, cursor: Cursor, rank: int, flops: ModelFlops
) -> tuple[Cursor, Figures]:
    """Step until the tokens are spent: where the run stands then, and its last held-out figures."""
    config, schedule, source = prepared.config, prepared.config.schedule, prepared.source
    engine.module.train()
    mixing = engine.module.mixing
    with (
        Watcher(run, config, cursor, rank, flops, engine) as watch,
        Feed(config, source, prepared.plan, engine.world_size, rank) as feed,
    ):
        while cursor.tokens_seen < schedule.total_tokens:
            before = cursor
            step = feed.next(cursor)
            cursor = step.cursor
            mixing.tokens_seen = before.tokens_seen
            # A pure function of seed, step and rank: a resumed run needs no saved generator state.
            torch.manual_seed(int(np.random.SeedSequence([config.run.seed, cursor.step, rank]).generate_state(1)[0]))
            rate = learning_rate(schedule, cursor.tokens_seen)
            terms, norm = engine.step(step.batches, cursor.tokens_seen - before.tokens_seen, rate)
            if not prepared.plan.can_run_ahead:  # ranks must agree to the bit where the next step depends on it
                cursor = prepared.plan.paced(before, cursor, engine.same_on_all_ranks(norm))
            settings = {"lr": rate, "alpha": mixing.alpha, "temperature": mixing.last_temperature}
            settings |= {"sequence_length": step.length, "padding": step.padding, "clock": cursor.clock}
            watch.step(step, {**terms, **settings, "gradient_norm": norm})
            if not all(map(math.isfinite, terms.values())):
                rows = [prefix.row for prefix in step.prefixes]
                raise StudentError(f"the loss is not finite at step {cursor.step}; rows of the batch: {rows}")
            if _crossed(config.evaluation.every_tokens, before, cursor) and cursor.tokens_seen < schedule.total_tokens:
                watch.evaluation(cursor, evaluate(engine, source, prepared.held_out, schedule.micro_batch_tokens, rank))
            if _crossed(config.checkpoint.every_tokens, before, cursor):
                engine.save(run.checkpoints, f"step{cursor.step}")
                if rank == 0:
                    run.point_to(f"step{cursor.step}", cursor._asdict(), engine.world_size)
        figures = evaluate(engine, source, prepared.held_out, schedule.micro_batch_tokens, rank)
        watch.evaluation(cursor, figures)
    return cursor, figures


def _crossed(every: int | None, before: Cursor, after: Cursor) -> bool:
    return every is not None and before.tokens_seen // every != after.tokens_seen // every
