"""The store beside the plain ways to keep soft labels: bytes, speed, latency, memory, in one run on the same labels.

    python -m tests.bench.store            # measures, prints tables, writes docs/benchmarks/store.csv

Labels are synthetic (V = 151,936, rows of 512 tokens, see synthetic.py) and, where `make demo` has been run, the demo
teacher's (scored again at k = 128 with the exact codec). Beside the store: Arrow IPC with int32 ids and float16
log-probs, and Parquet with the same columns, both with zstd, a row per batch. All three keep input ids, next token and
tail; the plain two verify nothing. "1" and "2" are processes; "2" is the sum of both.
"""

import csv
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logit_store import LogitRow, LogitStore, Targets, TokenRow
from logit_store.shard import split_rows
from logit_store.tools.slice import cut
from tests.bench.machine import about
from tests.store.made import write_store

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "docs" / "benchmarks" / "store.csv"
WORK = ROOT / "runs" / "bench"
V, T, NUM_ROWS = 151_936, 512, 32
KS = (16, 32, 64, 128)
TOP_P, MOST = 0.95, 128
THRESHOLD = 0.044
TARGETS = (*(f"top_k {k}" for k in KS), f"top_p {TOP_P}", f"threshold {THRESHOLD}")


class Labels(NamedTuple):
    """Rows of one kind of target."""

    source: str
    targets: str
    vocabulary_size: int
    rows: list[LogitRow]

    @property
    def positions(self) -> int:
        return sum(len(row.targets.next_logprob_P) for row in self.rows)


# ---- labels


def synthetic_rows() -> dict[str, list[LogitRow]]:
    """Synthetic labels by kind of target, made once and kept below runs/bench."""
    path = WORK / f"synthetic-{NUM_ROWS}.pickle"
    if not path.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        print(f"making synthetic labels ({NUM_ROWS} rows): some minutes, once")
        path.write_bytes(pickle.dumps(_synthetic_rows()))
    found: dict[str, list[LogitRow]] = pickle.loads(path.read_bytes())
    return found


def _synthetic_rows() -> dict[str, list[LogitRow]]:
    import torch

    from tests.bench.synthetic import dense_logprobs

    rng = torch.Generator().manual_seed(1)
    parts: dict[str, list[Targets]] = {targets: [] for targets in TARGETS}
    next_ids: list[np.ndarray] = []
    for logprobs_NV in dense_logprobs(NUM_ROWS * (T - 1), V, seed=0):
        next_N1 = torch.multinomial(logprobs_NV.exp(), 1, generator=rng)
        next_ids.append(next_N1[:, 0].numpy().astype(np.int32))
        top_N, ids_N = logprobs_NV.topk(MOST, dim=-1)
        for k in KS:
            parts[f"top_k {k}"].append(_targets(logprobs_NV, next_N1, top_N, ids_N, np.full(len(top_N), k)))
        before_N = (top_N.exp().cumsum(-1) - top_N.exp()).numpy()
        parts[f"top_p {TOP_P}"].append(_targets(logprobs_NV, next_N1, top_N, ids_N, (before_N < TOP_P).sum(1)))
        counts = (top_N.exp() >= THRESHOLD).sum(-1).numpy()
        parts[f"threshold {THRESHOLD}"].append(_targets(logprobs_NV, next_N1, top_N, ids_N, counts, rng))
    ids = np.concatenate(next_ids).reshape(NUM_ROWS, T - 1)
    first = np.zeros((NUM_ROWS, 1), np.int32)
    tokens = [TokenRow(i, "train", row) for i, row in enumerate(np.concatenate([first, ids], axis=1))]
    return {
        kind: list(split_rows(tokens, Targets(*(np.concatenate(column) for column in zip(*targets, strict=True)))))
        for kind, targets in parts.items()
    }


