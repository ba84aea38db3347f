"""Several processes as one run: how they find each other, wait for each other and tell each other numbers.

JAX's coordination service does the work: process 0 holds it, all others send heartbeats; where one stops, the rest are
ended by JAX within the heartbeat's time-out. A run of one process needs none of it and starts none.
"""

import collections
import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax._src.clusters import ClusterEnv  # JAX has no public name for what it detects,
from jax._src.distributed import global_state  # nor for barriers that have an end
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from geolrm_jax.runtime import logging

EXPLICIT = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
SHUTDOWN = 60  # seconds that an ending process waits for the others
TPUS = ("tpu", "gcetpu", "gketpu")  # clusters whose chips only answer when a process of every host asks

_HOSTS = "geolrm/hosts/"
_TOLD = "RECEIVED_PREEMPTION_NOTICE"  # JAX's preemption service has written it: some process got SIGTERM
_barriers: collections.Counter[str] = collections.Counter()


def initialize(*, detect: bool = True, heartbeat: int = 100, timeout: int = 300, notices: bool = True) -> None:
    """Joins the processes of this run; does nothing where there is one only, or where it was called before.

    To be called before anything asks for a device. JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES
    and JAX_PROCESS_ID say who belongs together; what they leave open is taken from the cluster that JAX detects:
    Slurm, Open MPI, Cloud TPU, GKE, a Kubernetes job.

    Args:
      detect: False looks for no cluster.
      heartbeat: seconds without a sign of life after which a process counts as dead and all others end.
      timeout: seconds that processes wait for each other at the start; then they end.
      notices: whether JAX takes SIGTERM for `interruption`; otherwise it ends each process as always.

    Raises:
      ValueError: if a variable is no number, or one is missing and no cluster is there to give it.
      RuntimeError: if devices were asked for before.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[variable] for name, variable in EXPLICIT.items() if os.environ.get(variable)}
    for name in ("num_processes", "process_id"):
        if name in given:
            given[name] = _number(EXPLICIT[name], given[name])
    cluster = _cluster() if detect and len(given) < len(EXPLICIT) else None
    if not given and cluster is None:
        return
    missing = [name for name in EXPLICIT if name not in given]
    if missing and cluster is None:
        variables = ", ".join(EXPLICIT[name] for name in missing)
        raise ValueError(f"{variables} not set, and no cluster detected that would say: set all of {_listed()}")
    if "process_id" in missing:
        _ask(cluster, "get_process_id")
    jax.config.update("jax_enable_preemption_service", notices)
    jax.distributed.initialize(
        **given,
        cluster_detection_method=None if cluster else "deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    key = f"{_HOSTS}{global_state.process_id}"
    global_state.client.key_value_set(key, socket.gethostname(), allow_overwrite=True)


def _number(variable: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{variable}: expected a number, got {text!r}")
    return int(text)


def _listed() -> str:
    return ", ".join(EXPLICIT.values())


def _cluster() -> type[ClusterEnv] | None:
    """The cluster that JAX would take by itself."""
    types = (cluster for cluster in ClusterEnv._cluster_types if not cluster.opt_in_only_method)
    return next((cluster for cluster in types if cluster.is_env_present()), None)


def _ask(cluster: type[ClusterEnv], question: str) -> int:
    """A number that the cluster knows; a pod of Kubernetes need not belong to a job that has any."""
    try:
        return getattr(cluster, question)()
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{_name(cluster)} does not say which process this is ({error}): run it alone with --no-cluster, or set "
            f"all of {_listed()}"
        ) from error


def _name(cluster: type[ClusterEnv]) -> str:
    return cluster.name or cluster.__name__  # Kubernetes' has no name


def detected_cluster() -> str | None:
    """What JAX calls the cluster that this process runs in, None outside of one."""
    cluster = _cluster()
    return None if cluster is None else _name(cluster)


@contextlib.contextmanager
def by_one(*, detect: bool = True) -> Iterator[bool]:
    """True in the body on one process of those that a cluster starts, which does the work; the others leave.

    It starts no run of several processes, so that it may be called in a job beside one. Only on the hosts of a TPU
    slice, whose chips answer to all hosts or to none, they join and wait.

    Args:
      detect: False looks for no cluster: this process does it.

    Raises:
      ValueError: if a cluster is there and does not say which process this is.
    """
    cluster = _cluster() if detect else None
    given = os.environ.get(EXPLICIT["process_id"]) if detect else None
    if cluster is not None and cluster.name in TPUS:
        initialize(notices=False)
        with only_first("the work") as first:
            yield first
    elif given:
        yield _number(EXPLICIT["process_id"], given) == 0
    else:
        yield cluster is None or _ask(cluster, "get_process_id") == 0


def host_names() -> list[str]:
    """The host of each process, in the processes' order; two of one host have its name and their numbers."""
    if not jax.distributed.is_initialized():
        return [socket.gethostname()]
    found = {int(key.rsplit("/", 1)[1]): host for key, host in global_state.client.key_value_dir_get(_HOSTS)}
    names = [found.get(index, "an unknown host") for index in range(global_state.num_processes)]
    alone = collections.Counter(names)
    return [name if alone[name] == 1 else f"{name} (process {index})" for index, name in enumerate(names)]


