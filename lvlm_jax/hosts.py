"""The processes of one run: how they join, make sure that they are the same, and end together.

JAX's own runtime of many controllers does the work (`jax.distributed`); here stands what it leaves to its users: who
is told what, a comparison before the first step, and an end for all when one of them has gone or hangs.
"""

import contextlib
import dataclasses
import faulthandler
import hashlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lvlm_jax.config import unequal
from lvlm_jax.errors import MISTAKES, Alone, Ended
from lvlm_jax.versions import versions

JOIN_SECONDS = 300.0
"""How long a process waits for the others before the first step."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "grain", "libtpu")
"""What must be of one version on every host: programs, batches and files depend on it."""


class HostError(ValueError):
    """The processes of a run cannot work together; names both sides."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Where process 0 listens (``host:port``), how many processes there are, and which one this is.

    All three are None where JAX finds them out itself: TPU pods, GKE, SLURM, Open MPI.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def group(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    detect: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> Group | None:
    """The group to join, by flags or else by environment; None where neither says that there is one.

    Args:
      coordinator, processes, process: as `Group` has them; each by default from ``JAX_COORDINATOR_ADDRESS``,
        ``JAX_NUM_PROCESSES``, ``JAX_PROCESS_ID``.
      detect: JAX finds the group; also by ``LVLM_DISTRIBUTED=1``.

    Raises:
      HostError: some of the three without the others, a number that is none or out of range, no port.
    """
    given = {
        "--coordinator (JAX_COORDINATOR_ADDRESS)": coordinator or environment.get("JAX_COORDINATOR_ADDRESS"),
        "--processes (JAX_NUM_PROCESSES)": _number(processes, "JAX_NUM_PROCESSES", environment),
        "--process (JAX_PROCESS_ID)": _number(process, "JAX_PROCESS_ID", environment),
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return Group() if detect or environment.get("LVLM_DISTRIBUTED", "0") not in ("", "0") else None
    if missing:
        raise HostError(f"{', '.join(missing)} missing: give all three, or --distributed where JAX can find them")
    address, count, number = given.values()
    if not address.rpartition(":")[2].isdigit():
        raise HostError(f"--coordinator={address}: give the host and the port of process 0, as in 10.0.0.1:8476")
    if not 0 <= number < count:
        raise HostError(f"--process={number} of --processes={count}: the processes are numbered from 0 to {count - 1}")
    return Group(address, count, number)


def _number(value: int | None, name: str, environment: Mapping[str, str]) -> int | None:
    if value is None and (text := environment.get(name)):
        if not text.isdigit():
            raise HostError(f"{name}={text!r} is not a number")
        return int(text)
    return value


def join(found: Group, seconds: float = JOIN_SECONDS) -> None:
    """Joins the group; before anything asks JAX for devices.

    Raises:
      Alone: the coordinator does not answer. HostError: JAX knows no group here.

    A process that others leave waiting past `seconds` prints so and exits with status 75: JAX would abort it.
    """
    if found.coordinator and found.process:
        _knock(found.coordinator, found.process, seconds)
    where = found.coordinator or "the coordinator that JAX found"
    count = "not all" if found.processes is None else f"fewer than {found.processes}"
    told = f"{count} processes came to {where} within {seconds:.0f} s: is each one started, and do their ports open?"
    timer = threading.Timer(seconds, _give_up, (told,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            found.coordinator, found.processes, found.process, initialization_timeout=int(seconds) + 60
        )
    except ValueError as error:
        raise HostError(
            f"--distributed: JAX knows no group of processes here ({error}); on a TPU pod, GKE, SLURM or Open MPI "
            "it finds one, elsewhere give --coordinator HOST:PORT --processes N --process I"
        ) from error
    finally:
        timer.cancel()


def _give_up(told: str) -> None:
    try:
        print(f"lvlm: {told}", file=sys.stderr, flush=True)
    finally:
        os._exit(Alone.status)


def _knock(address: str, process: int, seconds: float) -> None:
    """Waits until process 0 listens; without it JAX would end this process after a while, without saying why."""
    host, _, port = address.rpartition(":")
    deadline, why = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return
        except OSError as error:
            why = str(error)
            time.sleep(0.2)
    raise Alone(
        f"process {process}: the coordinator {address} did not answer within {seconds:.0f} s ({why}); is process 0 "
        "started there, and is the port open between the hosts?"
    )


def several() -> bool:
    """Whether this process has joined others; asks no backend."""
    return jax.distributed.is_initialized()


# ---------------------------------------------------------------------------------------------------------------------
# The same on all


def exchange(data: bytes) -> list[bytes]:
    """This process's bytes -> every process's, in their order; all call it, and as often."""
    if jax.process_count() == 1:
        return [data]
    from jax.experimental.multihost_utils import process_allgather

    sizes = np.asarray(process_allgather(np.int32(len(data)))).ravel().tolist()
    if not max(sizes):
        return [b""] * len(sizes)
    padded = np.frombuffer(data.ljust(max(sizes), b"\0"), np.uint8)
    gathered = np.asarray(process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes() for row, size in zip(gathered, sizes, strict=True)]


def agree(value: int) -> int:
    """The first process's value on every process; also a barrier. Free on one process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def facts(**asked: Any) -> dict[str, Any]:
    """What must be equal on every process: code, versions, devices, and what the run was asked (JSON values)."""
    return {
        "code of lvlm_jax": _code(),
        "versions": versions(PACKAGES),
        "devices": f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}",
        **asked,
    }


def compare(mine: Mapping[str, Any], seconds: float = JOIN_SECONDS) -> None:
    """Makes sure that all processes have the same `facts`, or tells every one of them who differs, and in what.

    Raises:
      HostError: some differ from process 0; the same text on all.
    """
    told = f"some process of {jax.process_count()} gave no answer within {seconds:.0f} s"
    with Watchdog(seconds, told) as watchdog:
        watchdog.heard()
        name = f"{jax.process_index()} on {socket.gethostname()}"
        rows = [json.loads(row) for row in exchange(json.dumps([name, mine]).encode())]
    (first, wanted), *others = rows
    found = []
    for name, theirs in others:
        lines = [f"{path} is {there!r}, not {here!r}" for path, here, there in unequal(wanted, theirs)]
        found += [f"process {name}: {'; '.join(lines[:6])}"] if lines else []
    if found:
        raise HostError(f"not the same as on process {first}. {'. '.join(found)}. Install and start the same on all")


def _code() -> str:
    """A digest of the package's own source: a checkout that someone forgot to pull has the same version."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------------
# The end


class Watchdog:
    """Ends the process when nothing is heard for some time: who waits for a host that has gone may wait forever.

    Example:
      >>> from lvlm_jax.hosts import Watchdog
      >>> with Watchdog(1800.0, "no step was finished within 30 minutes") as watchdog:
      ...     for step in range(3):
      ...         watchdog.heard()

    Args:
      seconds: of silence, from the first `heard` on (a first step compiles); 0 waits forever. told: printed, before
        the stacks of all threads and the end of the process with status 75.
    """

    def __init__(self, seconds: float, told: str) -> None:
        self.seconds, self.told = seconds, told
        self._last: float | None = None
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def heard(self) -> None:
        """Something happened."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """What runs inside may take as long as it likes."""
        self._last = None
        yield
        self.heard()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._halt.set()
        if self.seconds:
            self._thread.join()

    def _watch(self) -> None:
        while not self._halt.wait(min(1.0, self.seconds / 10)):
            last = self._last
            if last is not None and time.monotonic() - last > self.seconds:
                try:
                    print(f"lvlm: {self.told}", file=sys.stderr, flush=True)
                    faulthandler.dump_traceback(sys.stderr, all_threads=True)
                finally:
                    leave(Alone.status)


LOST = ("Gloo", "coordination service", "Connection closed by peer", "heartbeat", "NCCL")
"""Words in the errors of a process whose partner has gone."""


@contextlib.contextmanager
def together(debug: bool = False) -> Iterator[None]:
    """What fails inside ends this process at once, with its message, so that none of the others waits for it.

    Without effect for a process that is alone. debug: a traceback for mistakes too.
    """
    try:
        yield
    except Exception as error:
        if not several():
            raise
        status, said = _ending(error, debug)
        try:
            print(f"lvlm: process {jax.process_index()} of {jax.process_count()}: {said}", file=sys.stderr)
        finally:
            leave(status)


def _ending(error: Exception, debug: bool) -> tuple[int, str]:
    """(exit status, words) of an error that ends one process of several."""
    if any(word in str(error) for word in LOST):
        why = str(error).partition("\n")[0][:200]
        return Alone.status, (
            f"another process of this run has gone ({why}); its own output says why. Start the same command on all "
            "hosts: it resumes"
        )
    # Of several hosts one may meet what another time it does not: only what all of them were asked is a mistake.
    status = getattr(error, "status", 2 if isinstance(error, (ValueError, ImportError)) else 1)
    if isinstance(error, (Ended, *MISTAKES)) and not debug:
        return status, str(error)
    return status, "".join(traceback.format_exception(error))


def leave(status: int) -> None:
    """Ends this process at once, without the farewell of JAX's runtime, which waits for all the others.

    Process 0 stays for two seconds: the runtime ends the others as soon as it is gone, and they too have a message.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, a closed pipe
            stream.flush()
    if several() and jax.process_index() == 0:
        time.sleep(2)
    os._exit(status)
