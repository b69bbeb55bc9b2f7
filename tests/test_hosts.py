import subprocess
import sys
import time

import jax
import pytest

from lvlm_jax import hosts
from lvlm_jax.errors import Alone
from lvlm_jax.hosts import Group, HostError, Watchdog, group
from tests.processes.start import free_port


def test_alone_unless_somebody_says_otherwise():
    assert group(environment={}) is None
    assert group(environment={"LVLM_DISTRIBUTED": "0", "SLURM_NTASKS": "4"}) is None
    assert not hosts.several()


def test_flags_before_environment():
    spoken = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert group(environment=spoken) == Group("10.0.0.1:1", 4, 3)
    assert group("h:2", 8, 0, environment=spoken) == Group("h:2", 8, 0)
    assert group(detect=True, environment={}) == Group()
    assert group(environment={"LVLM_DISTRIBUTED": "1"}) == Group()


@pytest.mark.parametrize(
    ("given", "spoken", "said"),
    [
        (("h:1", 2, None), {}, "--process (JAX_PROCESS_ID) missing"),
        ((None, None, 1), {}, "--coordinator (JAX_COORDINATOR_ADDRESS), --processes"),
        (("h", 2, 0), {}, "--coordinator=h: give the host and the port"),
        (("h:1", 2, 2), {}, "numbered from 0 to 1"),
        (("h:1", None, 0), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' is not a number"),
    ],
)
def test_half_a_group(given, spoken, said):
    with pytest.raises(HostError) as error:
        group(*given, environment=spoken)
    assert said in str(error.value)


def test_a_coordinator_that_never_answers():
    began = time.monotonic()
    with pytest.raises(Alone, match="did not answer within 1 s"):
        hosts.join(Group(f"localhost:{free_port()}", 2, 1), seconds=1.0)
    assert time.monotonic() - began < 5


def test_what_is_compared():
    found = hosts.facts(recipe={"seed": 0})
    assert found["recipe"] == {"seed": 0}
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert found["devices"].endswith("cpu")
    hosts.compare(found)  # one process is equal to itself


WATCHED = """
import sys, time
from lvlm_jax.hosts import Watchdog

def waits_for_nothing():
    time.sleep(30)

with Watchdog(0.4, "nothing was heard") as watchdog:
    for _ in range(4):
        time.sleep(0.2)
        watchdog.heard()
    with watchdog.asleep():
        time.sleep(1)
    print("so far", flush=True)
    waits_for_nothing()
"""


def test_the_watchdog_ends_a_process_that_hangs():
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=60)
    assert done.stdout == "so far\n"
    assert done.returncode == Alone.status
    assert "nothing was heard" in done.stderr
    assert "waits_for_nothing" in done.stderr


def test_the_watchdog_lets_go():
    with Watchdog(0.2, "never said"):
        pass
    with Watchdog(0.0, "never said"):
        time.sleep(0.1)
    time.sleep(0.4)


def test_alone_an_error_stays_an_error():
    with pytest.raises(KeyError), hosts.together():
        raise KeyError("x")