def _targets(
    logprobs_NV: Any, next_N1: Any, top_NK: Any, ids_NK: Any, counts_N: np.ndarray, draw: Any = None
) -> Targets:
    """Heads of the first ``counts_N`` of the top ids; with ``draw``, systematic samples of the rest."""
    import torch

    taken_NK = np.arange(top_NK.shape[1]) < counts_N[:, None]
    head = torch.where(torch.from_numpy(taken_NK), ids_NK, ids_NK[:, :1])  # a free place repeats the first id
    rest_NV = logprobs_NV.scatter(-1, head, -torch.inf)
    for i in np.flatnonzero(counts_N == 0).tolist():
        rest_NV[i] = logprobs_NV[i]
    draws: list[np.ndarray] = []
    if draw is not None:
        for p_V in rest_NV.exp().double():
            tail, m = float(p_V.sum()), int(np.ceil(float(p_V.sum()) / THRESHOLD))
            places = (torch.arange(m) + torch.rand(1, generator=draw)) * (tail / max(m, 1))
            draws.append(torch.searchsorted(p_V.cumsum(0), places.double(), right=True).clamp(max=V - 1).numpy())
    tail_N = rest_NV.scatter(-1, next_N1, -torch.inf).logsumexp(-1).numpy()
    n, none = len(counts_N), np.zeros((len(counts_N), 0), np.float32)
    return Targets(
        counts_N.astype(np.int32), ids_NK.numpy()[taken_NK].astype(np.int32), top_NK.numpy()[taken_NK],
        logprobs_NV.gather(-1, next_N1)[:, 0].numpy(), tail_N, none, none,
        np.array([len(d) for d in draws] or [0] * n, np.int32), np.concatenate(draws or [np.zeros(0)]).astype(np.int32),
    )  # fmt: skip


