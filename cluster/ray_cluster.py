"""The Ray cluster: join one, or start one of our own. Only this file, ray_tasks and ray_workers import ray."""

import importlib.util
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from logit_store.errors import ConfigError

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray's job server for the entry point of a submitted job."""


def in_submitted_job() -> bool:
    """Whether this process is the entry point of a `ray job submit`."""
    return JOB_VARIABLE in os.environ


@contextmanager
def session(config: ClusterConfig) -> Iterator[None]:
    """Join the cluster at ``config.address`` (in a submitted job: the job's own), or start a local one.

    A local cluster listens on loopback alone and asks for a token that nobody else knows. It lives in a short
    temporary folder (Ray's socket paths must stay under 107 bytes) that is removed at the end.
    Raises ConfigError: no cluster answers, or it refuses our token.
    """
    import ray

    options: dict[str, Any] = {"logging_level": "WARNING"}
    with ExitStack() as stack:
        if in_submitted_job():
            options |= {"address": "auto"}
        elif config.address is not None:
            _check_answers(config.address)
            options |= {"address": config.address, "runtime_env": {"py_modules": _own_packages()}}
        else:
            options |= {"address": "local", "include_dashboard": False, "_temp_dir": stack.enter_context(_only_ours())}
        stack.callback(ray.shutdown)
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"no Ray cluster answers at {options['address']!r}: {reason}") from error
        yield


@contextmanager
def _only_ours() -> Iterator[str]:
    """A folder for a cluster that this process starts: nobody else can reach it while the block lasts.

    Ray binds to loopback only on nodes whose own address is loopback, and takes such a `_node_ip_address` for a
    mistake (services.resolve_ip_for_localhost): what it does on macOS and Windows has to be asked for. Its metrics
    are served without a token even so. Raises ConfigError: the folder cannot be made.
    """
    import ray._private.ray_constants as constants

    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before, clustered = {name: os.environ.get(name) for name in ours}, constants.ENABLE_RAY_CLUSTER
    parent = os.environ.get("RAY_TMPDIR", "/tmp")
    try:
        folder = tempfile.mkdtemp(prefix="ray", dir=parent)
    except OSError as error:
        raise ConfigError(
            f"a local Ray cluster needs a folder in {parent}, and there can be none ({error.strerror}): set RAY_TMPDIR "
            "to a short path that can be written"
        ) from error
    try:
        _set_environment(ours)
        constants.ENABLE_RAY_CLUSTER = False
        yield folder
    finally:
        constants.ENABLE_RAY_CLUSTER = clustered
        _set_environment(before)
        shutil.rmtree(folder, ignore_errors=True)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    """Set (None: remove) variables of authentication, and have Ray read them again: it did so when it was imported."""
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, Config

    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def check_room(config: ClusterConfig) -> None:
    """Refuse a cluster that cannot hold all workers, each on one node or, as ``multi_node_workers``, a GPU at a time:
    those without a place would wait for ever. One that grows by itself is believed to. Raises ConfigError.
    """
    import ray

    if config.autoscaling:
        return
    needs, pieces = config.reserved, config.pieces_per_worker
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    remedy = "lower one of them, join a larger cluster, or say cluster.autoscaling=true if it grows by itself"
    for name, each in needs.items():
        wanted, have = config.workers * pieces * each, sum(node.get(name, 0.0) for node in nodes)
        if wanted > have:
            key = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker"}.get(name, f"resources_per_worker.{name}")
            times = " × cluster.gpus_per_worker" if pieces > 1 and name != "GPU" else ""
            raise ConfigError(
                f"cluster.workers × cluster.{key}{times} = {wanted:g}, but the cluster has {have:g} {name}s: {remedy}"
            )
    # Ray counts in ten-thousandths.
    room = sum(min(int(node.get(name, 0.0) / each + 1e-4) for name, each in needs.items()) for node in nodes)
    if room < config.workers * pieces:
        raise ConfigError(
            f"cluster.workers = {config.workers} need {needs} each{f', {pieces} times' if pieces > 1 else ''}, on one "
            f"node, and the {len(nodes)} nodes have room for {room} such places: {remedy}"
        )


def _own_packages() -> list[str]:
    """Folders of the packages that workers import: a cluster joined by address runs this very code."""
    specs = [importlib.util.find_spec(name) for name in ("cluster", "logit_store")]
    return [str(Path(spec.origin).parent) for spec in specs if spec and spec.origin]


def _check_answers(address: str) -> None:
    """Refuse within seconds an address where no cluster listens, or one that refuses our token.

    Ray itself would try for minutes, and then not say why. Raises ConfigError.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # `auto` and the like, which Ray resolves by itself
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at {address!r}: {error}") from error
    if not address.startswith("ray://"):  # that is another protocol
        _check_token(address)


def _check_token(address: str) -> None:
    """Ask the cluster's books whether they are there. Raises ConfigError: they refuse our token, or are none."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    remedy = "export RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH)"
    with init_grpc_channel(address) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=10)
        except AuthenticationError as error:
            raise ConfigError(f"{error.message.rstrip('.')}: {remedy}") from error
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(f"the Ray cluster at {address!r} refuses our token: {remedy}") from error
            raise ConfigError(f"what listens at {address!r} is no Ray cluster: {error.details()}") from error
