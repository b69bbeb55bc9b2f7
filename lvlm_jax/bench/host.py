"""What the host does: preparing pictures, and reading a checkpoint."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from lvlm_jax.bench.rounds import OURS, Row, clocked, interleaved
from lvlm_jax.bench.setting import Setting
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.processing.image import load_image, preprocess, to_rows

KINDS = {"JPEG": 85, "PNG": None}
"""File kinds that are measured, with a quality where there is one."""
_SIDES = ((640, 480), (1024, 768), (375, 500), (1280, 720))
_PIXELS = 1e-4
"""The most that normalised pixels may differ from the torch library's Pillow processor."""


def make_pictures(folder: Path, kind: str, count: int = 16, seed: int = 0) -> list[Path]:
    """Files with the sizes and about the detail of photographs: smooth shapes and some grain."""
    rng, out = np.random.default_rng(seed), []
    for number in range(count):
        size = _SIDES[number % len(_SIDES)]
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, PIL.Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        path = folder / f"{number}.{kind.lower()}"
        options = {} if KINDS[kind] is None else {"quality": KINDS[kind]}
        PIL.Image.fromarray(pixels).save(path, kind, **options)
        out.append(path)
    return out


def data(setting: Setting) -> Iterator[Row]:
    """One row a kind of file: read, decode, resize, normalise, on one core of each side."""
    spec, ask = setting.case.spec, setting.reference and setting.reference.ask
    names = ask("pictures_start", folder=str(setting.folder))["names"] if ask else []
    for kind in KINDS:
        setting.say(f"data, {kind}")
        files = make_pictures(setting.folder, kind)
        paths, difference = [str(path) for path in files], None
        if ask:
            out = setting.folder / "pixels.npy"
            ask("pictures", name="Pillow", files=paths, out=str(out))
            pixels = np.stack([preprocess(load_image(path), spec).transpose(2, 0, 1) for path in paths])
            difference = setting.compare(f"data, {kind}, pixels", pixels, np.load(out), "torch", _PIXELS)

        def theirs(name: str, paths: list[str] = paths) -> Callable[[], float]:
            return lambda: ask("pictures", name=name, files=paths)["seconds"]

        def ours(paths: list[str] = paths) -> None:
            for path in paths:
                to_rows(load_image(path), spec)

        sides = {OURS: lambda ours=ours: clocked(ours), **{f"torch, {name}": theirs(name) for name in names}}
        seconds = interleaved(sides, setting.rounds, setting.say)
        yield Row(name=f"data, {kind}", work=len(files), unit="pictures", seconds=seconds, difference=difference)


def read_weights(setting: Setting) -> Iterator[Row]:
    """One row: from a folder to arrays on the device, every weight read once (files are in the system's cache)."""
    setting.say("import")
    sums: dict[str, float] = {}
    largest = jax.jit(lambda leaves: [jnp.abs(leaf).max() for leaf in leaves])

    def ours() -> None:
        params = import_folder(setting.folder, dtype=setting.dtype).params
        sums[OURS] = float(sum(map(float, largest(jax.tree.leaves(params)))))

    def theirs() -> float:
        answer: dict[str, Any] = setting.reference.ask("load", folder=str(setting.folder), dtype=setting.dtype)
        sums["torch"] = answer["sum"]
        return answer["seconds"]

    sides: dict[str, Callable[[], float]] = {OURS: lambda: clocked(ours)}
    if setting.reference:
        sides["torch from_pretrained"] = theirs
    seconds = interleaved(sides, setting.rounds, setting.say)
    difference = (
        setting.compare("import, largest weights", sums[OURS], sums["torch"], "torch") if setting.reference else None
    )
    size = sum(file.stat().st_size for file in setting.folder.glob("*.safetensors"))
    yield Row(name="import", work=size / 1e6, unit="MB", seconds=seconds, difference=difference)
