"""Every kind of target that a teacher job makes, through a store on disk, to what losses see; and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import TargetsConfig
from cluster.teachers.targets import Selector
from logit_store import LogitRow, LogitStore, TokenRow
from logit_store.config import parse_config
from logit_store.errors import ConfigError, StoreError
from tests.store.made import make_row, write_store, write_tokens
from training.config import LossConfig, TowardsConfig, TrainConfig
from training.curriculum.batches import Prefix
from training.data.micro_batch import collate
from training.data.source import Source, Text
from training.losses import Objective, SparseTargets, soft_losses
from training.losses.check import check_loss
from training.losses.objective import Part
from training.losses.tails import tempered
from training.losses.temperatures import log_partition

V = 64
KINDS: dict[str, dict[str, Any]] = {
    "top_k": {"kind": "top_k", "k": 6, "temperatures": [2.0, 4.0, 0.5]},
    "many temperatures": {"kind": "top_k", "k": 6, "temperatures": [0.5, 0.6, 0.7, 0.8, 1.2, 1.5, 1.8, 2.2, 3.0, 4.0]},
    "top_p": {"kind": "top_p", "p": 0.8, "k": 20, "temperatures": [2.0]},
    "threshold": {"kind": "threshold", "tau": 0.05},
    "threshold at 2": {"kind": "threshold", "tau": 0.05, "temperatures": [2.0]},
    "counts": {"kind": "counts", "draws": 9},
    "counts at 2": {"kind": "counts", "draws": 9, "temperatures": [2.0]},
    "everything": {"kind": "top_k", "k": V},
    "with always": {"kind": "top_k", "k": 3, "always": [0, 17, 40], "temperatures": [2.0]},
}


def make_store(folder: Path, kind: str) -> tuple[LogitStore, list[torch.Tensor]]:
    """A store of three masked rows, labelled by the teacher job's own code, and the teacher's logits."""
    g, targets = torch.Generator().manual_seed(0), TargetsConfig(**KINDS[kind])
    selector, rows, logits = Selector(targets, V, "labels"), [], []
    for number, length in enumerate((12, 5, 20)):
        ids_T = torch.randint(0, V, (length,), generator=g)
        logits.append(
            torch.randn(length - 1, V, generator=g) * torch.tensor([[0.3], [3.0], [8.0]]).repeat(7, 1)[1:length]
        )
        places = torch.full((length - 1,), number), torch.arange(length - 1)
        labels = selector.select(logits[-1], ids_T[1:], *places)
        mask = (torch.rand(length - 1, generator=g) < 0.7).numpy() if number else None
        rows.append(LogitRow(TokenRow(number, "train", ids_T.numpy().astype(np.int32), mask), labels))
    header = {"k": targets.most_entries(V), "temperatures": targets.temperatures, "forced_ids": targets.always}
    header |= {"labels": {"targets": {"kind": targets.kind}}}
    codec = {"codec": {"kind": "exact", "max_kl": 1e-4, "max_error": 0.5}}
    return write_store(str(folder / kind.replace(" ", "-")), [rows], **header, **codec), logits


def labels_of(store: LogitStore, prefixes: list[Prefix]) -> tuple[SparseTargets, torch.Tensor, torch.Tensor]:
    batch = collate(Source.of(store), prefixes)
    return batch.targets[0].targets, batch.next_ids_N, batch.valid_N


PREFIXES = [Prefix(0, 11), Prefix(2, 13), Prefix(1, 4)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_teacher_is_at_no_distance_from_its_own_labels(tmp_path: Path, kind: str) -> None:
    store, logits = make_store(tmp_path, kind)
    targets, next_ids_N, valid_N = labels_of(store, PREFIXES)
    masks = [store.tokens(prefix.row).carries_loss_P[: prefix.positions] for prefix in PREFIXES]
    assert valid_N.tolist() == [13 * i + int(place) for i, mask in enumerate(masks) for place in np.flatnonzero(mask)]
    logits_NV = torch.cat([logits[p.row][: p.positions][mask] for p, mask in zip(PREFIXES, masks, strict=True)])
    assert len(next_ids_N) == len(logits_NV) == len(targets.tail_logmass_N) == sum(map(sum, masks)) < 28
    stored = tuple(store.manifest["temperatures"])
    for temperature in (*stored, 1.0):
        objective = Objective(V, temperature=temperature, stored=stored)
        if targets.head_ids_NK.shape[1]:
            for name in ("forward_kl", "reverse_kl", "jsd", "tvd"):
                own_N = soft_losses(logits_NV, next_ids_N, targets, objective._replace(divergence=name))
                other_N = soft_losses(logits_NV.roll(1, 0), next_ids_N, targets, objective._replace(divergence=name))
                assert float(own_N.abs().max()) < 2e-3 * temperature**2, name  # tvd is not squared
                assert float(other_N.mean()) > 20 * float(own_N.abs().mean()), name


@pytest.mark.parametrize(("kind", "temperature"), [
    ("threshold", 1.0), ("threshold at 2", 2.0), ("counts", 1.0), ("counts at 2", 2.0),
])  # fmt: skip
def test_draws_and_what_is_kept_make_one(tmp_path: Path, kind: str, temperature: float) -> None:
    from training.losses import WeightedTargets

    store, logits = make_store(tmp_path, kind)
    targets, next_ids_N, _ = labels_of(store, [Prefix(0, 11)])
    stored = tuple(store.manifest["temperatures"])
    part = Part.of(Objective(V), next_ids_N, [WeightedTargets(1.0, targets)], torch.float64)
    (labels,) = part.labels
    partition_N = log_partition(part.log_partition[0], stored, temperature)
    teacher = tempered(labels, partition_N, temperature, V)
    share_NE = labels.draws_NE / labels.draws_NE.sum(-1, keepdim=True).clamp(min=1) * teacher.log_tail_N.exp()[:, None]
    torch.testing.assert_close((teacher.log_p_NE.exp() + share_NE).sum(-1), torch.ones(11).double(), rtol=0, atol=1e-5)
    exact_NE = (logits[0] / temperature).log_softmax(-1).gather(-1, part.entries.ids_NE).double()
    kept_NE = labels.logprobs_NE > -torch.inf
    torch.testing.assert_close(teacher.log_p_NE[kept_NE], exact_NE[kept_NE], rtol=0, atol=1e-4)
    assert (labels.draws_NE[kept_NE] == 0).all()
    if kind.startswith("counts"):
        assert set(labels.draws_NE.sum(-1).tolist()) <= {0.0, 9.0}
    else:  # each draw stands for tau at most
        assert float((share_NE / labels.draws_NE.clamp(min=1)).max()) <= 0.05 + 1e-6


def test_ragged_rows_and_none_at_all_collate(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        make_row(rng, n, rng.integers(0, 9, n).tolist(), V, 1, [3, 5], max_draws=4, masked=True) for n in (9, 2, 30)
    ]
    store = write_store(str(tmp_path / "store"), [rows], forced_ids=[3, 5])
    whole, _, _ = labels_of(store, [Prefix(i, len(row.tokens.input_ids_T) - 1) for i, row in enumerate(rows)])
    assert whole.forced_logprobs_NF.shape == (len(whole.tail_logmass_N), 2)
    batch = collate(Source.of(store), [])
    assert (batch.input_ids_BL.shape, len(batch.valid_N), len(batch.next_ids_N)) == ((1, 1), 0, 0)
    empty = batch.targets[0].targets
    assert [c.dtype for c in empty] == [c.dtype for c in whole]
    assert [len(c) for c in empty] == [0] * len(empty)
    assert empty.log_partition_NS.shape == (0, 1)


def train_config(**loss: Any) -> TrainConfig:
    raw = {
        "run": {"path": "run"}, "data": {"store": "store"}, "student": {"config": {"model_type": "llama"}},
        "schedule": {"total_tokens": 1, "tokens_per_step": 1, "lr": 1e-3}, "loss": loss,
    }  # fmt: skip
    return parse_config(TrainConfig, raw, "test")


LINEAR = {"kind": "linear", "to": 4.0, "over_tokens": 10}
CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("top_k", {}, None),
    ("top_k", {"divergence": "jsd", "tail": "uniform"}, None),
    ("top_k", {"divergence": "reverse_kl", "tail": "ground_truth"}, "does not go with loss.divergence reverse_kl"),
    ("top_k", {"divergence": "tvd", "tail": "none"}, "choose a tail of ghost, renormalise, uniform, or forward_kl"),
    ("everything", {"divergence": "tvd", "tail": "none"}, None),
    ("top_k", {"tail": "sampled"}, r"holds none \(targets of kind top_k\): choose another tail"),
    ("threshold", {"tail": "sampled"}, None),
    ("threshold", {"tail": "ghost"}, None),
    ("counts", {"tail": "sampled"}, None),
    ("counts", {"tail": "ghost"}, "set loss.tail=sampled"),
    (
        "counts at 2",
        {"tail": "sampled"},
        "draws of .* are from the distribution at 2.0 alone. Set loss.temperature=2.0",
    ),
    ("counts at 2", {"tail": "sampled", "temperature": 2.0}, None),
    ("threshold", {"tail": "sampled", "temperature": 2.0}, "are from the distribution at 1.0 alone"),
    ("top_k", {"temperature": 2.0}, None),
    ("top_k", {"temperature": 3.0}, r"the store serves \[1.0, 2.0, 4.0, 0.5\]"),
    ("many temperatures", {"temperature": 1.0, "temperature_schedule": LINEAR}, None),
    (
        "top_k",
        {"temperature": 1.0, "temperature_schedule": LINEAR},
        r"may be off by .* nats there \(at most 0.1 is allowed; .* 3 rows\). Cache again .* around 1.33",
    ),
    ("top_k", {"temperature": 5.0, "temperature_schedule": LINEAR}, "from 4.0 to 5.0: the store has log-partitions at"),
    ("top_p", {"temperature": 1.0, "temperature_schedule": {**LINEAR, "to": 2.0}}, "needs at least 3 temperatures"),
    ("many temperatures", {"learned_temperature": {"low": 0.6, "high": 3.9, "over_tokens": 1}}, None),
    (
        "top_k",
        {"learned_temperature": {"low": 0.1, "high": 3.9, "over_tokens": 1}},
        "loss.learned_temperature from 0.1",
    ),
    ("top_p", {"alpha": 0.0, "tail": "sampled"}, None),
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LogitStore]:
    folder = tmp_path_factory.mktemp("targets")
    return {kind: make_store(folder, kind)[0] for kind in KINDS}


@pytest.mark.parametrize(("kind", "loss", "refused"), CASES)
def test_pairs_that_the_labels_do_not_serve_are_refused(
    stores: dict[str, LogitStore], kind: str, loss: dict[str, Any], refused: str | None
) -> None:
    config, stored = train_config(**loss), Source.of(stores[kind]).temperatures
    if refused is not None:
        with pytest.raises(ConfigError, match=refused):
            check_loss(config.loss, stores[kind], stored)
        return
    warnings = check_loss(config.loss, stores[kind], stored)
    changes = "temperature_schedule" in loss or "learned_temperature" in loss
    assert len(warnings) == changes
    assert all("interpolated: by an estimate over 3 rows" in warning for warning in warnings)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_serve_their_own_temperature_beside_those_of_another_teacher(
    stores: dict[str, LogitStore], temperature: float
) -> None:
    teachers = [stores["counts"], stores["counts at 2"]]
    source = Source([Text(1.0, tuple(teachers), (0.5, 0.5))])
    assert source.temperatures == ()
    loss = LossConfig(tail="sampled", temperature=temperature)
    assert check_loss(loss, teachers[temperature == 2.0], [temperature]) == []
    with pytest.raises(ConfigError, match=f"are from the distribution at {3 - temperature} alone"):
        check_loss(loss, teachers[temperature == 1.0], source.temperatures)


def test_tokens_alone_serve_cross_entropy_alone(tmp_path: Path) -> None:
    rows = [make_row(np.random.default_rng(0), 9, 0, masked=True).tokens]
    store = write_tokens(str(tmp_path / "tokens"), [rows])
    assert check_loss(LossConfig(alpha=0.0), store, ()) == []
    with pytest.raises(StoreError, match=r"holds tokens without labels: set loss\.alpha=0"):
        check_loss(LossConfig(alpha=0.0, alpha_schedule=TowardsConfig(kind="linear", to=0.5, over_tokens=1)), store, ())
    batch = collate(Source.of(store), [Prefix(0, 8)])
    mask = store.tokens(0).loss_mask_P
    assert mask is not None
    assert batch.valid_N.tolist() == np.flatnonzero(mask).tolist()
    assert batch.next_ids_N.tolist() == store.tokens(0).input_ids_T[1:][mask].tolist()
