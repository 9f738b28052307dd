"""The containers, as far as they can be checked without an engine: files, lint, every command run outside of them."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from cluster.config import CacheConfig
from logit_store.config import load_config
from training.config import TrainConfig

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
COMPOSE_FILE = ROOT / "docker/compose.yaml"
CLUSTER_FILE = ROOT / "docker/ray-cluster.yaml"
RAYJOB_FILE = ROOT / "docker/rayjob.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}

each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


class Instruction(NamedTuple):
    keyword: str
    value: str


def instructions(dockerfile: Path) -> list[Instruction]:
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    logical = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in logical]


def values(dockerfile: Path, keyword: str) -> list[str]:
    return [instruction.value for instruction in instructions(dockerfile) if instruction.keyword == keyword]


def copied(dockerfile: Path) -> list[str]:
    return [source for value in values(dockerfile, "COPY") for source in value.split()[:-1]]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=120, check=False
    )


def tool(name: str) -> str:
    found = shutil.which(name, path=ENVIRONMENT["PATH"])
    assert found is not None, f"{name} is missing: `make setup` installs it"
    return found


# --- Dockerfiles


def test_there_is_a_dockerfile_for_each_side() -> None:
    assert [path.name for path in DOCKERFILES] == ["student.Dockerfile", "teacher.Dockerfile"]


@each_dockerfile
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    result = run(tool("hadolint"), "--no-color", str(dockerfile))
    assert result.returncode == 0, result.stdout


@each_dockerfile
def test_base_is_pinned_and_the_user_is_not_root(dockerfile: Path) -> None:
    (base,) = values(dockerfile, "FROM")
    assert re.search(r":[\d.]*\d+\.\d+\.\d+[\w.-]*$", base), f"{base} names no exact version"
    assert int(values(dockerfile, "USER")[-1]) > 0
    assert not values(dockerfile, "ADD")


@each_dockerfile
def test_apt_leaves_no_lists_behind(dockerfile: Path) -> None:
    for command in values(dockerfile, "RUN"):
        if "apt-get" in command:
            assert "--no-install-recommends" in command
            assert "rm -rf /var/lib/apt/lists/*" in command


@each_dockerfile
def test_what_is_copied_exists_and_reaches_the_build(dockerfile: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), source
        # Docker's rule: of all patterns that match the path or a folder above it, the last one decides.
        matching = [rule for rule in rules if any(fnmatch(part, rule.lstrip("!")) for part in with_parents(source))]
        assert matching, source
        assert matching[-1].startswith("!"), f"{source} is left out of the build by {matching[-1]!r}"


def with_parents(path: str) -> list[str]:
    return [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]


def test_builds_see_neither_environments_nor_runs() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in rules
    assert not {"!.venv", "!runs", "!.git"} & set(rules)


@each_dockerfile
def test_an_edit_of_the_source_does_not_install_again(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    install = next(i for i, step in enumerate(steps) if step.keyword == "RUN" and "install.sh" in step.value)
    before = " ".join(step.value for step in steps[:install] if step.keyword == "COPY").split()
    assert not {"decant.py", "cluster", "logit_store", "training", "configs"} & set(before)
    assert {"pyproject.toml", "docker/install.sh"} <= set(before)


@each_dockerfile
def test_every_package_is_copied(dockerfile: Path) -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.rstrip("*") for name in setuptools["packages"]["find"]["include"]}
    wanted = packages | {f"{module}.py" for module in setuptools["py-modules"]}
    assert wanted <= set(copied(dockerfile))


def installed_groups(dockerfile: Path) -> set[str]:
    (step,) = [value for value in values(dockerfile, "RUN") if "install.sh" in value]
    return set(step.rsplit("install.sh", 1)[1].split())


def test_groups_of_the_images() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    groups = {path.name: installed_groups(path) for path in DOCKERFILES}
    assert groups == {"teacher.Dockerfile": {"cache", "vllm"}, "student.Dockerfile": {"train", "report"}}
    assert set().union(*groups.values()) <= set(known)


@pytest.mark.parametrize(
    ("absent", "modules"),
    [
        ("ray vllm datasets accelerate", "training.trainer, training.launch, training.report"),
        (
            "deepspeed tensorboard matplotlib jinja2",
            "cluster.cache, cluster.tokenize, cluster.job.worker",
        ),
    ],
    ids=["student", "teacher"],
)
def test_an_image_does_without_the_other_sides_libraries(absent: str, modules: str) -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({absent.split()!r}))"
    result = run(sys.executable, "-c", f"{blocked}; import decant, {modules}")
    assert result.returncode == 0, result.stderr


# --- Compose


def test_compose_fits_its_schema() -> None:
    result = run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE_FILE))
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", SERVICES)
def test_service_refers_to_what_exists(name: str) -> None:
    service = SERVICES[name]
    context = (COMPOSE_FILE.parent / service["build"]["context"]).resolve()
    assert context == ROOT
    assert context / service["build"]["dockerfile"] in DOCKERFILES
    assert {volume.split(":")[0] for volume in service["volumes"]} <= set(COMPOSE["volumes"])
    assert set(service.get("depends_on", {})) <= set(SERVICES)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "open to the network"


def test_volumes_are_folders_that_the_images_make() -> None:
    made = {path.name: " ".join(values(path, "RUN")) for path in DOCKERFILES}
    for service in SERVICES.values():
        steps = made[Path(service["build"]["dockerfile"]).name]
        for volume in service["volumes"]:
            folder = volume.split(":")[1].removeprefix("/opt/decant/")
            assert re.search(rf"chown [^&]*{folder}\b", steps), f"{folder} would belong to root"


def test_ray_services_share_a_required_token() -> None:
    ray = [service for service in SERVICES.values() if service["command"].startswith("ray start")]
    assert len(ray) == 3
    for service in ray:
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


def test_workers_join_the_head_and_own_different_gpus() -> None:
    head = shlex.split(SERVICES["head"]["command"])
    (port,) = [word.removeprefix("--port=") for word in head if word.startswith("--port=")]
    gpus = []
    for name in ("worker-0", "worker-1"):
        worker = SERVICES[name]
        assert f"--address=head:{port}" in shlex.split(worker["command"])
        assert worker["depends_on"] == {"head": {"condition": "service_healthy"}}
        (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
        gpus += device["device_ids"]
    assert len(set(gpus)) == 2


# --- Every command that containers run, or that docker/ and configs/ tell a reader to type

PLACEHOLDERS = {"CONFIG", "OVERRIDES"}
FOREIGN = {"aws", "cp", "grafana", "kubectl", "tar"}
"""Programs of others, in a reader's hands or in every base image."""


