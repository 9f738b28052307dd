"""The front door: one command, verbs. Each verb imports its room when it is called, so that --help is instant."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

CONFIG_HELP = "YAML file"
OVERRIDES_HELP = "a.b=value: set a key of the config (values are YAML)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit code. An error of ours is one line on stderr and exit code 2."""
    arguments = _parser().parse_args(argv)
    from logit_store.errors import DecantError  # after parsing: the package behind it takes a third of a second

    try:
        return int(arguments.run(arguments) or 0)
    except DecantError as error:
        print(f"decant {arguments.verb}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"decant {arguments.verb}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="decant",
        description="Compute a teacher's soft labels once on a Ray cluster; distil many students from the store.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(verb: str, summary: str, example: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            verb, help=summary, description=summary, epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    tokenize = add("tokenize", "make token shards from a corpus", "decant tokenize configs/demo/cache.yaml")
    tokenize.set_defaults(run=_tokenize)
    cache = add("cache", "score token shards with the teacher", "decant cache configs/demo/cache.yaml targets.k=16")
    cache.set_defaults(run=_cache)
    for parser_of_config in (tokenize, cache):
        parser_of_config.add_argument("--address", help="Ray cluster to join; a local one is started without it")
    inspect = add("inspect", "show what a store holds", "decant inspect runs/demo/store --json")
    inspect.add_argument("store", help="path or URL of a token or logit store")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.set_defaults(run=_inspect)
    train = add("train", "train a student on a store", "decant train configs/demo/student-small.yaml loss.alpha=0")
    train.set_defaults(run=_train)
    for parser_of_config in (tokenize, cache, train):
        parser_of_config.add_argument("config", help=CONFIG_HELP)
        parser_of_config.add_argument("overrides", nargs="*", metavar="a.b=value", help=OVERRIDES_HELP)
    report = add("report", "compare finished runs", "decant report runs/demo/students/* --out runs/demo/report")
    report.add_argument("runs", nargs="+", metavar="RUN", help="directory of a finished `decant train`")
    report.add_argument(
        "--out", help="directory for report.html and PNGs (default: `report` beside the folder of the runs)"
    )
    report.set_defaults(run=_report)
    return parser


def _tokenize(arguments: argparse.Namespace) -> None:
    from cluster.tokenize import tokenize

    _run_cluster_verb(arguments, tokenize)


def _cache(arguments: argparse.Namespace) -> None:
    from cluster.cache import cache

    _run_cluster_verb(arguments, cache)


def _run_cluster_verb(arguments: argparse.Namespace, run: Callable[..., Any]) -> None:
    from cluster.config import CacheConfig
    from cluster.ray_cluster import in_submitted_job
    from cluster.submit import check_paths, submit_line
    from logit_store.config import load_config
    from logit_store.summary import print_summary

    overrides = list(arguments.overrides)
    if arguments.address is not None:
        overrides.append(f"cluster.address={arguments.address}")
    config = load_config(CacheConfig, arguments.config, overrides)
    check_paths(config, arguments.verb)
    store = run(config)
    print_summary(store)
    if not in_submitted_job():
        print(f"\nthe same on a running cluster:\n  {submit_line(arguments.verb, arguments.config, overrides, config)}")


def _inspect(arguments: argparse.Namespace) -> None:
    from logit_store.reader import open_store
    from logit_store.summary import print_summary

    print_summary(open_store(arguments.store), as_json=arguments.json)


def _train(arguments: argparse.Namespace) -> int:
    from training.launch import launch

    return launch(arguments.config, arguments.overrides)


def _report(arguments: argparse.Namespace) -> None:
    from training.report import report

    report(arguments.runs, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
