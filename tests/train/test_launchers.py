"""Whatever starts the ranks, they make the same run: torchrun, `deepspeed` on two machines, Ray Train with a death."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from logit_store import LogitStore
from logit_store.config import parse_config
from logit_store.errors import ConfigError, StudentError
from tests.namespaces import namespaces, needs_root
from tests.ray_node import BIN, ray_node, token_environment, wait_until
from tests.students import assert_same_run, run_here, student_config
from tests.toy import ROOT, write_yaml
from training import launch
from training.config import TrainConfig
from training.data.feed import Feed
from training.data.source import Source
from training.engine import on_gpus
from training.prepare import prepare
from training.ray_train import reason
from training.run_folder import RunFolder


@pytest.fixture(scope="module")
def quiet(store: LogitStore, one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in this process."""
    folder = tmp_path_factory.mktemp("launchers") / "quiet"
    assert run_here(make_config(folder, store))
    return folder


def make_config(folder: Path, store: LogitStore, **sections: Any) -> dict[str, Any]:
    path = folder.parent / f"{folder.name}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    checkpoint = {"every_tokens": 200}
    return student_config(folder, store.storage.root, deepspeed=str(path), checkpoint=checkpoint, **sections)


def environment() -> dict[str, str]:
    packages = f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"
    ours = {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    left = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**left, **ours, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def test_torchrun_passes_a_request_to_stop_on(store: LogitStore, quiet: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "student.yaml", make_config(tmp_path / "run", store))
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "training", "train", str(path)]
    started = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() or started.poll() is not None, 120)
    started.terminate()
    assert b"decant train: stopped at step" in started.communicate(timeout=60)[1]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert_same_run(tmp_path / "run", quiet, 1e-5)


