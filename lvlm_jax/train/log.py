"""What a run says: a console line or bar, ``metrics.jsonl`` always, TensorBoard and W&B by name."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lvlm_jax import chips, hosts
from lvlm_jax.progress import bar as progress_bar
from lvlm_jax.train.stages import Stage

WRITERS = ("tensorboard", "wandb")
_KNOWN = {"loss", "lr", "grad_norm", "correct", "weight", "tokens", "targets", "images", "data_wait"}
_KNOWN |= {"skip", "skipped", "streak"}
"""Metrics of a step that have columns of their own, or none; any other is a part of the loss."""


class Log:
    """A hook that writes one row every `stage.log_every` steps.

    Columns: step, loss, lr, grad_norm, accuracy (where the loss counts it), each part that a loss names, tokens_per_s,
    images_per_s, data_wait (share of the time in which the device had nothing to do but wait for a batch), mfu, goodput
    (share of all the time since this process took up the stage that went into steps), trained (share of the weights),
    labelled (share of the tokens), skipped. Speeds are averages since the last row; compilation, evaluation and saving
    do not count. Several processes: data_wait is that of the one that waits most, `waits` says which, and `spread` is
    how much longer the steps of the slowest took, as a share. On resume, rows of steps that will run again are dropped:
    each step stands there once.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        stage: Stage,
        start: int = 0,
        trained: float = 1.0,
        flops: float | None = None,
        writers: Sequence[str] = (),
        began: float | None = None,
    ) -> None:
        self.stage, self.trained = stage, trained
        self.first = jax.process_index() == 0
        peak = chips.peak(jax.devices()[0].device_kind, jax.device_count())
        self.ideal = flops / peak if flops and peak else None  # seconds of a step at the peak
        self.writers = [_writer(name, folder, stage) for name in writers] if self.first else []
        self.bar: Any = None
        self.file: Any = None
        self.again = 0  # the last step of an earlier start that was not saved, and runs again
        if self.first:
            self.path, self.file, self.again = _reopen(folder, start)
            if sys.stderr.isatty():
                self.bar = progress_bar(stage.steps, stage.name, unit="step", initial=start)
        self._began, self._good = time.perf_counter() if began is None else began, 0.0
        self._since: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._steps, self._wait, self._counted = 0, 0.0, []
        if self._since is not None:
            self._since = time.perf_counter()

    def __call__(self, step: int, state: Any, metrics: dict) -> None:
        """The hook: `step` steps are done and `metrics` are of the last one."""
        if self._since is None:  # the first step compiles: it is no measure of speed
            jax.block_until_ready(metrics["loss"])
            self._since = time.perf_counter()
        else:
            self._steps += 1
            self._wait += metrics.get("data_wait", 0.0)
            self._counted.append({k: metrics[k] for k in ("tokens", "images") if k in metrics})
        if self.bar is not None:
            self.bar.update()
        if self.stage.log_every and (step % self.stage.log_every == 0 or step == self.stage.steps):
            self.row(step, self._values(jax.device_get(metrics)))
            self._restart()

    def _values(self, metrics: dict) -> dict:
        values = {name: float(metrics[name]) for name in ("loss", "lr", "grad_norm") if name in metrics}
        of = max(float(metrics["weight"]), 1e-9) if "weight" in metrics else 1.0
        if "correct" in metrics:
            values["accuracy"] = float(metrics["correct"]) / of
        values |= {name: float(value) / of for name, value in metrics.items() if name not in _KNOWN}
        seconds = time.perf_counter() - self._since
        if self._steps:
            counted = jax.device_get(self._counted)
            for name in ("tokens", "images"):
                if name in metrics:
                    values[f"{name}_per_s"] = float(sum(int(c[name]) for c in counted)) / seconds
            values["steps_per_s"] = self._steps / seconds
            values |= _of_all(min(1.0, self._wait / seconds), seconds)
            self._good += seconds * (1 - values["data_wait"])
            values["goodput"] = self._good / (time.perf_counter() - self._began)
            if self.ideal is not None:
                values["mfu"] = self.ideal * self._steps / seconds
        if "tokens" in metrics:
            values["labelled"] = int(metrics["targets"]) / max(int(metrics["tokens"]), 1)
        return values | {"trained": self.trained, "skipped": int(metrics["skipped"])}

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Writes one row of numbers at a step, to every place there is."""
        if not self.first:
            return
        values = {k: v.item() if isinstance(v, np.generic | np.ndarray | jax.Array) else v for k, v in values.items()}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._write(json.dumps({"stage": self.stage.name, "step": step, **finite}, allow_nan=False) + "\n")
        for write, _ in self.writers:
            write(step, {k: v for k, v in values.items() if isinstance(v, int | float)})
        text = "  ".join(f"{name} {_shown(name, value)}" for name, value in values.items() if value != "")
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
        else:
            print(f"{self.stage.name} {step}/{self.stage.steps}  {text}", file=sys.stderr, flush=True)

    def _write(self, line: str) -> None:
        """Appends a line. An error names the file; one that was deleted or unmounted would take lines still."""
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} is gone; was the workdir removed, or its disk unmounted?")
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def note(self, text: str) -> None:
        """One line of words on the console."""
        if self.first and self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.first:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def off_clock(self) -> Iterator[None]:
        """What runs inside does not count as time of training."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start

    def close(self) -> None:
        """Closes the files; the bar stays on screen as it is."""
        for _, close in self.writers:
            close()
        if self.file is not None:
            with contextlib.suppress(OSError):  # rows are flushed one by one: one that could not be was raised then
                self.file.close()
        if self.bar is not None:
            self.bar.close()


