"""The child process that runs the torch library, possibly in another interpreter, seen from here."""

import contextlib
import json
import os
import subprocess
import sys
from collections import deque
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

SCRIPT = Path(__file__).with_name("torch_side.py")
NEEDED = "give an interpreter that has both: --reference-python PATH, or --no-reference for absolute figures alone"


class ReferenceFailed(RuntimeError):
    """The torch side could not start, refused a command, or died; says what it said last."""


def default_python() -> str:
    """This interpreter, where torch can be imported (which is not done here).

    Raises:
      ValueError: it cannot.
    """
    if find_spec("torch") is None:
        raise ValueError(f"torch is not installed in {sys.executable}; {NEEDED}")
    return sys.executable


class Reference:
    """The torch side, which answers one command at a time; a context manager that ends it.

    Example:
      with Reference(default_python()) as reference:
          reference.ask("hello")["versions"]

    Raises:
      ValueError: no such interpreter, or one without torch or transformers.
      ReferenceFailed: it died, or a command failed there.
    """

    def __init__(self, python: str) -> None:
        # Neither this interpreter's path nor its working directory may leak into the other one.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            self._process = subprocess.Popen([python, str(SCRIPT)], env=environment, text=True, **pipes)
        except OSError as error:
            raise ValueError(f"--reference-python={python}: cannot be run ({error}); {NEEDED}") from error
        self._said: deque[str] = deque(maxlen=20)
        self._listener = Thread(target=lambda: self._said.extend(self._process.stderr), daemon=True)
        self._listener.start()
        self.python = python
        try:
            self.about = self.ask("hello")
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """The answer to one command of `torch_side.py`."""
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; what it said at its end is read below
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._listener.join(timeout=5)
            last = "".join(self._said).strip() or "nothing"
            raise ReferenceFailed(
                f"the torch side ({self.python}) ended with status {status} at {do!r}. It said: {last}"
            )
        answer = json.loads(line)
        if "missing" in answer:
            raise ValueError(f"--reference-python={self.python}: {answer['missing']}; {NEEDED}")
        if "error" in answer:
            raise ReferenceFailed(f"the torch side failed at {do!r}: {answer['error']}")
        return answer["ok"]

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(BrokenPipeError):  # it died with a command unread
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
