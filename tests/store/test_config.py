"""Configs: typed, closed to unknown keys, and errors that say what to do."""

from pathlib import Path

import pytest

from cluster.config import CacheConfig
from logit_store import Storage
from logit_store.config import dump_config, load_config
from logit_store.errors import ConfigError, StoreError
from tests.toy import ROOT
from training.config import TrainConfig

CACHE = ROOT / "configs/demo/cache.yaml"
STUDENT = ROOT / "configs/demo/student-small.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target.k=3", "unknown key 'target'; did you mean 'targets'"),
        ("targets.kk=3", "unknown key 'targets.kk'; did you mean 'k'"),
        ("tokens.source.file=3", "unknown key 'tokens.source.file'; did you mean 'files'"),
        ("cluster.zzz=3", "unknown key 'cluster.zzz'; known keys: address, "),
        ("targets.k=many", "targets.k: .*valid integer, got str 'many'"),
        ("targets.k=0", "targets.k: .*greater than or equal to 1"),
        ("teacher.backend=onnx", "teacher.backend: .*'transformers' or 'vllm'.*got str 'onnx'"),
        ("tokens.source.files=[]", "tokens.source: give `dataset`"),
        ("targets.temperatures=[1.0]", "targets: temperatures must be positive, different and other than 1"),
        ("teacher.quantization=8bit", "quantization = 8bit needs a GPU, and cluster.gpus_per_worker = 0"),
        ("cluster.resources_per_worker={CPU: 4}", "CPU is Ray's own: set cluster.cpus_per_worker"),
        ("cluster.resources_per_worker={memory: 1e9}", "memory is Ray's own: leave it out"),
        ("cluster.resources_per_worker={x: -1}", "x is -1: Ray takes shares from 0.0001 to 1, and whole numbers"),
        ("cluster.resources_per_worker={x: 1.5}", "x is 1.5: Ray takes"),
        ("cluster.resources_per_worker={x: .inf}", "x is inf: Ray takes"),
        ("cluster.address=http://head:8265", "cluster.address: http://head:8265 .* HOST:6379 or ray://HOST:10001"),
        ("targets", "not of the form a.b=value"),
        ("targets.k.j=1", "'k' is a value, not a section"),
    ],
)
def test_errors_name_the_key_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CacheConfig, CACHE, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.tail=ghosts", "loss.tail: .*'ghost'.*'ground_truth'.*got str 'ghosts'"),
        ("student.model=some/model", "student: give one of `model`"),
        ("curriculum.schedule_type=fixed_discrete", "fixed_discrete needs schedule_config.difficulty"),
        ("curriculum.min_difficulty=900", "min_difficulty 900 is above max_difficulty"),
        ("schedule.tokens_per_step=100", "tokens_per_step 100 is less than curriculum.max_difficulty"),
    ],
)
def test_training_configs_are_checked_across_fields(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, STUDENT, [override])


def test_a_cluster_called_local_is_one_of_our_own() -> None:
    assert load_config(CacheConfig, CACHE, ["cluster.address=local"]).cluster.address is None


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:planted/key@bucket/store",
        "s3://AKIA:planted#key@bucket/store",
        "simplecache::s3://:plantedkey@bucket/store",
        "https://ghp_plantedkey@host/store",
        "https://host/store?X-Amz-Signature=plantedkey",
        "https://host/store#access_token=plantedkey",
    ],
)
def test_credentials_are_refused_in_every_config_and_for_every_store(url: str) -> None:
    for cls, path, key in (
        (TrainConfig, STUDENT, "data.store"),
        (CacheConfig, CACHE, "store.path"),
        (CacheConfig, CACHE, "teacher.batch_tokens"),  # also where it is of the wrong type
        (CacheConfig, CACHE, "teacher.modl"),
    ):
        with pytest.raises(ConfigError, match=f"^{key} is a URL with credentials") as caught:
            load_config(cls, path, [f"{key}='{url}'"])
        assert "planted" not in str(caught.value)
    with pytest.raises(StoreError, match="is a URL with credentials") as refused:
        Storage(url)
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "abfs://container@account.dfs.core.windows.net/x?versionId=3",
        "hdfs://host:8020/a@b",
        "ray://host:10001",
        "s3://bucket/runs/12:30:05@host/store",
        "zip://a.json::s3://bucket/x@1.zip",
        "https://host/store?max_tokens=5&token_count=3",
    ],
)
def test_a_user_alone_a_port_and_a_path_are_no_credentials(url: str) -> None:
    assert load_config(CacheConfig, CACHE, [f"store.path={url}"]).store.path == url


def test_numbers_in_scientific_notation_are_numbers() -> None:
    assert load_config(TrainConfig, STUDENT, ["schedule.lr=2e-6"]).schedule.lr == 2e-6


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("tokens: {path: x, source: {files: [y]}, tokenizer: z}\nstore: {path: s}\n")
    with pytest.raises(ConfigError, match="key 'teacher' is missing"):
        load_config(CacheConfig, tmp_path / "c.yaml")


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- 1", "must hold `key: value`")])
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(CacheConfig, tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(CacheConfig, tmp_path / "none.yaml")


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config(TrainConfig, STUDENT, ["loss.alpha=0.5"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(TrainConfig, tmp_path / "c.yaml") == config
