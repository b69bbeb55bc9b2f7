"""What a finished run, or an import, left in its workdir: weights for the next run, for an export, or as adapters."""

import re
from collections.abc import Collection
from pathlib import Path

from lvlm_jax import checkpoint
from lvlm_jax import params as trees
from lvlm_jax import recipe as recipes
from lvlm_jax import workdir as workdirs
from lvlm_jax.config import ConfigError
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.nn import lora
from lvlm_jax.recipe import Model, Recipe


def last_stage(workdir: str | Path) -> Path:
    """The folder whose ``params`` are the end of another run, or what ``lvlm convert import`` wrote."""
    folder = Path(workdir)
    if checkpoint.is_saved(folder / "params"):
        return folder
    if not (folder / workdirs.RECIPE).exists():
        raise ConfigError(f"{workdir}: neither the workdir of a run (recipe.json) nor imported weights (params)")
    last = folder / workdirs.recipe_of(folder)["run"][-1]
    if not checkpoint.is_saved(last / "params"):
        raise ConfigError(f"{workdir}: its last stage, {last.name}, has not finished; run it to its end first")
    return last


CONNECTOR = "connector/"


def front_of(part: str, saved: Collection[str]) -> str:
    """What a part's paths begin with here, and not in another run: ``connector/``, or nothing.

    What stands inside a connector begins from the leaves of the same name at the top of a model that was trained before
    there was a language model: ``connector/qformer`` from the ``qformer`` of BLIP-2's first stage.

    Args:
      saved: paths of the leaves that the other run left.
    """
    below = lambda place: any(f"{path}/".startswith(f"{place}/") for path in saved)  # noqa: E731
    inner = part.removeprefix(CONNECTOR)
    return CONNECTOR if inner != part and not below(part) and below(inner) else ""


def left_out(saved: Collection[str], known: Collection[str]) -> list[str]:
    """What a run left that this model has no place for, neither at the same path nor in its connector, as few paths."""
    apart = lambda path: re.sub(r"(^|/)layers/(\d+/)?", r"\1layers/0/", path)  # noqa: E731
    places = {*map(apart, known)}
    kept = {path for path in saved if not places.isdisjoint({apart(path), CONNECTOR + apart(path)})}
    return trees.only_in([path for path in saved if path not in kept], kept)


def saved_parts(folder: Path, like: dict) -> dict:
    """Parts of what a stage (or an import) left, in the layout of `like`; adapters are merged into their kernels."""
    tree, saved = checkpoint.load_params(folder, like=like, partial=True), checkpoint.saved_shapes(folder)
    here = tuple(f"{part}/" for part in trees.parts(like))
    low = {path: leaf for path, leaf in saved.items() if lora.is_adapter(path) and path.startswith(here)}
    if not low:
        return tree
    return lora.merge(tree, checkpoint.load_params(folder, like=trees.unflatten(low), partial=True))


def weights(workdir: str | Path) -> tuple[Recipe, dict]:
    """(recipe, weights with adapters merged) of a finished run. ConfigError: it has not."""
    folder = last_stage(workdir)
    params = checkpoint.load_params(folder / "params")
    return recipes.resolve(workdirs.recipe_of(workdir)), lora.merge(params)


def adapter(workdir: str | Path) -> tuple[LVLMConfig, dict, str]:
    """(model, adapters with the leaves that the last stage trained whole, hub name of the base) of a finished run.

    Raises:
      ConfigError: no run, or one whose last stage trained no adapters.
    """
    folder = last_stage(workdir)
    if not (Path(workdir) / workdirs.RECIPE).exists():
        raise ConfigError(f"{workdir}: no workdir of lvlm train (recipe.json), so what its adapters are is not known")
    found = recipes.resolve(workdirs.recipe_of(workdir))
    stage = found.stages[folder.name]
    if stage.lora is None:
        raise ConfigError(f"{workdir}: its last stage, {folder.name}, trained no adapters (stages.{folder.name}.lora)")
    if not isinstance(found.model, Model):
        raise ConfigError(f"{workdir}: the peft package holds adapters of vision-language models; this is another kind")
    saved = checkpoint.saved_shapes(folder / "params")
    moved = trees.flatten(stage.stage(folder.name).mask(trees.unflatten(saved)))
    like = {path: leaf for path, leaf in saved.items() if moved[path] or lora.is_adapter(path)}
    params = checkpoint.load_params(folder / "params", like=trees.unflatten(like), partial=True)
    hubs = [start.hub for part, start in sorted(stage.start.items()) if start.hub and part in ("all", "llm")]
    return found.model.lvlm, params, hubs[0] if hubs else ""