def test_gpus_are_left_alone_where_deepspeed_is_told_to(
    store: LogitStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = parse_config(TrainConfig, make_config(tmp_path / "run", store), "test")
    for told, gpus in (("cpu", False), ("cuda", True)):
        monkeypatch.setenv("DS_ACCELERATOR", told)
        assert on_gpus() == gpus
        with Feed(config, Source.of(store), prepare(config).plan, 1, 0) as feed:
            assert feed._pins == gpus
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert launch._environment(2)["DS_ACCELERATOR"] == "cpu"


def test_a_machine_without_gpus_is_one_rank(store: LogitStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would start one for each NUMA node; on GPUs it is left to take those that it may see."""
    config = parse_config(TrainConfig, make_config(tmp_path / "run", store), "test")
    commands: list[list[str]] = []
    monkeypatch.setattr(launch.subprocess, "Popen", lambda command, env: commands.append(command))
    monkeypatch.setattr(launch, "_wait", lambda _launcher, _stop: 0)
    for gpus in (False, True):
        monkeypatch.setattr("training.engine.on_gpus", lambda gpus=gpus: gpus)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        assert launch._on_this_machine(config, "student.yaml", [], RunFolder(config.run.path)) == 0
    on_cpus, on_gpus = commands
    assert on_cpus[on_cpus.index("--num_accelerators") + 1] == "1"
    assert "--num_accelerators" not in on_gpus


def test_ranks_that_end_while_they_are_told_to_stop_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = psutil.NoSuchProcess(1)
    ended, alive = mock.Mock(**{"terminate.side_effect": gone}), mock.Mock()
    second = mock.Mock(**{"children.return_value": [ended, alive]})
    second_ended = mock.Mock(**{"children.side_effect": gone})
    first = mock.Mock(**{"children.side_effect": [[second_ended], [second]]})
    monkeypatch.setattr(psutil, "Process", lambda _pid: first)
    monkeypatch.setattr(psutil, "wait_procs", lambda ranks: ranks)
    late = subprocess.TimeoutExpired("deepspeed", 0.2)
    assert launch._wait(mock.Mock(**{"wait.side_effect": [late, late, 7]}), mock.Mock(asked=True)) == 7
    alive.terminate.assert_called_once()


@needs_root
def test_deepspeed_on_two_machines(store: LogitStore, quiet: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "student.yaml", make_config(tmp_path / "run", store))
    with namespaces(2) as machines:
        hosts = tmp_path / "hosts.txt"
        hosts.write_text("".join(f"{machine.address} slots=1\n" for machine in machines))
        started = []
        for i, machine in enumerate(machines):
            command = [str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(i)]
            command += ["--master_addr", machines[0].address, "--module", "training", "train", str(path)]
            with open(tmp_path / f"node{i}.log", "w") as log:
                started.append(
                    subprocess.Popen(
                        machine.command(*command), cwd=ROOT, env={**environment(), "GLOO_SOCKET_IFNAME": "eth0"},
                        stdout=log, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        codes = [process.wait(timeout=300) for process in started]
    assert codes == [0, 0], [(tmp_path / f"node{i}.log").read_text() for i in (0, 1)]
    assert_same_run(tmp_path / "run", quiet, 1e-5)


def test_ray_train_goes_on_when_a_worker_dies_and_stops_when_asked(
    store: LogitStore, quiet: Path, tmp_path: Path
) -> None:
    folder, surroundings = tmp_path / "run", {**environment(), **token_environment(), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        surroundings.pop(name, None)
    with ray_node(
        "--head", "--port=0", "--num-cpus=2", "--node-ip-address=127.0.0.1", environment=surroundings
    ) as node:
        address = (node / "ray_current_cluster").read_text().strip()
        launcher = {"kind": "ray", "address": address, "ranks": 2, "restarts": 1}
        path = write_yaml(tmp_path / "student.yaml", make_config(folder, store, launcher=launcher))
        log = tmp_path / "driver.log"
        with open(log, "w") as out:
            driver = subprocess.Popen(
                [str(BIN / "decant"), "train", str(path)], cwd=ROOT, env=surroundings, stdout=out,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            wait_until(lambda: (folder / "checkpoint.json").exists() or driver.poll() is not None, 180)
            assert driver.poll() is None, log.read_text()
            victims = ranks_of(surroundings["RAY_AUTH_TOKEN"])
            assert len(victims) == 2
            victims[1].send_signal(signal.SIGKILL)
            driver.terminate()  # the ranks find the note when they have been started again
            assert driver.wait(timeout=300) == 0, log.read_text()
        finally:
            driver.kill()
            driver.wait()
    assert not any(victim.is_running() for victim in victims), "both ranks were started again"
    assert "stopped, and saved: the same command goes on" in log.read_text()
    assert not (folder / ".ray").exists()
    assert run_here(make_config(folder, store))  # on one rank
    assert_same_run(folder, quiet, 1e-5)


def ranks_of(token: str) -> list[psutil.Process]:
    """Workers of Ray Train in the cluster that has this token: other clusters may run on this machine."""
    running = list(psutil.process_iter(["cmdline", "environ"]))  # None of those that end meanwhile
    found = [process for process in running if "RayTrainWorker" in " ".join(process.info["cmdline"] or ())]
    return [process for process in found if (process.info["environ"] or {}).get("RAY_AUTH_TOKEN") == token]


def test_an_error_of_ours_on_ray_is_told_as_it_is() -> None:
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2.api.exceptions import WorkerGroupError

    wrapped = UserExceptionWithTraceback(StudentError("rows of the batch: [7]"), "Traceback …")
    assert reason(WorkerGroupError("worker 1 failed", {1: wrapped})) == "rows of the batch: [7]"
    assert "worker 1 failed" in reason(WorkerGroupError("worker 1 failed", {1: RuntimeError("killed")}))


def test_ranks_on_ray_whose_work_is_not_here_have_not_stopped(
    store: LogitStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_config(TrainConfig, make_config(tmp_path / "run", store), "test")
    run = RunFolder(config.run.path)
    monkeypatch.setattr("training.ray_train.run_on_ray", lambda _config: False)
    with pytest.raises(StudentError, match=r"is not in .*/run: on Ray, run.path must be on a file system that this"):
        launch._on_ray(config, run)
    monkeypatch.setattr("training.ray_train.run_on_ray", lambda _config: True)
    assert launch._on_ray(config, run) == 0
    assert "stopped, and saved" in capsys.readouterr().err


def test_ray_has_to_be_told_where_and_how_many(store: LogitStore, tmp_path: Path) -> None:
    for launcher in ({"kind": "ray", "ranks": 2}, {"kind": "ray", "address": "auto"}):
        with pytest.raises(ConfigError, match="kind ray needs `address`"):
            parse_config(TrainConfig, make_config(tmp_path / "run", store, launcher=launcher), "test")
    with pytest.raises(ConfigError, match="belong to kind ray"):
        parse_config(TrainConfig, make_config(tmp_path / "run", store, launcher={"restarts": 2}), "test")
