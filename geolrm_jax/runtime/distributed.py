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
DAY = 86_400.0

_HOSTS = "geolrm/hosts/"
_barriers: collections.Counter[str] = collections.Counter()


def initialize(*, detect: bool = True, heartbeat: int = 100, timeout: int = 300) -> None:
    """Joins the processes of this run; does nothing where there is one only, or where it was called before.

    To be called before anything asks for a device. JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES
    and JAX_PROCESS_ID say who belongs together; what they leave open is taken from the cluster that JAX detects:
    Slurm, Open MPI, Cloud TPU, GKE, a Kubernetes job.

    Args:
      detect: False looks for no cluster.
      heartbeat: seconds without a sign of life after which a process counts as dead and all others end.
      timeout: seconds that processes wait for each other at the start; then they end.

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
    cluster = detected_cluster() if detect and len(given) < len(EXPLICIT) else None
    if not given and not cluster:
        return
    missing = [variable for name, variable in EXPLICIT.items() if name not in given]
    if missing and not cluster:
        raise ValueError(
            f"{', '.join(missing)} not set, and no cluster detected that would say: set all of {_listed()}"
        )
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


def detected_cluster() -> str | None:
    """What JAX calls the cluster that this process runs in, None outside of one."""
    for cluster in ClusterEnv._cluster_types:
        if not cluster.opt_in_only_method and cluster.is_env_present():
            return cluster.name
    return None


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
def only_first(name: str, timeout: float = DAY) -> Iterator[bool]:
    """True in the body on process 0, which does the work; the others leave when it is done.

    Args:
      name: of the work, for the error of `barrier`.
      timeout: seconds until those who wait give up. A first process that dies ends them sooner.
    """
    yield jax.process_index() == 0
    barrier(name, timeout)


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
