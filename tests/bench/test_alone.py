"""`lvlm bench` without a torch side, and what it says where there is none."""

import json
import sys

import pytest

from lvlm_jax import cli, cli_bench
from lvlm_jax.bench import reference, run


def test_the_command_knows_every_part():
    assert list(cli_bench.PARTS) == list(run.PARTS)


@pytest.mark.slow
def test_alone_there_are_absolute_figures(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "data", "--model", "tiny", "--rounds", "2", "--no-reference", "--json", str(file)]) == 0
    said, found = capsys.readouterr().out, json.loads(file.read_text())
    assert [list(row["seconds"]) for row in found["rows"]] == [["ours"], ["ours"]]
    assert [row["difference"] for row in found["rows"]] == [None, None]
    assert "torch side: none" in said
    assert "pictures/s" in said


def test_an_interpreter_without_torch(monkeypatch, capsys):
    monkeypatch.setattr(reference, "find_spec", lambda name: None)
    assert cli.main(["bench", "data", "--model", "tiny"]) == 2
    assert "torch is not installed in" in (said := capsys.readouterr().err)
    assert "--reference-python PATH" in said


def test_a_reference_interpreter_without_torch(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.base_prefix}/bin/python3" -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ValueError, match=r"--reference-python=.*No module named 'torch'; give an interpreter"):
        reference.Reference(str(bare))
    with pytest.raises(ValueError, match="nowhere: cannot be run"):
        reference.Reference(str(tmp_path / "nowhere"))


def test_a_reference_that_dies_at_its_start_says_what_it_said(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(reference.ReferenceFailed, match=r"ended with status 3 at 'hello'\. It said: no such library"):
        reference.Reference(str(broken))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bench data --rounds 0", "--rounds=0: at least 1"),
        ("bench data --model 80b --no-reference", "'80b' is not known; choose of tiny, 80m, 1b, 7b"),
        ("bench data --no-reference --compile", "leave out --reference-python and --compile"),
    ],
)
def test_mistakes_are_told_at_once(line, said, capsys):
    assert cli.main(line.split()) == 2
    assert said in capsys.readouterr().err
