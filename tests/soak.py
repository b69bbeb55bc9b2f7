"""SIGKILLs `lvlm train` at random moments, saves included, and starts it again: the bits of an undisturbed run.

Run:      python -m tests.soak --kills 50 --seed 0

Every second kill is aimed at a save: it falls while a ``checkpoints/N`` folder has no manifest, or right after. The
others fall evenly over a process's life from its first sign of training on. A run that has ended is compared, and the
next begins anew.
"""

import argparse
import dataclasses
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.e2e import story
from tests.e2e.killed import STAGES, finish, kill, new_workdir, result, rows, start, wait_until


@dataclasses.dataclass
class Report:
    """What a soak did. in_save: kills that left one more step without a manifest. runs: ended and compared."""

    kills: int = 0
    in_save: int = 0
    runs: int = 0


def soak(folder: Path, kills: int, seed: int) -> Report:
    """Kills `kills` processes in `folder`; AssertionError where a run then differs from the undisturbed one."""
    chance, report, album = random.Random(seed), Report(), folder / "album"
    print(f"seed {seed}, {kills} kills", flush=True)
    story.write_album(album)
    whole, life = _undisturbed(album, folder)
    wanted = result(whole)
    while report.kills < kills:
        workdir = new_workdir(folder / f"run{report.runs}", compiled=whole)
        while report.kills < kills and _killed(album, workdir, chance, life, report):
            pass
        finish(start(album, workdir))
        assert result(workdir) == wanted, f"seed {seed}: {workdir} differs from the undisturbed run"
        report.runs += 1
        print(f"run {report.runs} ended after {report.kills} kills in all: the same bits", flush=True)
        shutil.rmtree(workdir)
    return report


def _undisturbed(album: Path, folder: Path) -> tuple[Path, float]:
    """(workdir, seconds from the first step to the end) of a run that nobody kills and that need not compile."""
    cold = new_workdir(folder / "cold")
    finish(start(album, cold))
    whole = new_workdir(folder / "whole", compiled=cold)
    process = start(album, whole)
    wait_until(lambda: any(_progress(whole)), process)
    began = time.monotonic()
    finish(process)
    return whole, time.monotonic() - began


def _killed(album: Path, workdir: Path, chance: random.Random, life: float, report: Report) -> bool:
    """Starts the command and kills it; False where it ended before."""
    saving, nth = chance.random() < 0.5, chance.randint(1, 6)
    delay = chance.uniform(0, 0.05) if saving else chance.uniform(0, life)
    had, cut_off = _progress(workdir), _unfinished(workdir)
    process = start(album, workdir)
    wait_until(lambda: process.poll() is not None or _progress(workdir) != had, process)
    if saving:
        _wait_for_saves(process, workdir, nth)
    try:
        said, _ = process.communicate(timeout=delay)
        assert process.returncode == 0, said.decode()
        return False
    except subprocess.TimeoutExpired:
        kill(process)
    report.kills += 1
    unfinished = sorted(str(step.relative_to(workdir)) for step in _unfinished(workdir) - cut_off)
    report.in_save += bool(unfinished)
    where = f"at a save ({nth})" if saving else f"after {delay:.2f} s"
    left = f"; without a manifest: {', '.join(unfinished)}" if unfinished else ""
    print(f"kill {report.kills}: {where}, rows {_progress(workdir)}{left}", flush=True)
    return True


def _wait_for_saves(process: subprocess.Popen, workdir: Path, nth: int) -> None:
    """Until the nth save since now is under way, or the process has ended."""
    seen = _unfinished(workdir)  # cut off by an earlier kill
    while nth and process.poll() is None:
        now = _unfinished(workdir)
        nth -= len(now - seen)
        seen |= now
        time.sleep(0.0005)


def _progress(workdir: Path) -> list[int]:
    return [rows(workdir / name / "metrics.jsonl") for name in STAGES]


def _unfinished(workdir: Path) -> set[Path]:
    """Step folders that have no manifest yet."""
    return {step for step in workdir.glob("*/checkpoints/*") if not (step / "manifest.json").exists()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, help="default a random one, which is printed")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), args.kills, seed)
    print(f"{report.kills} kills, {report.in_save} of them in a save; {report.runs} runs ended, all with the same bits")


if __name__ == "__main__":
    sys.exit(main())
