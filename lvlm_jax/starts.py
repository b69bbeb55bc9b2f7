"""What a stage begins with: parts of an earlier stage, another run, or a public checkpoint, each from its own place."""

import sys
from pathlib import Path
from typing import Any

import jax

from lvlm_jax import assemble, checkpoint, finished
from lvlm_jax import params as trees
from lvlm_jax.config import ConfigError
from lvlm_jax.hub import download, formats
from lvlm_jax.hub.configs import Described, describe
from lvlm_jax.recipe import Recipe, Start


def parts(
    recipe: Recipe,
    workdir: Path,
    field: str,
    start: Start,
    names: set[str],
    shapes: dict[str, Any],
    where: dict[str, Any] | None,
    mesh: Any,
) -> dict[str, Any]:
    """Parts of the model by name (`params.parts`), in the layout of their `shapes`, where `where` says.

    Of "all" a named sense that is not there is left out, and said: so a pair is added to a model that lacks it.

    Args:
      workdir: of this run, for `start.stage`.
      field: the start's place in the recipe, for messages.

    Raises:
      ConfigError: a start that does not hold these parts, or holds others.
    """
    folder = None
    if not start.hub:
        folder = workdir / start.stage if start.stage else finished.last_stage(start.workdir)
    described = None if folder is not None else _described(start, f"--config.{field}.hub")
    if field.endswith(".all"):
        lacking = _lacking(described, folder, names)
        if lacking and jax.process_index() == 0:
            print(f"{', '.join(sorted(lacking))}: begins at random, {start.origin} holds none", file=sys.stderr)
        names = names - lacking
    if not names:
        return {}
    like = {part: shapes[part] for part in sorted(names)}
    if where is not None:
        lay = {part: where[part] for part in like}
        like = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), like, lay)
    like = trees.joined(like)
    if folder is not None:
        return trees.parts(finished.saved_parts(folder / "params", like))
    _check_width(described, names, recipe, start.hub)
    return trees.parts(assemble.public_parts(start, like, mesh, f"--config.{field}.hub"))


def _described(start: Start, field: str) -> Described:
    with download.named(field):
        path = download.resolve(start.hub, revision=start.revision)
    return describe(formats.public_config(path), path)


def _lacking(described: Described | None, folder: Path | None, names: set[str]) -> set[str]:
    """The named senses among some parts that a start does not hold."""
    senses = {name for name in names if name.startswith("senses/")}
    if not senses:
        return set()
    if folder is None:
        return senses - {f"senses/{name}" for name, _ in getattr(described.config, "senses", ())}
    there = checkpoint.saved_shapes(folder / "params")
    return {name for name in senses if not any(path.startswith(f"{name}/") for path in there)}


def _check_width(described: Described, names: set[str], recipe: Recipe, source: str) -> None:
    """ConfigError where a checkpoint's connector was made for a language model of another width than the recipe's."""
    theirs = {"lvlm": lambda c: c.llm.width, "sense": lambda c: c.width}.get(described.kind)
    if theirs is None or not any(name == "connector" or name.startswith("senses/") for name in names):
        return
    if (made := theirs(described.config)) != (width := recipe.model.llm.width):
        raise ConfigError(
            f"{source}: its connector gives tokens of {made} values, the width of the language model that it was "
            f"trained before (its config.json), but config.model.llm.width is {width}; a connector serves one "
            "width: train it before this language model"
        )