class Command(NamedTuple):
    where: str
    words: tuple[str, ...]


def commands() -> list[Command]:
    found = []
    for name, service in SERVICES.items():
        found.append((f"{name}.command", service["command"]))
        if "healthcheck" in service:
            kind, *words = service["healthcheck"]["test"]
            assert kind == "CMD"
            found.append((f"{name}.healthcheck", shlex.join(words)))
    for path in DOCKERFILES:
        found += [(f"{path.name} CMD", shlex.join(json.loads(value))) for value in values(path, "CMD")]
    for path in [*DOCKERFILES, COMPOSE_FILE, CLUSTER_FILE, RAYJOB_FILE, *(ROOT / "configs").rglob("*.yaml")]:
        # An indented line of a comment is a command; a backslash goes on with the next.
        text = path.read_text().replace("\\\n#", "")
        found += [(path.name, line) for line in re.findall(r"^#     +(\S.*)$", text, re.MULTILINE)]
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docker/README.md").read_text(), re.DOTALL):
        found += [("README.md", line) for line in block.replace("\\\n", " ").splitlines()]
    found = [(where, line.split(" > ")[0]) for where, line in found if not line.startswith("export ")]
    return [Command(where, tuple(shlex.split(line))) for where, line in dict.fromkeys(found)]


