"""`lvlm train` killed with SIGKILL and started again: the bits of an undisturbed run."""

import random

import pytest

from tests import soak
from tests.e2e import story
from tests.e2e.killed import STAGES, STEPS, finish, kill, new_workdir, result, rows, start, wait_until


@pytest.mark.nightly  # CI's share of kills is below
def test_three_kills_in_three_stages(tmp_path):
    album, whole, killed = (tmp_path / name for name in ("album", "whole", "killed"))
    story.write_album(album)
    finish(start(album, new_workdir(whole)))
    wanted, curves = result(whole)
    assert [row[0] for row in curves["instruct"]] == list(range(1, STEPS + 1))

    new_workdir(killed, compiled=whole)
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    for place in sorted(chance.sample(range(len(STAGES)), 3)):
        stage, step = STAGES[place], chance.randint(1, STEPS - 1)
        print(f"seed {seed}: killing {stage} after step {step}")
        process = start(album, killed)
        wait_until(lambda: rows(killed / stage / "metrics.jsonl") >= step, process)  # noqa: B023
        kill(process)
    finish(start(album, killed))
    got, again = result(killed)
    assert again == curves
    assert got == wanted


@pytest.mark.slow
def test_eight_kills_at_random_moments(tmp_path):
    report = soak.soak(tmp_path, kills=8, seed=random.SystemRandom().randrange(1 << 32))
    assert report.kills == 8
    assert report.runs >= 1
