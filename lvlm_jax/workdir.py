"""What a workdir says of the run that it belongs to, and whether another recipe may go on in it."""

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from lvlm_jax.config import ConfigError, unequal

RECIPE = "recipe.json"
"""File of a workdir with the resolved recipe that its run belongs to."""


def recipe_of(workdir: str | Path) -> dict:
    """What a run wrote as its resolved recipe. ConfigError where that can no longer be read."""
    file = Path(workdir) / RECIPE
    try:
        found = json.loads(file.read_bytes())
        if lost := {"run", "stages", "evaluation"} - found.keys():
            raise KeyError(*lost)
        return found
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file} is damaged ({error!r}). Delete it and give the command that began the run: checkpoints of another "
            "recipe are refused"
        ) from error


WITHOUT_EFFECT = frozenset(
    ("workers", "threads", "log_every", "log_to", "save_every", "keep", "export", "report", "beside", "hang", "profile")
)
"""Fields of a recipe that may change between a run and its resumption: they decide no weight."""


def differences(a: Any, b: Any) -> list[str]:
    """Where two recipes differ in what decides the bits of a run, one line each."""
    found = sorted(unequal(a, b, WITHOUT_EFFECT), key=lambda line: line[0] != "name")  # the recipe's name says most
    return [f"{path} was {_short(was)}, is now {_short(now)}" for path, was, now in found]


def _short(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def check_same(workdir: str | Path, theirs: dict, mine: dict) -> None:
    """Raises ConfigError where a run of `theirs` stands in the workdir and `mine` would give other bits."""
    if different := differences(theirs, mine):
        raise ConfigError(
            f"{workdir} holds a run of another recipe: {'; '.join(different[:6])}. Give another --workdir, or "
            "--restart to throw that run away"
        )


def digest(recipe: Any) -> str:
    """SHA-256 of what decides the bits of a run: equal where `differences` finds none, a `Recipe` of dataclasses.

    Values that are the default are left out, so that a field that a later version adds changes no digest.
    """

    def deciding(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            found = {f.name: (f, getattr(value, f.name)) for f in dataclasses.fields(value)}
            kept = {k: v for k, (f, v) in found.items() if k not in WITHOUT_EFFECT and v != _default(f)}
            return {key: deciding(kept[key]) for key in sorted(kept)}
        if isinstance(value, dict):
            return {key: deciding(value[key]) for key in sorted(value)}
        return [deciding(item) for item in value] if isinstance(value, list | tuple) else value

    return hashlib.sha256(json.dumps(deciding(recipe)).encode()).hexdigest()


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def find(workdir: str | Path, seconds: float = 60.0) -> None:
    """Waits until the recipe that the first process wrote is seen here; network disks take their time.

    Raises:
      ConfigError: it is not: the hosts do not share this folder.
    """
    deadline = time.monotonic() + seconds
    while RECIPE not in os.listdir(workdir) if os.path.isdir(workdir) else True:
        if time.monotonic() > deadline:
            raise ConfigError(f"{workdir} is not the folder that process 0 writes: give one that all hosts share")
        time.sleep(0.5)
