"""One rank: `deepspeed --module training train CONFIG [a.b=c …]`, or torchrun, or nothing but python."""

import argparse
import logging
import sys

from logit_store.config import load_config
from logit_store.errors import DecantError
from training.config import TrainConfig


def main() -> int:
    """Run this rank; its exit code. Rank 0 speaks for all."""
    parser = argparse.ArgumentParser(prog="training")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment says it too")
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train")
    train.add_argument("config")
    train.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()

    from training.trainer import rank_from_environment, train as run_rank  # isort: skip

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        run_rank(load_config(TrainConfig, arguments.config, arguments.overrides))
    except DecantError as error:
        if rank_from_environment() == 0:
            print(f"decant train: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
