"""Compiled programs are kept between processes, and thrown away where they are not what was written."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import jax
import jax.numpy as jnp
from lvlm_jax import compilation
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
kept = compilation.keep(sys.argv[1], least_seconds=0.0)
print(kept, float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.eye(8))), len(hits))
"""


def compile_in(folder, **environment):
    """[whether programs are kept, a number that a program gave, how many programs were there already]."""
    line = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert "rror" not in done.stderr, done.stderr
    return done.stdout.split()


def entries(folder):
    return sorted(folder.glob("*-cache"))


@pytest.mark.slow
def test_programs_are_kept_and_damaged_ones_compiled_again(tmp_path):
    kept, number, hits = compile_in(tmp_path)
    assert (kept, hits) == ("True", "0")
    first = {entry: entry.read_bytes() for entry in entries(tmp_path)}
    assert {f"{entry.name}.sha256" for entry in first} == {file.name for file in tmp_path.glob("*.sha256")}
    assert compile_in(tmp_path) == ["True", number, str(len(first))]

    flipped, unsealed, cut, *rest = first
    flipped.write_bytes(bytes([first[flipped][0], first[flipped][1] ^ 1]) + first[flipped][2:])
    unsealed.with_name(f"{unsealed.name}.sha256").unlink()  # a kill came between the entry and its seal
    cut.write_bytes(first[cut][:-1])
    assert compile_in(tmp_path) == ["True", number, str(len(rest))]
    assert entries(tmp_path) == list(first)
    assert compile_in(tmp_path) == ["True", number, str(len(first))]


@pytest.mark.slow
def test_a_moved_folder_is_as_good(tmp_path):
    compile_in(tmp_path / "here")
    kept = len(entries((tmp_path / "here").rename(tmp_path / "there")))
    assert kept > 0
    assert compile_in(tmp_path / "there")[2] == str(kept)


@pytest.mark.slow
def test_a_cache_that_the_user_has_chosen_stays(tmp_path):
    assert compile_in(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))[0] == "False"
    assert not (tmp_path / "ours").exists()
