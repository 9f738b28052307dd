"""Every file below configs/ is validated by the code that reads it; a file that no rule covers is an error."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import CacheConfig
from logit_store.config import Config, load_config, parse_config
from logit_store.errors import ConfigError
from training.config import TrainConfig
from training.engine_config import OURS, deepspeed_config
from training.generations import GenerationsConfig, plan

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
CACHE = CONFIGS / "single_node/cache.yaml"
STUDENT = CONFIGS / "single_node/student-0.6b.yaml"


def is_cache_config(path: Path) -> None:
    load_config(CacheConfig, path)


def is_train_config(path: Path) -> None:
    config = load_config(TrainConfig, path)
    if config.deepspeed is not None:
        deepspeed_config(config.model_copy(update={"deepspeed": str(ROOT / config.deepspeed)}))


def is_generations_config(path: Path) -> None:
    config = load_config(GenerationsConfig, path)
    cache, train = load_config(CacheConfig, ROOT / config.cache), load_config(TrainConfig, ROOT / config.train)
    assert train.data.store == cache.store.path
    for generation in plan(config, cache, cache, train):  # what is written is read again
        parse_config(CacheConfig, generation.cache, str(path))
        parse_config(TrainConfig, generation.train, str(path))


def is_deepspeed_config(path: Path) -> None:
    completed = deepspeed_config(train_config(path))
    for key, value in json.loads(path.read_text()).items():
        assert completed[key] == value, "the user's keys pass through"
    assert completed["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero"))


def is_python(path: Path) -> None:
    ast.parse(path.read_text())


RULES: dict[str, Callable[[Path], None]] = {
    r"\w+/cache[\w.-]*\.yaml": is_cache_config,
    r"\w+/(student|teacher)[\w.-]*\.yaml": is_train_config,
    r"\w+/generations[\w.-]*\.yaml": is_generations_config,
    r"deepspeed/zero\d\.json": is_deepspeed_config,
    r"demo/\w+\.py": is_python,
}


def train_config(deepspeed: Path) -> TrainConfig:
    return load_config(TrainConfig, STUDENT, [f"deepspeed={deepspeed}"])


def files() -> list[Path]:
    found = sorted(path for path in CONFIGS.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert len(found) > 10
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_is_valid(path: Path) -> None:
    name = path.relative_to(CONFIGS).as_posix()
    (rule,) = [rule for pattern, rule in RULES.items() if re.fullmatch(pattern, name)]
    rule(path)


@pytest.mark.parametrize("folder", ["demo", "single_node", "multi_node"])
def test_students_read_what_the_teacher_writes(folder: str) -> None:
    """Students name the store of the folder's cache.yaml, or a copy of it, and rows fit into a step."""
    teacher = load_config(CacheConfig, CONFIGS / folder / "cache.yaml")
    students = sorted((CONFIGS / folder).glob("student*.yaml"))
    assert len(students) >= 2
    for path in students:
        student = load_config(TrainConfig, path)
        store = teacher.store.path.replace("s3://my-bucket", "/shared")
        assert student.data.store == store
        assert student.schedule.tokens_per_step >= teacher.tokens.window
        assert (
            student.student.model is None or student.student.model.split("-")[0] == teacher.teacher.model.split("-")[0]
        )
    runs = [load_config(TrainConfig, path).run.path for path in students]
    assert len(set(runs)) == len(runs), "two students would write into one run"


# --- What is wrong is named


@pytest.mark.parametrize(
    ("cls", "path", "override", "message"),
    [
        (CacheConfig, CACHE, "teacher.modle=x", "unknown key 'teacher.modle'; did you mean 'model'?"),
        (CacheConfig, CACHE, "tokens.source.file=[a]", "unknown key 'tokens.source.file'; did you mean 'files'?"),
        (CacheConfig, CACHE, "claster={}", "unknown key 'claster'; did you mean 'cluster'?"),
        (TrainConfig, STUDENT, "loss.alhpa=1", "unknown key 'loss.alhpa'; did you mean 'alpha'?"),
        (
            TrainConfig,
            STUDENT,
            "curriculum.schedule_config.difficulty_steps=8",
            "unknown key 'curriculum.schedule_config.difficulty_steps'; did you mean 'difficulty_step'?",
        ),
        (TrainConfig, STUDENT, "loss.qqqq=1", "unknown key 'loss.qqqq'; known keys: alpha, alpha_schedule, beta"),
    ],
)
def test_unknown_key_names_the_nearest(cls: type[Config], path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_config(cls, path, [override])
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("cls", "path", "override", "message"),
    [
        (CacheConfig, CACHE, "targets.k='64'", "targets.k: input should be a valid integer, got str '64'"),
        (CacheConfig, CACHE, "tokens.window=1.5", "tokens.window: input should be a valid integer, got float 1.5"),
        (CacheConfig, CACHE, "cluster.workers=true", "cluster.workers: input should be a valid integer, got bool True"),
        (CacheConfig, CACHE, "teacher.backend=tensorrt", "teacher.backend: input should be 'transformers' or 'vllm'"),
        (TrainConfig, STUDENT, "schedule.lr=fast", "schedule.lr: input should be a valid number, got str 'fast'"),
        (TrainConfig, STUDENT, "loss.alpha=2", "loss.alpha: input should be less than or equal to 1, got int 2"),
        (TrainConfig, STUDENT, "run=here", "run: input should be a valid dictionary"),
    ],
)
def test_wrong_type_names_key_and_value(cls: type[Config], path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(cls, path, [override])


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"targets\.k.*; .*'teacher\.modle'|'teacher\.modle'.*; .*targets\.k"):
        load_config(CacheConfig, CACHE, ["teacher.modle=x", "targets.k='64'"])


@pytest.mark.parametrize("key", OURS)
def test_deepspeed_json_may_not_decide_what_the_run_decides(key: str, tmp_path: Path) -> None:
    user: dict[str, Any] = {"zero_optimization": {"stage": 1}, key: 1}
    (tmp_path / "zero.json").write_text(json.dumps(user))
    with pytest.raises(ConfigError, match=f"{key!r} is decided by"):
        deepspeed_config(train_config(tmp_path / "zero.json"))
