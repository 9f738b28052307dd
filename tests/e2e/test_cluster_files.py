"""Clusters that grow: the file for `ray up` and the Kubernetes objects, checked as far as that goes without a cloud."""

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.config import CacheConfig
from logit_store.config import load_config
from tests.e2e.test_docker import CLUSTER_FILE, RAYJOB_FILE, ROOT, check_options, check_ours, help_of, values

CLUSTER: dict[str, Any] = yaml.safe_load(CLUSTER_FILE.read_text())
OBJECTS: dict[str, Any] = {found["kind"]: found for found in yaml.safe_load_all(RAYJOB_FILE.read_text())}
TEACHER = ROOT / "docker/teacher.Dockerfile"

# The autoscaler's cluster


def test_the_cluster_file_is_what_ray_up_accepts() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled = prepare_config(json.loads(json.dumps(CLUSTER)))
    validate_config(filled)
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(filled | {"idle_timeout": 3})


def test_the_cluster_grows_by_gpu_nodes_alone() -> None:
    types = CLUSTER["available_node_types"]
    head = types[CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    (workers,) = [node for name, node in types.items() if name != CLUSTER["head_node_type"]]
    assert workers["min_workers"] == 0
    assert workers["max_workers"] == CLUSTER["max_workers"] > 0


def test_every_node_of_the_cluster_asks_for_the_token() -> None:
    starts = [
        line for key in ("head", "worker") for line in CLUSTER[f"{key}_start_ray_commands"] if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]  # `ray dashboard` comes through ssh
    assert "/home/decant/.ray/auth_token" in CLUSTER["file_mounts"]
    assert "RAY_AUTH_TOKEN" not in CLUSTER_FILE.read_text()


def test_the_image_holds_what_ray_up_runs_in_it() -> None:
    (packages,) = [step for step in values(TEACHER, "RUN") if "apt-get install" in step]
    assert {"openssh-client", "rsync"} <= set(packages.split())
    made = " ".join(values(TEACHER, "RUN"))
    assert "useradd --create-home --uid 1000 decant" in made  # whose home the token is mounted into


# Kubernetes. There is no cluster here and no CRD: what the API server would check is checked by hand, after the Go
# types of KubeRay 1.6 (ray-operator/apis/ray/v1) and what its autoscaling and RayJob pages ask for.


def pod_templates() -> dict[str, Any]:
    spec = OBJECTS["RayJob"]["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"], **groups}


def test_the_rayjob_has_the_fields_of_its_kind() -> None:
    job = OBJECTS["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    assert set(job["spec"]) <= {
        "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
        "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata",
        "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig",
        "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
    }  # fmt: skip
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["backoffLimit"] > 0
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) <= {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
        "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
    }  # fmt: skip
    assert cluster["rayVersion"] == metadata.version("ray") == "2.60.0"
    assert cluster["authOptions"] == {"mode": "token", "secretName": "decant-ray-token"}
    assert cluster["enableInTreeAutoscaling"] is True
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert {"rayStartParams", "template"} <= set(group)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # a map of strings in Go
        check_options([f"--{name}" for name in group["rayStartParams"]], help_of("ray", "start"))


def test_the_head_works_for_nobody_and_workers_come_for_gpus() -> None:
    cluster = OBJECTS["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == 1


@pytest.mark.parametrize("name", ["head", "gpu"])
def test_pods_can_run_the_image(name: str) -> None:
    spec = pod_templates()[name]["spec"]
    assert spec["restartPolicy"] == "Never"
    assert spec["securityContext"]["runAsUser"] == int(values(TEACHER, "USER")[-1])
    (container,) = spec["containers"]
    assert container["image"].endswith("/decant-teacher:0.1.0")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    for kind in ("requests", "limits"):
        assert {"cpu", "memory"} <= set(container["resources"][kind])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    claims = [v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]]
    assert not any("TOKEN" in variable["name"] and "value" in variable for variable in container.get("env", []))


def test_the_jobs_entry_point_is_what_our_command_line_takes() -> None:
    job = OBJECTS["RayJob"]["spec"]
    shell, option, script = shlex.split(job["entrypoint"])
    assert (shell, option) == ("sh", "-c")
    steps = [shlex.split(step) for step in script.split("&&")]
    assert [step[3] for step in steps] == ["tokenize", "cache"]
    mounts = {
        mount["name"]: mount["mountPath"] for mount in pod_templates()["head"]["spec"]["containers"][0]["volumeMounts"]
    }
    for program, (verb, path, *overrides) in [(step[:3], step[3:]) for step in steps]:
        assert path == f"{mounts['config']}/cache.yaml"
        check_ours(program, [verb, "configs/single_node/cache.yaml", *overrides])  # the one that its head names
        config = load_config(CacheConfig, ROOT / "configs/single_node/cache.yaml", overrides)
        for output in (config.tokens.path, config.store.path):
            assert Path(output).is_relative_to(mounts["runs"]), "a job's own folder is thrown away"
        if verb == "cache":
            group = job["rayClusterSpec"]["workerGroupSpecs"][0]
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert config.cluster.workers <= group["maxReplicas"]
            assert config.cluster.cpus_per_worker <= int(limits["cpu"])
            assert config.cluster.gpus_per_worker <= int(limits["nvidia.com/gpu"])
