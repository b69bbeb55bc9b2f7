"""One part of a model alone, out of it and onto another: above all a named sense, trained and shipped alone."""

import dataclasses
from pathlib import Path
from typing import Any

from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.families import Config
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.models.senses import NamedSense
from lvlm_jax.shapes import Params


def part_of(config: LVLMConfig, params: Params, part: str) -> tuple[Config, Params]:
    """(config, parameters) of one part, as `export_folder` takes them.

    Args:
      part: ``senses/NAME``, an encoder with its connector; or ``vision`` or ``llm``, which other software reads too.

    Raises:
      ValueError: a part that the model does not have.
    """
    alone, senses = [name for name in ("vision", "llm") if hasattr(config, name)], getattr(config, "senses", ())
    if part in alone:
        return getattr(config, part), params[part]
    for name, sense in senses:
        if part == f"senses/{name}":
            return NamedSense(name=name, sense=sense, width=config.llm.width), params["senses"][name]
    parts = [*alone, *(f"senses/{name}" for name, _ in senses)]
    raise ValueError(f"part {part!r}: this model's parts that stand alone are {', '.join(parts)}")


def check_fit(pair: NamedSense, width: int, source: str, field: str) -> None:
    """CheckpointError where a pair was made for a language model of another width; `field`: where `width` stands."""
    if pair.width != width:
        raise CheckpointError(
            f"{source}: its connector gives tokens of {pair.width} values (decoder_width of its config.json), but the "
            f"language model is {width} wide ({field}); train the pair before this language model"
        )


def add(
    config: LVLMConfig, params: Params, source: str | Path, name: str = "", **options: Any
) -> tuple[LVLMConfig, Params]:
    """A model with a pair that was exported alone; nothing else of it changes.

    Args:
      source: a folder or hub name.
      name: of the sense; default the name that it was trained under.
      options: as `import_folder` takes them.

    Raises:
      CheckpointError: no pair there, one of another width, a name that the model has already.
    """
    loaded = import_folder(source, kind="sense", **options)
    pair = loaded.config
    name = name or pair.name
    check_fit(pair, config.llm.width, str(source), "llm.width of the model")
    if name in dict(config.senses):
        raise CheckpointError(f"{source}: the model has a sense {name!r} already; give the pair another name")
    senses = {**params.get("senses", {}), name: loaded.params}
    return dataclasses.replace(config, senses=(*config.senses, (name, pair.sense))), {**params, "senses": senses}
