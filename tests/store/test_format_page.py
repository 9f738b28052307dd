"""FORMAT.md tells the truth: a decoder written from the page alone reads its example and a store of version 1.

Nothing of `logit_store` decodes here, only pyarrow, zstandard and the standard library. The golden store was written
once and must stay readable for ever; `python -m tests.store.golden` wrote it.
"""

import hashlib
import json
import math
import re
import struct
import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from logit_store import LogitStore, TokenStore, open_store
from tests.store.golden import GOLDEN, golden_rows
from tests.store.test_round_trip import assert_same
from tests.toy import ROOT

PAGE = (ROOT / "logit_store" / "FORMAT.md").read_text(encoding="utf-8")


class Planes:
    """ "Blocks" of the page."""

    def __init__(self, block: bytes) -> None:
        (mask,) = struct.unpack_from("<Q", block)
        stored = [i for i in range(64) if mask >> i & 1]
        sizes = struct.unpack_from(f"<{len(stored)}I", block, 8)
        at, self.planes, self.next = 8 + 4 * len(stored), {}, 0
        for i, size in zip(stored, sizes, strict=True):
            self.planes[i] = block[at : at + size]
            at += size
        assert at == len(block)

    def values(self, n: int, num_planes: int) -> list[int]:
        totals = [0] * n
        for j in range(num_planes):
            plane = self.planes.get(self.next, bytes(n))
            self.next += 1
            if len(plane) != n:
                plane = zstandard.ZstdDecompressor().decompress(plane)
            assert len(plane) == n
            totals = [total | byte << 8 * j for total, byte in zip(totals, plane, strict=True)]
        return totals

    def floats(self, n: int) -> list[float]:
        return list(struct.unpack(f"<{n}f", struct.pack(f"<{n}I", *self.values(n, 4))))

    def ids(self, counts: list[int]) -> list[list[int]]:
        """ "Id lists" of the page."""
        n = sum(counts)
        m = 6 if n >= 48 * max(len(counts), 1) else 4
        steps = iter(self.values(n, 2))
        bins: list[list[int]] = []
        for count in counts:
            bins.append([])
            for i in range(count):
                bins[-1].append(next(steps) + (bins[-1][-1] if i else 0))
        widths = [max((b >> m) - 1, 0) for of_position in bins for b in of_position]
        low = int.from_bytes(bytes(self.values((sum(widths) + 7) // 8, 1)), "little")
        lists: list[list[int]] = []
        for of_position in bins:
            lists.append([])
            for b in of_position:
                s = max((b >> m) - 1, 0)
                start = b if b < 2**m else b - ((s + 1) << m) + 2**m << s
                lists[-1].append(start + (low & (1 << s) - 1))
                low >>= s
        return lists


def decode(
    block: bytes, lengths: list[int], widths: tuple[int, int], levels: list[float], about: dict[str, Any]
) -> dict[str, Any]:
    """A block, as the page has it."""
    planes, v = Planes(block), about["vocabulary_size"]
    ids = [one for (one,) in planes.ids([1] * sum(lengths))]
    p = sum(max(length - 1, 0) for length in lengths)
    bits = planes.values((p + 7) // 8, 1)
    found: dict[str, Any] = {"ids": ids, "mask": [not bits[t // 8] >> t % 8 & 1 for t in range(p)]}
    if about["kind"] == "tokens":
        return found
    exact, temperatures, forced_ids = about["codec"]["kind"] == "exact", about["temperatures"], about["forced_ids"]
    found["tail"] = planes.floats(p)
    found["partition"] = planes.floats(p * len(temperatures))
    following, forced = (
        planes.floats(n) if exact else planes.values(n, 2) for n in (p, p * len(forced_ids))
    )  # fmt: skip
    counts = [widths[0] - missing for missing in planes.values(p, 3)]
    if p and all(count == v for count in counts):
        planes.next += 3
        head_ids = [list(range(v))] * p
    else:
        head_ids = planes.ids(counts)
    if exact:
        logprobs = iter(planes.floats(sum(counts)))
        head = [[next(logprobs) for _ in range(count)] for count in counts]
    else:
        base, codes = planes.values(p, 2), iter(planes.values(sum(counts), 2))
        head = []
        for t in range(p):
            of_position = [next(codes) for _ in range(counts[t])]
            head.append([-levels[base[t] + 1 - c] if c else -math.inf for c in of_position])
        following, forced = rescale(found, lengths, levels, head_ids, head, following, forced, forced_ids)
    draws = planes.ids([widths[1] - missing for missing in planes.values(p, 3)])
    return found | {"head_ids": head_ids, "head": head, "next": following, "forced": forced, "draws": draws}


def rescale(
    found: Any, lengths: Any, levels: Any, head_ids: Any, head: Any, following: Any, forced: Any, forced_ids: Any
) -> Any:
    """ "Log-probs" of the page; changes ``head`` in place."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    next_ids = [found["ids"][s + t + 1] for s, length in zip(starts, lengths, strict=True) for t in range(length - 1)]
    half = max((b - a for a, b in pairwise(levels)), default=0) / 2
    outside = {0: None, 1: -math.inf}
    next_logprobs, forced_logprobs = [], []
    for t, next_id in enumerate(next_ids):
        own = [following[t], *forced[t * len(forced_ids) : (t + 1) * len(forced_ids)]]
        own = [outside[c] if c < 2 else -levels[c - 2] for c in own]
        total = sum(math.exp(x) for x in [*head[t], *own] if x is not None)
        kept = -math.expm1(min(found["tail"][t], 0))
        shift = (
            min(max(math.log(kept / total), -half), half) if kept > 0 and total > 0 else (-half if total > 0 else 0.0)
        )
        head[t] = [x + shift for x in head[t]]
        known = dict(zip(head_ids[t], head[t], strict=True))
        own = [x if x is None else x + shift for x in own]
        next_logprobs.append(known[next_id] if own[0] is None else own[0])
        known.setdefault(next_id, next_logprobs[-1])
        forced_logprobs += [known[i] if x is None else x for i, x in zip(forced_ids, own[1:], strict=True)]
    return next_logprobs, forced_logprobs


def test_the_worked_example() -> None:
    section = PAGE.split("## A worked example")[1]
    code = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert code is not None
    block = bytes.fromhex("".join(re.findall(r"^((?:[0-9a-f]{2} )*[0-9a-f]{2})\b", code[1], re.MULTILINE)))
    about = {"vocabulary_size": 300, "kind": "logits", "codec": {"kind": "lossy"}, "temperatures": [], "forced_ids": []}
    found = decode(block, [3], (3, 0), [0, 0.25, 0.5, 1, 2, 3, 4, 6], about)
    assert found["ids"] == [5, 7, 290]
    assert found["mask"] == [True, False]
    assert found["head_ids"] == [[7, 70, 200], [7, 9]]
    assert np.exp(found["tail"]) == pytest.approx([0.1, 0.13])
    assert np.exp(found["head"][0]) == pytest.approx([0.533, 0.323, 0.044], abs=5e-4)
    assert np.exp(found["head"][1]) == pytest.approx([0.727, 0.126], abs=5e-4)
    assert np.exp(found["next"]) == pytest.approx([0.533, 0.017], abs=5e-4)


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_the_page_alone_reads_a_store(name: str) -> None:
    folder = GOLDEN / name
    sealed = json.loads((folder / "manifest.json").read_bytes())
    text = json.dumps(sealed["body"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert sealed["format"] == 1
    assert hashlib.sha256(text.encode()).hexdigest() == sealed["sha256"]
    shards = pa.ipc.open_file(folder / "shards.arrow").read_all().to_pylist()
    index = pa.ipc.open_file(folder / "index.arrow").read_all()
    store, row, lengths_of_all = open_store(str(folder)), 0, []
    for number, shard in enumerate(shards):
        (path,) = (folder / "shards").glob(f"{number:06d}-*.arrow")
        data = path.read_bytes()
        assert hashlib.sha256(data).digest() == shard["sha256"]
        assert zlib.crc32(data[: shard["prefix_bytes"]]) == shard["prefix_crc32"]
        table = pa.ipc.open_file(data).read_all()
        about = json.loads(table.schema.metadata[b"decant"])
        levels = np.frombuffer(table.schema.metadata[b"levels"], "<f4").tolist()
        for block in table.to_pylist():
            assert zlib.crc32(block["block"]) == block["crc32"]
            widths = (block["head_width"], block["sampled_width"])
            found = decode(block["block"], block["lengths"], widths, levels, about)
            row = compare(store, row, block["lengths"], found)
            lengths_of_all += block["lengths"]
    assert row == len(store) == len(index)
    assert index["length"].to_pylist() == lengths_of_all


def compare(store: LogitStore | TokenStore, row: int, lengths: list[int], found: dict[str, Any]) -> int:
    """Compare a decoded block with what the reader gives; the number of the row after it."""
    at_t = at_p = 0
    for length in lengths:
        tokens = store.tokens(row)
        p = max(length - 1, 0)
        assert tokens.input_ids_T.tolist() == found["ids"][at_t : at_t + length]
        mask = [True] * p if tokens.loss_mask_P is None else tokens.loss_mask_P.tolist()
        assert mask == found["mask"][at_p : at_p + p]
        if isinstance(store, LogitStore):
            targets, here = store[row].targets, slice(at_p, at_p + p)
            assert targets.head_ids_N.tolist() == [i for ids in found["head_ids"][here] for i in ids]
            assert targets.sampled_ids_M.tolist() == [i for ids in found["draws"][here] for i in ids]
            head = [x for logprobs in found["head"][here] for x in logprobs]
            np.testing.assert_allclose(targets.head_logprobs_N, head, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(targets.next_logprob_P, found["next"][here], rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(targets.tail_logmass_P, np.float32(found["tail"][here]))
            s, f = targets.log_partition_PS.shape[1], targets.forced_logprobs_PF.shape[1]
            partition, forced = (found[key][at_p * n : (at_p + p) * n] for key, n in (("partition", s), ("forced", f)))
            np.testing.assert_array_equal(targets.log_partition_PS.reshape(-1), np.float32(partition))
            np.testing.assert_allclose(targets.forced_logprobs_PF.reshape(-1), forced, rtol=1e-6, atol=1e-6)
        row, at_t, at_p = row + 1, at_t + length, at_p + p
    return row


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_the_golden_store_holds_what_was_written(name: str) -> None:
    store = open_store(str(GOLDEN / name))
    wanted = golden_rows()
    assert len(store) == len(wanted)
    for i, row in enumerate(wanted):
        if isinstance(store, LogitStore):
            assert_same(store[i], row, max_error=0.0 if store.codec.kind == "exact" else store.codec.max_error)
        else:
            assert store[i].input_ids_T.tolist() == row.tokens.input_ids_T.tolist()
            assert dict(store[i].columns) == dict(row.tokens.columns)
