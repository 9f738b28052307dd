"""The front door: one command, verbs. Each verb imports its room when it is called, so that --help is instant."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

CONFIG_HELP = "YAML file"
ROWS_LEFT_OUT = 3
"""Exit code of `decant cache` where the store is finished, but some rows could not be scored."""
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
    status = add("status", "how far a job is, or how it ended", "decant status runs/demo/store --watch")
    status.add_argument("store", help="path or URL of the store that a job makes")
    status.add_argument("--watch", action="store_true", help="show it again and again, until the job ends")
    status.add_argument("--json", action="store_true", help="print JSON instead of a table")
    status.set_defaults(run=_status)
    inspect = add("inspect", "show what a store holds, or one of its rows", "decant inspect runs/demo/store --row 7")
    inspect.add_argument("store", help="path or URL of a token or logit store")
    inspect.add_argument("--row", type=int, metavar="N", help="show this row in words, a line per position")
    inspect.add_argument("--positions", metavar="A:B", help="of the row, positions A to B - 1 (default: the first 64)")
    inspect.add_argument("--top", type=int, default=3, metavar="M", help="the teacher's M most probable tokens")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of tables; of a row, everything")
    inspect.set_defaults(run=_inspect)
    export = add(
        "export", "write plain Parquet or Arrow columns", "decant export runs/demo/store --out runs/demo/plain"
    )
    export.add_argument("store", help="path or URL of a token or logit store")
    export.add_argument("--out", required=True, help="directory or URL; the same command goes on where it was killed")
    export.add_argument("--format", default="parquet", help="parquet, arrow, or huggingface: a dataset folder")
    export.add_argument("--rows", metavar="A:B", help="rows A to B - 1 (default: all)")
    export.add_argument("--split", help="only the rows of this split: train or held_out")
    export.set_defaults(run=_export)
    stats = add("stats", "figures and plots of a store", "decant stats runs/demo/store --out runs/demo/stats")
    stats.add_argument("store", help="path or URL of a token or logit store")
    stats.add_argument("--out", help="directory or URL for stats.html and PNGs (default: tables in the terminal only)")
    stats.add_argument(
        "--rows", type=int, default=2000, metavar="N", help="rows to read, evenly spaced (default: 2000)"
    )
    stats.add_argument("--json", action="store_true", help="print JSON instead of tables")
    stats.set_defaults(run=_stats)
    verify = add("verify", "prove every byte of a store", "decant verify runs/demo/store --drop-damaged")
    verify.add_argument("store", help="path or URL of a token or logit store, finished or not")
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    instead = verify.add_mutually_exclusive_group()
    instead.add_argument(
        "--drop-damaged",
        action="store_true",
        help="delete damaged shards, so that the command that made the store makes just these again",
    )
    instead.add_argument(
        "--rescore",
        type=int,
        metavar="N",
        help="instead of checking bytes, score N random rows again with the teacher and show how far labels drift",
    )
    verify.add_argument("--teacher", help="with --rescore: where the teacher is now (default: where it was)")
    verify.add_argument(
        "--trust-remote-code", action="store_true", help="with --rescore: run Python code that comes with the teacher"
    )
    verify.add_argument(
        "--pickled-weights", action="store_true", help="with --rescore: load pickle files (*.bin), which can run code"
    )
    verify.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        help="with --rescore: nats of a log-prob beyond the codec's own error (default: %(default)s)",
    )
    verify.add_argument("--seed", type=int, default=0, help="with --rescore: which rows (default: %(default)s)")
    verify.set_defaults(run=_verify)
    diff = add(
        "diff", "compare the labels of two stores", "decant diff runs/demo/store runs/again/store --tolerance 0.1"
    )
    diff.add_argument("first", help="path or URL of a store")
    diff.add_argument("second", help="path or URL of a store of the same tokens")
    diff.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        help="nats of a log-prob, mass of the tail and share of draws that may differ (default: %(default)s)",
    )
    diff.add_argument("--json", action="store_true", help="print JSON instead of a table")
    diff.set_defaults(run=_diff)
    merge = add(
        "merge", "unite the shards of one job from several stores", "decant merge east/store west/store --out store"
    )
    merge.add_argument("stores", nargs="+", metavar="STORE", help="paths or URLs of stores of one job, finished or not")
    merge.add_argument("--out", required=True, help="directory of the united store: empty, or one of this job")
    merge.set_defaults(run=_merge)
    slice_ = add("slice", "make a smaller store from a logit store", "decant slice runs/demo/store --out small --k 16")
    slice_.add_argument("store", help="path or URL of a finished logit store")
    slice_.add_argument("--out", required=True, help="directory of the new store")
    slice_.add_argument("--k", type=int, help="keep the K most probable entries of each head; the rest becomes tail")
    rows = slice_.add_mutually_exclusive_group()
    rows.add_argument("--rows", metavar="START:STOP", help="keep these rows")
    rows.add_argument("--split", choices=["train", "held_out"], help="keep the rows of this split")
    slice_.add_argument("--max-kl", type=float, help="store.codec.max_kl of the new store (default: as it was)")
    slice_.add_argument("--max-error", type=float, help="store.codec.max_error of the new store (default: as it was)")
    slice_.add_argument("--exact", action="store_true", help="store log-probs as float32")
    slice_.set_defaults(run=_slice)
    train = add("train", "train a student on a store", "decant train configs/demo/student-small.yaml loss.alpha=0")
    train.set_defaults(run=_train)
    generations = add(
        "generations",
        "train students of which each is the next one's teacher",
        "decant generations configs/demo/generations.yaml count=3",
    )
    generations.set_defaults(run=_generations)
    for parser_of_config in (tokenize, cache, train, generations):
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


def _cache(arguments: argparse.Namespace) -> int:
    from cluster.cache import cache

    store = _run_cluster_verb(arguments, cache)
    if not store.left_out:
        return 0
    print(
        f"decant cache: {len(store.left_out)} rows have no labels, because no worker survived them: "
        f"`decant inspect {store.storage.url} --json` names them",
        file=sys.stderr,
    )
    return ROWS_LEFT_OUT


def _status(arguments: argparse.Namespace) -> None:
    from cluster.job.status import status

    status(arguments.store, as_json=arguments.json, watch=arguments.watch)


def _run_cluster_verb(arguments: argparse.Namespace, run: Callable[..., Any]) -> Any:
    from cluster.config import CacheConfig
    from cluster.ray_cluster import in_submitted_job
    from cluster.submit import check_paths, submit_line
    from logit_store.config import load_config
    from logit_store.tools.summary import print_summary

    overrides = list(arguments.overrides)
    if arguments.address is not None:
        overrides.append(f"cluster.address={arguments.address}")
    config = load_config(CacheConfig, arguments.config, overrides)
    check_paths(config, arguments.verb)
    store = run(config)
    print_summary(store)
    if not in_submitted_job():
        print(f"\nthe same on a running cluster:\n  {submit_line(arguments.verb, arguments.config, overrides, config)}")
    return store


def _inspect(arguments: argparse.Namespace) -> None:
    from logit_store.errors import ConfigError
    from logit_store.reader import open_store
    from logit_store.tools.summary import print_summary

    store = open_store(arguments.store)
    if arguments.row is None:
        if arguments.positions is not None:
            raise ConfigError("--positions goes with --row N: say which row")
        print_summary(store, as_json=arguments.json)
        return
    from logit_store.tools.inspect_row import print_row

    print_row(store, arguments.row, arguments.positions, arguments.top, as_json=arguments.json)


def _export(arguments: argparse.Namespace) -> None:
    from logit_store.tools.export import export

    export(arguments.store, arguments.out, arguments.format, arguments.rows, arguments.split)


def _stats(arguments: argparse.Namespace) -> None:
    from logit_store.tools.stats import stats

    stats(arguments.store, arguments.out, arguments.rows, as_json=arguments.json)


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.rescore is not None:
        from cluster.rescore import RUNS_CODE, rescore_command

        trust = [name for name in RUNS_CODE if getattr(arguments, name)]
        return rescore_command(
            arguments.store, arguments.rescore, arguments.teacher, arguments.tolerance, arguments.seed, arguments.json,
            trust,
        )  # fmt: skip
    from logit_store.tools.damage import verify_command

    return verify_command(arguments.store, arguments.drop_damaged, arguments.json)


def _diff(arguments: argparse.Namespace) -> int:
    from logit_store.tools.diff import diff_command

    return diff_command(arguments.first, arguments.second, arguments.tolerance, arguments.json)


def _merge(arguments: argparse.Namespace) -> int:
    from logit_store.tools.merge import merge_command

    return merge_command(arguments.stores, arguments.out)


def _slice(arguments: argparse.Namespace) -> None:
    from logit_store.tools.slice import slice_command

    codec = {"max_kl": arguments.max_kl, "max_error": arguments.max_error}
    slice_command(
        arguments.store, arguments.out, arguments.k, arguments.rows or arguments.split, codec, arguments.exact
    )


def _train(arguments: argparse.Namespace) -> int:
    from training.launch import launch

    return launch(arguments.config, arguments.overrides)


def _generations(arguments: argparse.Namespace) -> int:
    from cluster.config import CacheConfig
    from logit_store import TokenStore
    from logit_store.config import load_config
    from training.config import TrainConfig
    from training.generations import GenerationsConfig, check_context, plan, show

    config = load_config(GenerationsConfig, arguments.config, arguments.overrides)
    first = load_config(CacheConfig, config.cache, config.cache_set)
    later = load_config(CacheConfig, config.cache, [*config.cache_set, *config.later_cache_set])
    train = load_config(TrainConfig, config.train, config.train_set)
    if config.count > 1:
        check_context(train, TokenStore.open(first.tokens.path))
    generations, rows_left_out = plan(config, first, later, train), 0
    for generation in generations:
        teacher = generation.cache["teacher"]["model"]
        print(f"generation {generation.number} of {config.count}: the teacher is {teacher}", flush=True)
        for verb, path in generation.write().items():
            code = main([verb, str(path)])  # what is finished is found finished
            if code == ROWS_LEFT_OUT:
                rows_left_out = code
            elif code:
                return code
    show(config, generations)
    return rows_left_out


def _report(arguments: argparse.Namespace) -> None:
    from training.report import report

    report(arguments.runs, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
