"""`lvlm bench` on the tiny model, against the real torch library in a process of its own."""

import json
import os
import signal
import sys

import numpy as np
import pytest

from lvlm_jax import cli
from lvlm_jax import params as trees
from lvlm_jax.bench import case, generate, host, reference, run, train
from lvlm_jax.bench.setting import SidesDiffer

ROWS = {
    "train": ["train, all trained", "train, vision frozen"],
    "prefill": ["prefill, 1 row", "prefill, 8 rows"],
    "decode": ["decode, 1 row", "decode, 8 rows"],
    "data": ["data, JPEG", "data, PNG"],
    "import": ["import"],
}
"""What each part measures."""


@pytest.mark.nightly
def test_every_part_in_turns_with_torch(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert cli.main(["bench", *ROWS, "--model", "tiny", "--rounds", "1", "--json", str(file)]) == 0
    said, found = capsys.readouterr(), json.loads(file.read_text())
    names = [name for part in ROWS.values() for name in part]
    assert [row["name"] for row in found["rows"]] == names
    for row in found["rows"]:
        (ours,), (theirs,) = row["seconds"].values()
        (ratio,) = row["ratio"].values()
        assert ours > 0
        assert ratio["least"] == ratio["median"] == ratio["largest"] == pytest.approx(theirs / ours)
        assert row["rate"]["ours"]["median"] == pytest.approx(row["work"] / ours)
        assert 0 <= row["difference"] < 1e-4
    whole, frozen = found["rows"][:2]
    assert whole["work"] == 8 * case.CASES["tiny"].length
    assert whole["flops"] > frozen["flops"] > 0
    assert "torch 2." in found["about"]["torch side"]
    assert "jax " in found["about"]["this side"]
    for name in names:
        assert f"\n{name} " in said.out
    assert "round 1 of 1" in said.err


@pytest.mark.slow
@pytest.mark.parametrize("part", [pytest.param("train", marks=pytest.mark.nightly), "decode"])
def test_sides_with_different_rows_fail(part, monkeypatch):
    def other_rows(path, examples, measured, labels):
        others = case.make_examples(measured, len(examples), seed=1)
        cut = others if labels else [case.prompt_of(example, measured) for example in others]
        return case.write_inputs(path, cut, measured, labels)

    monkeypatch.setattr({"train": train, "decode": generate}[part], "write_inputs", other_rows)
    with pytest.raises(SidesDiffer, match=rf"{part}, .* differ by .* of the largest value, more than 0.0001"):
        run.run([part], model="tiny", rounds=1, python=sys.executable)


@pytest.mark.slow
def test_a_difference_is_a_failed_check_not_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(host, "preprocess", lambda image, spec: case.preprocess(image, spec) + 0.01)
    assert cli.main(["bench", "data", "--model", "tiny", "--rounds", "1"]) == 1
    assert "lvlm bench: data, JPEG, pixels: this library and torch differ by" in capsys.readouterr().err


def test_a_reference_that_dies_says_at_what():
    with reference.Reference(sys.executable) as side:
        os.kill(side._process.pid, signal.SIGKILL)
        with pytest.raises(reference.ReferenceFailed, match="ended with status -9 at 'hello'"):
            side.ask("hello")


def test_a_command_that_fails_there_is_told_and_the_next_one_is_answered():
    with reference.Reference(sys.executable) as side:
        with pytest.raises(reference.ReferenceFailed, match="the torch side failed at 'train': KeyError: 'nothing'"):
            side.ask("train", name="nothing")
        assert side.ask("hello")["platform"] == "cpu"


def test_both_sides_read_the_weights_that_were_made(tmp_path):
    folder = case.write_folder(tmp_path / "model", case.CASES["tiny"])
    with reference.Reference(sys.executable) as side:
        theirs = side.ask("load", folder=str(folder), dtype="float32")["sum"]
    weights = case.make_weights(case.CASES["tiny"].config)
    assert theirs == pytest.approx(sum(float(np.abs(leaf).max()) for leaf in trees.flatten(weights).values()))
