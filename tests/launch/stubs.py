"""Programs that stand in for clouds and clusters: they write down their calls and answer as a test laid out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch"))
READ = set(re.findall(r"\b[A-Z][A-Z_]+(?==|:[-=?])", "".join(path.read_text() for path in SCRIPTS)))
"""Variables that scripts name; those of the one who runs the tests stay out."""
NAMES = ("gcloud", "kubectl", "xpk", "sbatch", "srun", "docker", "lvlm", "gcsfuse", "uv")

STUB = """#!{python}
import json, os, shutil, subprocess, sys
from pathlib import Path

folder, name, words = Path({folder!r}), Path(sys.argv[0]).name, sys.argv[1:]
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps([name, *words]) + "\\n")
workers = sorted((folder / "workers").glob("*"))
worker = next((word[9:] for word in words if word.startswith("--worker=")), "")
asked = [home for home in workers if worker in ("all", home.name)]
if "scp" in words:
    for home in asked:
        shutil.copy(words[words.index("scp") + 1], home / words[words.index("scp") + 2].partition(":")[2])
if "ssh" in words and asked:
    command = next(word[10:] for word in words if word.startswith("--command="))
    start = lambda home: subprocess.Popen(["bash", "-c", command], cwd=home, env=os.environ | {{"HOME": str(home)}})
    sys.exit(max(process.wait() for process in [start(home) for home in asked]))
line = " ".join([name, *words])
for number, (beginning, answers) in enumerate(json.loads((folder / "answers.json").read_text())):
    if line.startswith(beginning):
        count = folder / f"answered-{{number}}"
        given = int(count.read_text()) if count.exists() else 0
        count.write_text(str(given + 1))
        text, status = answers[min(given, len(answers) - 1)]
        print(text)
        sys.exit(status)
"""


class Stubs:
    """A folder of stand-in programs, put first on PATH.

    Args:
      folder: where they lie, with their record.
      workers: machines behind ``gcloud ... ssh`` and ``scp``, as home folders in which commands really run; without any
        the commands are only written down.
    """

    def __init__(self, folder: Path, workers: int = 0) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        self.homes = [folder / "workers" / str(number) for number in range(workers)]
        for home in self.homes:
            home.mkdir(parents=True)
        self._answers: list[tuple[str, list]] = []
        (folder / "answers.json").write_text("[]")
        self.add(*NAMES)

    def add(self, *names: str) -> None:
        """More stand-ins."""
        for name in names:
            program(self.bin / name, STUB.format(python=sys.executable, folder=str(self.folder)))

    def answer(self, beginning: str, *answers: str, status: int = 0) -> None:
        """What calls that begin like this print, one after another; the last answer stays."""
        self._answers.append((beginning, [(text, status) for text in answers]))
        (self.folder / "answers.json").write_text(json.dumps(self._answers))

    @property
    def calls(self) -> list[list[str]]:
        """Every call so far, program first."""
        record = self.folder / "calls.jsonl"
        return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []

    def forget(self) -> None:
        """Begins a new record."""
        (self.folder / "calls.jsonl").unlink(missing_ok=True)

    def environment(self, **more: Any) -> dict[str, str]:
        """This process's, without what scripts read, with the stand-ins first on PATH."""
        kept = {k: v for k, v in os.environ.items() if k not in READ and not k.startswith(("JAX_", "SLURM_", "XLA_"))}
        return kept | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | {name: str(value) for name, value in more.items()}

    def run(self, script: str, *words: str, **more: Any) -> subprocess.CompletedProcess:
        """Runs a script of launch/ (or any command line) to its end."""
        command = [str(LAUNCH / script), *words]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment(**more), capture_output=True, text=True, timeout=60
        )


def program(path: Path, text: str) -> Path:
    """Writes an executable."""
    path.write_text(text)
    path.chmod(0o755)
    return path