def demo_rows() -> Iterator[Labels]:
    """Real labels: the demo's teacher at k = 128, cut to each smaller k."""
    if not (ROOT / "runs" / "demo" / "teacher" / "model").exists():
        print("runs/demo has no teacher (make demo): real labels are left out")
        return
    path = WORK / "demo-exact"
    options = [f"store.path={path}", f"tokens.path={WORK / 'demo-tokens'}", "store.codec.kind=exact", "targets.k=128"]
    for verb in ("tokenize", "cache"):
        command = [sys.executable, "-m", "cluster", verb, "configs/demo/cache.yaml", *options]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    store = LogitStore.open(str(path))
    rows = [store[i] for i in range(0, len(store), max(1, len(store) // 120))]
    for k in KS:
        cut = [cut(row, k, []) for row in rows if len(row.targets.next_logprob_P)]
        yield Labels("demo teacher", f"top_k {k}", store.manifest["vocabulary_size"], cut)


# ---- ways to keep them: each writes rows to a folder and gives back ids, log-probs of row i


def write_decant(folder: Path, labels: Labels) -> None:
    write_store(str(folder), [labels.rows], vocabulary_size=labels.vocabulary_size, temperatures=[])


def open_decant(folder: Path) -> Callable[[int], Any]:
    store = LogitStore.open(str(folder))

    def read(i: int) -> Any:
        targets = store[i].targets
        return targets.padded_heads(int(targets.head_counts_P.max(initial=0)))

    return read


def _plain(labels: Labels) -> Iterator[pa.RecordBatch]:
    """A row per batch: int32 ids, float16 log-probs, float32 next and tail."""
    for tokens, targets in labels.rows:
        ends = pa.array(np.concatenate([[0], np.cumsum(targets.head_counts_P)]), pa.int32())
        draws = pa.array(np.concatenate([[0], np.cumsum(targets.sampled_counts_P)]), pa.int32())
        columns = {
            "input_ids": pa.array(tokens.input_ids_T),
            "head_ids": pa.ListArray.from_arrays(ends, pa.array(targets.head_ids_N)),
            "head_logprobs": pa.ListArray.from_arrays(ends, pa.array(targets.head_logprobs_N.astype(np.float16))),
            "next_logprob": pa.array(targets.next_logprob_P),
            "tail_logmass": pa.array(targets.tail_logmass_P),
            "sampled_ids": pa.ListArray.from_arrays(draws, pa.array(targets.sampled_ids_M)),
        }
        lists = {
            name: pa.ListArray.from_arrays(pa.array([0, len(column)], pa.int32()), column)
            for name, column in columns.items()
        }
        yield pa.record_batch(lists)


def _heads(batch: Any, i: int) -> Any:
    """Ids and log-probs of row ``i``, as [P, K] where all heads are as wide."""
    ids, logprobs = (batch[name][i].values for name in ("head_ids", "head_logprobs"))
    width = len(ids.flatten()) // max(len(ids), 1)
    flat_ids, flat = ids.flatten().to_numpy(), logprobs.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if (np.diff(ids.offsets.to_numpy()) == width).all():
        return flat_ids.reshape(-1, width), flat.reshape(-1, width)
    counts = np.diff(ids.offsets.to_numpy())
    taken = np.arange(counts.max()) < counts[:, None]
    out_ids, out = np.zeros(taken.shape, np.int32), np.full(taken.shape, -np.inf, np.float32)
    out_ids[taken], out[taken] = flat_ids, flat
    return out_ids, out


def write_arrow(folder: Path, labels: Labels) -> None:
    folder.mkdir(parents=True)
    batches = list(_plain(labels))
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3))
    with pa.ipc.new_file(str(folder / "rows.arrow"), batches[0].schema, options=options) as file:
        for batch in batches:
            file.write_batch(batch)


def open_arrow(folder: Path) -> Callable[[int], Any]:
    file = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow")))
    return lambda i: _heads(file.get_batch(i), 0)


def write_parquet(folder: Path, labels: Labels) -> None:
    folder.mkdir(parents=True)
    table = pa.Table.from_batches(list(_plain(labels)))
    pq.write_table(table, folder / "rows.parquet", compression="zstd", compression_level=3, row_group_size=1)


def open_parquet(folder: Path) -> Callable[[int], Any]:
    file = pq.ParquetFile(folder / "rows.parquet", memory_map=True)
    return lambda i: _heads(file.read_row_group(i, columns=["head_ids", "head_logprobs"]).to_batches()[0], 0)


WAYS: dict[str, tuple[Callable[[Path, Labels], None], Callable[[Path], Callable[[int], Any]]]] = {
    "decant": (write_decant, open_decant),
    "Arrow f16 + zstd": (write_arrow, open_arrow),
    "Parquet f16 + zstd": (write_parquet, open_parquet),
}


# ---- measurements


def _encode(way: str, labels_file: Path, folder: Path) -> float:
    """Seconds to write the labels once: of four times as many rows, since a shard of a few megabytes is no shard."""
    labels = _labels(labels_file)
    labels = labels._replace(rows=labels.rows * 4)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        started = time.perf_counter()
        WAYS[way][0](Path(memory) / "rows", labels)
        return (time.perf_counter() - started) / 4


def _decode(way: str, labels_file: Path, folder: Path) -> float:
    """Seconds to read every row once, of a file that is open."""
    num_rows, read = len(_labels(labels_file).rows), WAYS[way][1](folder)
    read(num_rows - 1)
    started = time.perf_counter()
    for i in range(num_rows):
        read(i)
    return time.perf_counter() - started


@lru_cache(maxsize=1)
def _labels(path: Path) -> Labels:
    labels: Labels = pickle.loads(path.read_bytes())
    return labels


def _repeat(work: Callable[..., float], arguments: tuple[Any, ...]) -> list[float]:
    """Seconds of each of some runs, after one that warms up, for a second or more."""
    work(*arguments)
    times: list[float] = []
    while len(times) < 5 or sum(times) < 1.0:
        times.append(work(*arguments))
    return times


def rates(
    work: Callable[..., float], pool: ProcessPoolExecutor, positions: int, *arguments: Any
) -> tuple[float, float]:
    """Positions per second of one process, and of two that do the same at once (medians of their runs)."""
    alone = np.median(pool.submit(_repeat, work, arguments).result())
    both = [future.result() for future in [pool.submit(_repeat, work, arguments) for _ in range(2)]]
    return positions / float(alone), sum(positions / float(np.median(times)) for times in both)


def latency_ms(read: Callable[[int], Any], num_rows: int) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of reading one random row of a warm file."""
    rng = np.random.default_rng(0)
    times = []
    for i in np.tile(rng.permutation(num_rows), 300 // num_rows + 1).tolist():  # never a block that is still decoded
        started = time.perf_counter()
        read(i)
        times.append((time.perf_counter() - started) * 1e3)
    p20, p50, p80 = np.percentile(times[10:], [20, 50, 80]).tolist()
    return p20, p50, p80


def measure(labels: Labels, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """One line per way to keep these labels."""
    lines = []
    labels_file = WORK / f"{labels.source}-{labels.targets}.pickle".replace(" ", "_")
    labels_file.write_bytes(pickle.dumps(labels))
    for way, (write, open_) in WAYS.items():
        folder = WORK / "stores" / f"{labels.source}-{labels.targets}-{way}".replace(" ", "_")
        if folder.exists():
            subprocess.run(["rm", "-r", str(folder)], check=True)
        write(folder, labels)
        size = sum(path.stat().st_size for path in folder.rglob("*.arrow*") if path.parent.name != "tokenizer")
        size += sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        line: dict[str, Any] = {"labels": labels.source, "targets": labels.targets, "way": way}
        line["entries"] = (
            sum(len(r.targets.head_ids_N) + len(r.targets.sampled_ids_M) for r in labels.rows) / labels.positions
        )
        line["bytes_per_token"] = size / labels.positions
        for name, work in (("encode", _encode), ("decode", _decode)):
            line[f"{name}_1"], line[f"{name}_2"] = rates(work, pool, labels.positions, way, labels_file, folder)
        line["row_ms_p20"], line["row_ms"], line["row_ms_p80"] = latency_ms(open_(folder), len(labels.rows))
        if way == "decant":
            store = LogitStore.open(str(folder))
            line |= {"mean_kl": store.shards.columns["mean_kl"][0], "max_error": store.shards.columns["max_error"][0]}
            line |= {f"bytes.{name}": total / labels.positions for name, total in store.shards.section_bytes().items()}
        lines.append(line)
        report(line)
    return lines


def report(line: dict[str, Any]) -> None:
    """Print a line of the table."""
    rates = "".join(f"{line[name] / 1e6:9.2f}" for name in ("encode_1", "encode_2", "decode_1", "decode_2"))
    kl, largest = (line.get(name, float("nan")) for name in ("mean_kl", "max_error"))
    what = f"{line['labels']:13} {line['targets']:15} {line['way']:19} {line['entries']:7.1f}"
    print(f"{what} {line['bytes_per_token']:8.1f}{rates} {line['row_ms']:8.2f} {kl:9.1e} {largest:6.2f}", flush=True)


OPEN = """
import resource, sys, time
from logit_store import LogitStore
LogitStore.open(sys.argv[1])
times = []
for _ in range(5):
    started = time.perf_counter()
    store = LogitStore.open(sys.argv[1])
    times.append(time.perf_counter() - started)
anonymous = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")]
print(sorted(times)[2], anonymous[0] / 1024)
"""


def opening() -> list[dict[str, Any]]:
    """Seconds to open stores of many rows, and the resident memory after it, mapped pages aside."""
    from tests.store.test_integrity import write_many_shards

    lines = []
    for num_shards, num_rows in ((1_000, 1_000_000), (10_000, 10_000_000)):
        with tempfile.TemporaryDirectory() as folder:
            write_many_shards(Path(folder) / "store", num_shards, num_rows)
            done = subprocess.check_output([sys.executable, "-c", OPEN, f"{folder}/store"], text=True, cwd=ROOT)
        open_s, mebibytes = map(float, done.split())
        print(f"open {num_rows:,} rows in {num_shards:,} shards: {open_s * 1e3:.0f} ms, {mebibytes:.0f} MiB of memory")
        lines.append(
            {
                "labels": "none",
                "targets": f"{num_rows} rows",
                "way": "decant",
                "open_s": open_s,
                "resident_mib": mebibytes,
            }
        )
    return lines


def main() -> None:
    """Measure everything and write the table."""
    rates = "".join(f"{name:>9}" for name in ("enc 1", "enc 2", "dec 1", "dec 2"))
    what = f"{'labels':13} {'targets':15} {'way':19} {'entries':>7}"
    print(f"{what} {'B/token':>8}{rates} {'row ms':>8} {'KL':>9} {'max':>6}")
    print("(enc, dec: millions of tokens per second)")
    synthetic = [Labels("synthetic", kind, V, rows) for kind, rows in synthetic_rows().items()]
    lines = []
    with ProcessPoolExecutor(2, get_context("forkserver")) as pool:
        for labels in (*synthetic, *demo_rows()):
            lines += measure(labels, pool)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process: {peak:.0f} MiB")
    lines.append({"labels": "all", "targets": "all", "way": "this process", "resident_mib": peak})
    lines += opening()
    write_csv(lines)


def write_csv(lines: list[dict[str, Any]]) -> None:
    stamp = about("numpy", "pyarrow", "zstandard", "numba")
    names = list(dict.fromkeys(name for line in lines for name in line)) + list(stamp)
    with open(RESULT, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in (line | stamp).items()})
    print(f"written to {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
