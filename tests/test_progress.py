import io
import sys
import time

from lvlm_jax import progress


def test_a_log_gets_whole_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.bar(3, "reading") as bar:
        for _ in range(3):
            bar.update()
    assert "\r" not in log.getvalue()
    lines = log.getvalue().splitlines()
    assert lines[-1].startswith("reading: 100%")
    assert "3/3" in lines[-1]


def test_short_work_is_one_line_in_a_log(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress.bar(3, "reading") as bar:
        bar.update(3)
    assert [line.split(":")[0] for line in log.getvalue().splitlines()] == ["reading"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_the_seconds_of_a_wait(monkeypatch):
    log = Terminal()
    monkeypatch.setattr(sys, "stderr", log)
    with progress.waiting("compiles"):
        time.sleep(1.3)
    assert log.getvalue() == "\rcompiles, 1 s\rcompiles, 1 s\n"


def test_a_wait_in_a_log_is_one_line(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress.waiting("compiles"):
        pass
    assert log.getvalue() == "compiles\n"
