"""What a stage begins with: leaves of an earlier stage, another run, or public files, each from its own place."""

import sys
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

import jax

from lvlm_jax import assemble, checkpoint, finished
from lvlm_jax import params as trees
from lvlm_jax.config import ConfigError
from lvlm_jax.hub import download, formats, minigpt4
from lvlm_jax.hub.configs import Described, describe
from lvlm_jax.recipe import Recipe, Start


def leaves(
    recipe: Recipe, workdir: Path, field: str, start: Mapping[str, Start], like: Mapping[str, Any], mesh: Any
) -> dict[str, Any]:
    """The leaves of a model by path that a stage does not begin with at random.

    Args:
      workdir: of this run, for `Start.stage`.
      field: `start`'s place in the recipe, for messages.
      like: all leaves of the model, each in the shape and the place that it shall have.

    Raises:
      ConfigError: a path with no leaf below it; a start that does not hold these leaves, or holds others.
    """
    out: dict[str, Any] = {}
    for part, paths in begins(field, start, like).items():
        wanted = {path: like[path] for path in paths}
        out |= _leaves(recipe, workdir, f"{field}.{part}", part, start[part], wanted, like.keys(), mesh)
    return out


def begins(field: str, start: Mapping[str, Start], leaves: Collection[str]) -> dict[str, list[str]]:
    """The leaves that each entry of a stage's `start` gives: those below its path that no longer path names.

    Raises:
      ConfigError: a path with no leaf below it.
    """
    below = {part: [path for path in leaves if part == "all" or f"{path}/".startswith(f"{part}/")] for part in start}
    if unknown := sorted(part for part, paths in below.items() if not paths):
        parts = sorted(trees.parts(trees.unflatten(dict.fromkeys(leaves))))
        raise ConfigError(f"{field} names {unknown}; the parts are {parts}, or 'all', or a path below one")
    order = sorted(start, key=lambda part: 0 if part == "all" else len(part))
    owner = {path: part for part in order for path in below[part]}
    found = {part: [path for path in leaves if owner.get(path) == part] for part in start}
    return {part: paths for part, paths in found.items() if paths}


def _leaves(
    recipe: Recipe,
    workdir: Path,
    field: str,
    part: str,
    start: Start,
    like: dict[str, Any],
    known: Set[str],
    mesh: Any,
) -> dict[str, Any]:
    """Those of one entry of a stage's start, `part`; `known` are the paths of all leaves of the model.

    Of "all" a named sense that is not there is left out, and said: so a pair is added to a model that lacks it.
    """
    folder = described = None
    if start.hub:
        described = _described(start, f"--config.{field}.hub")
    else:
        folder = workdir / start.stage if start.stage else finished.last_stage(start.workdir)
    if part == "all":
        lacking = _lacking(described, folder, like)
        if lacking and jax.process_index() == 0:
            print(f"{', '.join(sorted(lacking))}: begins at random, {start.origin} holds none", file=sys.stderr)
        out = tuple(f"{name}/" for name in lacking)
        like = {path: leaf for path, leaf in like.items() if not path.startswith(out)}
    if not like:
        return {}
    wanted = trees.unflatten(like)
    if folder is not None:
        return _saved(folder / "params", part, start.origin, like, known)
    _check_width(described, set(trees.parts(wanted)) if part == "all" else {part}, recipe, start.hub)
    whole = getattr(recipe.model, "lvlm", None)
    return trees.flatten(assemble.public_parts(start, wanted, mesh, f"--config.{field}.hub", known, whole))


def _saved(folder: Path, part: str, origin: str, like: dict[str, Any], known: Set[str]) -> dict[str, Any]:
    """Leaves of what another stage, run or import left, at the paths where that has them (`finished.front_of`)."""
    front = finished.front_of(part, saved := checkpoint.saved_shapes(folder).keys())
    there = trees.unflatten({path.removeprefix(front): leaf for path, leaf in like.items()})
    found = trees.flatten(finished.saved_parts(folder, there))
    if front and (absent := finished.left_out(saved, known)) and jax.process_index() == 0:
        print(f"{origin}: {', '.join(absent)} left out, of which this model has none", file=sys.stderr)
    return {f"{front}{path}": leaf for path, leaf in found.items()}


def _described(start: Start, field: str) -> Described | None:
    """What a public checkpoint says of itself; None for files without a config.json (BLIP-2's authors')."""
    with download.named(field):
        path = download.resolve(start.hub, revision=start.revision)
    return None if minigpt4.is_authors(path) else describe(formats.public_config(path), path)


def _lacking(described: Described | None, folder: Path | None, like: dict[str, Any]) -> set[str]:
    """The named senses among some leaves that a start does not hold."""
    senses = {name for name in trees.parts(trees.unflatten(like)) if name.startswith("senses/")}
    if not senses:
        return set()
    if folder is None:
        config = None if described is None else described.config
        return senses - {f"senses/{name}" for name, _ in getattr(config, "senses", ())}
    there = checkpoint.saved_shapes(folder / "params")
    return {name for name in senses if not any(path.startswith(f"{name}/") for path in there)}


def _check_width(described: Described | None, names: set[str], recipe: Recipe, source: str) -> None:
    """ConfigError where a checkpoint's connector was made for a language model of another width than the recipe's."""
    widths = {"lvlm": lambda c: c.llm.width, "sense": lambda c: c.width}
    theirs = None if described is None else widths.get(described.kind)
    # A path below a connector may have nothing to do with that width: a Q-Former has its own.
    if theirs is None or not any(name == "connector" or name.split("/")[:-1] == ["senses"] for name in names):
        return
    if (made := theirs(described.config)) != (width := recipe.model.llm.width):
        raise ConfigError(
            f"{source}: its connector gives tokens of {made} values, the width of the language model that it was "
            f"trained before (its config.json), but config.model.llm.width is {width}; a connector serves one "
            "width: train it before this language model"
        )
