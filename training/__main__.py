"""One rank: `deepspeed --module training train CONFIG [a.b=c …]`, or torchrun, or nothing but python."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from logit_store.config import load_config
from logit_store.errors import DecantError
from training.config import TrainConfig
from training.stop import AgreedError, StopRequest


def main() -> int:
    """Run this rank; its exit code."""
    parser = argparse.ArgumentParser(prog="training")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment says it too")
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train")
    train.add_argument("config")
    train.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with StopRequest() as stop:  # first of all: importing torch takes seconds
        return _train(arguments.config, arguments.overrides, stop)


def _train(config: str, overrides: Sequence[str], stop: StopRequest) -> int:
    import torch

    from training.trainer import train

    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        stopped = train(load_config(TrainConfig, config, overrides), stop)
    except DecantError as error:
        # What is wrong with the config is wrong on every rank, and what all agreed on too; the rest one alone may see.
        alone = torch.distributed.is_initialized() and not isinstance(error, AgreedError)
        if first or alone:
            print(f"decant train: error: {error}", file=sys.stderr)
        return 2
    if stopped is not None and first:
        place = f"step {stopped.step} ({stopped.tokens_seen:,} tokens)"
        print(f"decant train: stopped at {place}, which is saved: the same command goes on from there", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