def barrier(name: str, timeout: float) -> None:
    """Returns when all processes have called it as often with this name.

    Args:
      name: of what is waited for; it stands in the error.
      timeout: seconds.

    Raises:
      TimeoutError: if some have not come in time; the message names their hosts.
    """
    if not jax.distributed.is_initialized():
        return
    client = global_state.client
    _barriers[name] += 1
    place = f"geolrm/barriers/{name}/{_barriers[name]}"
    client.key_value_set(f"{place}/{global_state.process_id}", "here", allow_overwrite=True)
    begun = time.monotonic()
    try:
        client.wait_at_barrier(place, int(1000 * timeout))
    except JaxRuntimeError as error:
        if time.monotonic() - begun < 0.9 * timeout:
            raise  # another process has died: JAX says which
        here = {int(key.rsplit("/", 1)[1]) for key, _ in client.key_value_dir_get(f"{place}/")}
        missing = [host for index, host in enumerate(host_names()) if index not in here]
        raise TimeoutError(
            f"{name}: {', '.join(missing) or 'a process'} did not come within {timeout:g} seconds; "
            f"{len(here)} of {global_state.num_processes} processes waited"
        ) from error


@contextlib.contextmanager
def only_first(name: str) -> Iterator[bool]:
    """True in the body on process 0, which does the work; the others leave when it is done, however long it takes.

    Args:
      name: of the work, for the error.

    Raises:
      ValueError: on the others, if the work ended with an error on process 0, which says which. If that process dies
        JAX ends them.
    """
    if not jax.distributed.is_initialized():
        yield True
        return
    _barriers[name] += 1
    client, place = global_state.client, f"geolrm/done/{name}/{_barriers[name]}"
    if global_state.process_id == 0:
        try:
            yield True
        except BaseException:
            client.key_value_set(place, "failed")
            raise
        client.key_value_set(place, "done")
        return
    yield False
    while (result := _read(place)) is None:
        pass
    if result != "done":
        raise ValueError(f"{name} failed: process 0 says why")


def _read(place: str, seconds: int = 60) -> str | None:
    """What a process has written there, or does within so many seconds."""
    try:
        return global_state.client.blocking_key_value_get(place, 1000 * seconds)
    except JaxRuntimeError as error:
        if not str(error).startswith("DEADLINE_EXCEEDED"):
            raise
        return None


def told() -> bool:
    """Whether JAX's coordination service knows of a SIGTERM to any process of this run; False if there is none."""
    if not jax.distributed.is_initialized():
        return False
    try:
        return bool(global_state.client.key_value_try_get(_TOLD))
    except JaxRuntimeError:  # not there; nor is the service, perhaps, and then JAX ends the process
        return False


def per_host(values: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The same numbers of every process, each as an array in the processes' order; all must call this together."""
    numbers = np.array(list(values.values()), np.float32)
    gathered = multihost_utils.process_allgather(numbers) if jax.process_count() > 1 else numbers[None]
    return dict(zip(values, gathered.T, strict=True))


def extremes(of_hosts: Mapping[str, np.ndarray]) -> dict[str, dict[str, tuple[float, str]]]:
    """Of what `per_host` gives the lowest and the highest of each number, with the host: `{name: {min, max}}`."""
    hosts = host_names()
    return {
        name: {word: (float(of_all[i]), hosts[i]) for word, i in (("min", of_all.argmin()), ("max", of_all.argmax()))}
        for name, of_all in of_hosts.items()
    }


def say_who() -> None:
    """One line about the processes, if there are several."""
    if jax.process_count() > 1:
        hosts = {name.split(" ")[0] for name in host_names()}
        logging.notice(
            f"{jax.process_count()} processes on {len(hosts)} hosts, {jax.local_device_count()} devices each"
        )