def _of_all(wait: float, seconds: float) -> dict[str, float]:
    """How long this process waited for data, or the one that waited most; how unequal their times were."""
    if jax.process_count() == 1:
        return {"data_wait": wait}
    rows = [json.loads(row) for row in hosts.exchange(json.dumps([wait, seconds]).encode())]
    waits, times = zip(*rows)
    return {"data_wait": max(waits), "waits": waits.index(max(waits)), "spread": max(times) / min(times) - 1}


def _shown(name: str, value: Any) -> str:
    if name in ("data_wait", "mfu", "goodput", "trained", "labelled", "accuracy", "spread"):
        return f"{100 * value:.3g}%"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)


def read_rows(file: str | os.PathLike) -> list[dict]:
    """The rows of a ``metrics.jsonl``; a line that was cut off by a kill, or damaged, is left out and named."""
    from etils import epath

    rows = []
    path = epath.Path(file)
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
        except ValueError:  # UnicodeDecodeError too
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            print(f"{path}:{number} was cut off or damaged, and is left out", file=sys.stderr)
    return rows


def curve(workdir: str | os.PathLike, stage: str) -> dict[str, Any]:
    """{"name" of a run's folder, "rows" of a stage that have a loss}; no rows where it has no such stage."""
    rows = read_rows(os.path.join(workdir, stage, "metrics.jsonl"))
    return {"name": os.path.basename(os.path.normpath(workdir)), "rows": [row for row in rows if "loss" in row]}


def _reopen(folder: str | os.PathLike, start: int) -> tuple[Any, Any, int]:
    """(path, open file) of the metrics, rewritten without the rows after step `start`, and the last of those, or 0."""
    from etils import epath

    path = epath.Path(folder) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path)
    kept = [row for row in rows if row["step"] <= start]
    unfinished = path.parent / "metrics.jsonl.tmp"
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))
    unfinished.replace(path)
    return path, path.open("a"), max((row["step"] for row in rows if row["step"] > start), default=0)


def _writer(name: str, folder: str | os.PathLike, stage: Stage) -> tuple:
    """(write(step, values), close()) of an optional writer."""
    if name not in WRITERS:
        raise ValueError(f"unknown log writer {name!r}: choose from {list(WRITERS)}")
    try:
        if name == "tensorboard":
            from tensorboardX import SummaryWriter

            board = SummaryWriter(os.path.join(os.fspath(folder), "tensorboard"))
            return lambda step, values: [board.add_scalar(k, v, step) for k, v in values.items()], board.close
        import wandb
    except ImportError as error:
        raise ImportError(f"the log writer {name!r} needs a package: pip install 'lvlm-jax[log]' ({error})") from error
    run = wandb.init(project="lvlm_jax", name=stage.name, dir=os.fspath(folder), config={"stage": repr(stage)})
    return lambda step, values: run.log(values, step=step), run.finish
