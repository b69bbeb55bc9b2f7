"""Hosts measure a data set together: each a share of the records, all with the same result."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lvlm_jax.data import lengths as module
from lvlm_jax.data.lengths import Hosts, measure_lengths
from lvlm_jax.data.sources import LlavaJson
from lvlm_jax.processing.encode import DataError


class Room:
    """What the hosts of one test exchange, by threads."""

    def __init__(self, hosts):
        self.hosts, self.barrier, self.said = hosts, threading.Barrier(hosts), [b""] * hosts

    def host(self, number):
        def exchange(data):
            self.said[number] = data
            self.barrier.wait(20)
            heard = list(self.said)
            self.barrier.wait(20)
            return heard

        return Hosts(number, self.hosts, exchange)


def together(count, work):
    """work(number, hosts) on so many threads; what each returns or raises."""
    room, out = Room(count), [None] * count

    def run(number):
        try:
            out[number] = work(number, room.host(number))
        except Exception as error:
            out[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return out


class Counted(LlavaJson):
    """Counts how often each record is read."""

    def __init__(self, path):
        super().__init__(path)
        self.read = []

    def __getitem__(self, index):
        self.read.append(int(index))
        return super().__getitem__(index)


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_host_reads_its_share_and_all_know_everything(album, encoder, spec, tmp_path, blocks, count):
    with album.open("a") as out:
        out.write(json.dumps({"id": "bad"}) + "\n")
    wanted = measure_lengths(LlavaJson(album), encoder, progress=False, on_bad="skip", spec=spec)
    sources = [Counted(album) for _ in range(count)]

    def work(number, hosts):
        cache = tmp_path / str(number)
        return measure_lengths(sources[number], encoder, cache, progress=False, on_bad="skip", spec=spec, hosts=hosts)

    for got in together(count, work):
        np.testing.assert_array_equal(got.lengths, wanted.lengths)
        np.testing.assert_array_equal(got.pictures, wanted.pictures)
        assert got.bad == wanted.bad
    assert sorted(i for source in sources for i in source.read) == list(range(41))
    assert all(len(source.read) <= 41 // count + 3 for source in sources)
    for source in sources:
        source.read.clear()
    together(count, work)  # from each host's cache
    assert not any(source.read for source in sources)


def test_one_host_has_it_in_its_cache(album, encoder, tmp_path, blocks):
    wanted = measure_lengths(Counted(album), encoder, tmp_path / "1", progress=False)
    sources = [Counted(album) for _ in range(3)]
    found = together(
        3, lambda n, hosts: measure_lengths(sources[n], encoder, tmp_path / str(n), progress=False, hosts=hosts)
    )
    assert all((got.lengths == wanted.lengths).all() for got in found)
    assert not any(source.read for source in sources)
    assert all(list((tmp_path / str(n)).glob("*.npz")) for n in range(3))


def test_all_hosts_stop_at_the_same_bad_record(album, encoder, blocks):
    lines = album.read_text().splitlines()
    lines[7], lines[20] = "{", "{"
    album.write_text("\n".join(lines))
    errors = together(2, lambda n, hosts: measure_lengths(LlavaJson(album), encoder, progress=False, hosts=hosts))
    assert [type(error) for error in errors] == [DataError] * 2
    assert str(errors[0]) == str(errors[1])
    assert f"{album}:8: broken JSON" in str(errors[0])


SCRIPT = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from lvlm_jax import assemble
hosts = assemble._hosts()
said = [b"", b"a" * 1000] if sys.argv[2] == "1" else [b"", b"bc"]
print(hosts.host, hosts.hosts, [hosts.exchange(data) == want for data, want in
      zip(said, ([b"", b""], [b"bc", b"a" * 1000]))])
"""


@pytest.mark.slow
def test_two_processes_exchange_bytes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[2]
    line = [sys.executable, "-c", SCRIPT, port]
    started = [subprocess.Popen([*line, str(n)], cwd=root, stdout=subprocess.PIPE, text=True) for n in range(2)]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [text.splitlines()[-1] for text in said] == [f"{n} 2 [True, True]" for n in range(2)]
