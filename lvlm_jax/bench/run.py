"""Runs the parts of a bench one after the other, each side in its turn."""

import contextlib
import dataclasses
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lvlm_jax import chips
from lvlm_jax.bench import generate, host, train
from lvlm_jax.bench.case import CASES, write_folder
from lvlm_jax.bench.reference import Reference
from lvlm_jax.bench.rounds import OURS, Row, Say
from lvlm_jax.bench.setting import TOLERANCES, Setting
from lvlm_jax.mesh import default_devices
from lvlm_jax.versions import versions

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow")
"""Versions that the figures depend on."""

PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "train": train.measure,
    "prefill": generate.prefill,
    "decode": generate.decode,
    "data": host.data,
    "import": host.read_weights,
}
"""What can be measured, by its name on the command line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a bench found. about: settings, devices and versions, by name. peak: FLOP/s of a known device, else None."""

    rows: Sequence[Row]
    about: Mapping[str, Any]
    peak: float | None

    def as_dict(self) -> dict[str, Any]:
        """For a file: every measurement, with what the table shows of it."""
        out = []
        for row in self.rows:
            fields = dataclasses.asdict(row) | {"rate": {s: dataclasses.asdict(row.rate(s)) for s in row.seconds}}
            out.append(fields | {"ratio": {s: dataclasses.asdict(row.ratio(s)) for s in row.others}})
        return {"about": dict(self.about), "rows": out}

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.about.items()]
        names = max(len(row.name) for row in self.rows)
        heads = f"{'what':<{names}}  {'ours, median':>22}  {'other side':<22}{'its median':>14}  {'ratio: least':>12}"
        lines += ["", f"{heads}{'median':>9}{'largest':>9}{'differ by':>12}{'MFU':>8}"]
        for row in self.rows:
            lines += self._lines(row, names)
        return "\n".join([*lines, "", "ratio: how many times faster than the other side, round by round"])

    def _lines(self, row: Row, names: int) -> list[str]:
        rate = f"{row.rate(OURS).median:,.1f} {row.unit}/s"
        share = (
            "" if not (self.peak and row.flops) else f"{row.flops * row.rate(OURS).median / row.work / self.peak:.1%}"
        )
        differ = "" if row.difference is None else f"{row.difference:.1e}"
        lines = []
        for side in row.others or [""]:
            ours = f"{row.name:<{names}}  {rate:>22}  " if not lines else " " * (names + 26)
            if not side:
                return [f"{ours}{'':<67}{'':>12}{share:>8}".rstrip()]
            ratio = row.ratio(side)
            figures = f"{ratio.least:>12.2f}{ratio.median:>9.2f}{ratio.largest:>9.2f}"
            lines.append(f"{ours}{side:<22}{row.rate(side).median:>14,.1f}  {figures}{differ:>12}{share:>8}".rstrip())
        return lines


def run(
    parts: Sequence[str],
    *,
    model: str = "80m",
    rounds: int = 5,
    rows: int = 8,
    dtype: str | None = None,
    python: str | None = None,
    compiled: bool = False,
    command: str = "",
    say: Say = lambda text: None,
) -> Result:
    """Measures some of `PARTS`.

    Args:
      model: a name of `case.CASES`. rows: of a training batch. rounds: measurements of each side.
      dtype: of the products, a name of `setting.TOLERANCES`; default by device.
      python: interpreter of the torch side; None for absolute figures alone. compiled: torch.compile's step, too.
      command: what was typed, for the record. say: told what is under way.

    Raises:
      ValueError: an unknown name; an interpreter without torch; the two sides on different kinds of device.
      SidesDiffer: they computed different things.
    """
    dtype = dtype or ("float32" if default_devices()[0].platform == "cpu" else "bfloat16")
    for name, known in [*((part, PARTS) for part in parts), (model, CASES), (dtype, TOLERANCES)]:
        if name not in known:
            raise ValueError(f"{name!r} is not known; choose of {', '.join(known)}")
    with contextlib.ExitStack() as stack:
        reference = None if python is None else stack.enter_context(Reference(python))
        if reference:
            _same_kind(reference.about)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lvlm-bench-"))) / "model"
        say(f"writes the model {model} to {folder}")
        setting = Setting(
            case=CASES[model],
            folder=write_folder(folder, CASES[model]),
            rounds=rounds,
            rows=rows,
            dtype=dtype,
            compiled=compiled,
            reference=reference,
            say=say,
        )
        measured = [row for part in parts for row in PARTS[part](setting)]
    about = _about(model, rounds, rows, dtype, command) | _theirs(reference)
    return Result(rows=measured, about=about, peak=chips.peak(jax.devices()[0].device_kind, jax.device_count()))


def _same_kind(theirs: Mapping[str, Any]) -> None:
    ours = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if ours != theirs["platform"]:
        raise ValueError(
            f"JAX runs on {ours} and torch on {theirs['platform']}: install a build of each for the same device, or "
            "hide the device from one (JAX_PLATFORMS=cpu, CUDA_VISIBLE_DEVICES=)"
        )


def _about(model: str, rounds: int, rows: int, dtype: str, command: str) -> dict[str, Any]:
    first = jax.devices()[0]
    return {
        "command": command,
        "model": f"{model}, {dtype}, training batches of {rows} rows, {rounds} rounds",
        "device": f"{jax.device_count()} x {first.device_kind}, {platform.processor() or platform.machine()}",
        "this side": ", ".join(f"{name} {version}" for name, version in versions(PACKAGES).items()),
    }


def _theirs(reference: Reference | None) -> dict[str, Any]:
    if reference is None:
        return {"torch side": "none"}
    about = reference.about
    said = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return {"torch side": f"{said}; {about['device']}, {about['threads']} threads"}