@pytest.mark.parametrize("command", commands(), ids=lambda command: f"{command.where}: {' '.join(command.words)[:60]}")
def test_command_exists(command: Command) -> None:
    check(list(command.words))


def check(words: list[str]) -> None:
    """Assert that each program, verb, option, config and override of a command line exists, running only ``--help``."""
    program = words[0]
    if program == "docker":
        check_docker(words[1:])
    elif program == "ray":
        check_ray(words)
    elif program == "deepspeed":
        module = words.index("--module")
        check_options(words[:module], help_of("deepspeed"))
        check(["python", "-m", *words[module + 1 :]])
    elif program == "decant" or words[:3] in (["python", "-m", "cluster"], ["python", "-m", "training"]):
        check_ours(words[:1] if program == "decant" else words[:3], words[1:] if program == "decant" else words[3:])
    else:
        assert program in FOREIGN, f"no rule for {program}"


def check_ours(program: list[str], words: list[str]) -> None:
    verb, *arguments = words
    if verb == "--help":
        help_of(*program)
        return
    check_options(arguments, help_of(*program, verb))
    if verb in ("tokenize", "cache", "train") and not PLACEHOLDERS & set(arguments):
        config, *overrides = arguments
        cls = TrainConfig if verb == "train" else CacheConfig
        load_config(cls, ROOT / config.removeprefix("/opt/decant/"), overrides)


def check_ray(words: list[str]) -> None:
    own, _, inner = (words, "", []) if "--" not in words else split_at(words, "--")
    verbs = own[:3] if own[1] in ("job", "metrics") else own[:2]
    check_options(own[len(verbs) :], help_of(*verbs))
    if inner:
        check(inner)


def check_docker(words: list[str]) -> None:
    verb, *arguments = words
    if verb in ("build", "compose"):
        file = arguments[arguments.index("--file") + 1]
        assert ROOT / file in (*DOCKERFILES, COMPOSE_FILE)
    if verb == "compose":
        verb, *arguments = arguments[2:]
        assert verb in ("build", "up", "run", "exec", "stop", "down"), verb
        named = [word for word in arguments if not word.startswith("-")]
        assert set(named[:1] if verb in ("run", "exec") else named) <= set(SERVICES)
        if verb in ("run", "exec"):
            check(arguments[arguments.index(named[0]) + 1 :])
    elif verb == "run":
        images = {service["image"] for service in SERVICES.values()}
        (image,) = [i for i, word in enumerate(arguments) if word in images]
        check(arguments[image + 1 :])


def split_at(words: list[str], word: str) -> tuple[list[str], str, list[str]]:
    i = words.index(word)
    return words[:i], word, words[i + 1 :]


def check_options(words: list[str], help_text: str) -> None:
    for word in words:
        if word.startswith("-"):
            assert re.search(rf"(^|\s|\[){re.escape(word.split('=')[0])}(?![\w-])", help_text), f"unknown option {word}"


@functools.cache
def help_of(*command: str) -> str:
    """Return what ``command --help`` prints, run by this environment's programs."""
    program = shutil.which(command[0], path=str(BIN))
    assert program is not None, f"{command[0]} is not installed beside {sys.executable}"
    result = run(program, *command[1:], "--help")
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- Shell


def shell_scripts() -> list[Path]:
    candidates = [path for folder in ("docker", ".ci", "configs") for path in (ROOT / folder).rglob("*")]
    return [p for p in candidates if p.is_file() and re.match(rb"#!.*\b(ba)?sh\b", p.read_bytes()[:80])]


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda path: path.name)
def test_shell_script_is_sound(script: Path) -> None:
    assert run("bash", "-n", str(script)).returncode == 0
    result = run(tool("shellcheck"), str(script))
    assert result.returncode == 0, result.stdout
