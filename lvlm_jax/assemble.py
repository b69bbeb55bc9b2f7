"""A recipe's values become things: model, loss, tokenizer, loader, and parts of public checkpoints."""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import checkpoint, finished, hosts
from lvlm_jax import mesh as meshes
from lvlm_jax import params as trees
from lvlm_jax import recipe as recipes
from lvlm_jax.config import ConfigError
from lvlm_jax.data.lengths import Hosts, Measured, measure_lengths
from lvlm_jax.data.loader import Loader
from lvlm_jax.data.packing import PackingPlan
from lvlm_jax.data.senses import Budget
from lvlm_jax.evaluate.questions import questions
from lvlm_jax.fusion import visual_expert
from lvlm_jax.hub import download, formats, minigpt4
from lvlm_jax.hub.configs import describe
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.kinds import KINDS
from lvlm_jax.kinds.writing import instruction_of, template_of, tokenizer_of
from lvlm_jax.nn import lora, quant
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.augment import augment
from lvlm_jax.processing.encode import DataError, encode_each
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.recipe import Data, Evaluation, Model, Recipe, StageRecipe, Start
from lvlm_jax.vision.text_tower import TextTowerConfig


def dtype_of(recipe: Recipe) -> Any:
    """Compute dtype; "auto" chooses by device (`mesh.compute_dtype`)."""
    return jnp.dtype(meshes.compute_dtype()[0] if recipe.dtype == "auto" else recipe.dtype)


def frozen_dtype(recipe: Recipe, stage: StageRecipe) -> Any:
    """The dtype of the leaves that a stage leaves as they are."""
    return jnp.dtype(KINDS[stage.loss].frozen or dtype_of(recipe))


def dtype_line(recipe: Recipe) -> str:
    """What is computed in, and why: a line for the log."""
    why = "as the recipe says" if recipe.dtype != "auto" else meshes.compute_dtype()[1]
    return f"computes in {dtype_of(recipe).name} ({why}); trained weights are float32"


def stage_model(recipe: Recipe, stage: StageRecipe) -> tuple[Any, Any]:
    """(linen module, smallest batch) of a stage."""
    scan = jax.default_backend() != "cpu" if recipe.scan == "auto" else recipe.scan == "yes"
    options = {"dtype": dtype_of(recipe), "scan": scan, "remat": recipe.remat}
    kind = KINDS[stage.loss]
    return kind.model(recipe, options), kind.batch(recipe)


def stage_shapes(recipe: Recipe, stage: StageRecipe) -> tuple[dict, dict]:
    """(shapes, logical axes) of a stage's parameters, adapters among them.

    Raises:
      ValueError: a pattern of adapters that takes no dense layer.
    """
    shapes, axes = abstract(*stage_model(recipe, stage))
    return (shapes, axes) if stage.lora is None else lora.add_shapes(shapes, axes, stage.lora)


def trains_head(mask: dict) -> bool:
    """Whether the output head's weights move, by a stage's mask; those of words beside the decoder's are part of it."""
    flat = trees.flatten(mask)
    untied = "llm/head/kernel" in flat
    paths = ("llm/head/kernel", "words/kernel") if untied else ("llm/embed/table", "words/table")
    return any(flat.get(path, False) for path in paths)


def loss_of(stage: StageRecipe, model: Any, head_trained: bool, mesh: meshes.AnyMesh | None = None) -> Callable:
    """(params, batch) -> (loss sum, weight sum, {"correct": sum}) of a stage; (params, batch, key) where it `draws`."""
    kind, shards = KINDS[stage.loss], meshes.data_shards(mesh)
    return kind.loss(quant.trained_in(model, stage.matmul), kind.settings_of("X", stage), head_trained, shards)


def flops_of(recipe: Recipe, stage: StageRecipe, params: dict) -> float | None:
    """Model FLOPs of one step; None where a kind of stages does not count them."""
    return KINDS[stage.loss].flops(recipe, stage, params)


def exported(recipe: Recipe) -> dict[str, Any]:
    """What `hub.export.export_folder` takes of a run's last stage beside folder, weights and tokenizer.

    Raises:
      ConfigError: no folder is known to hold such a model.
    """
    name = recipe.run[-1]
    kind = KINDS[recipe.stages[name].loss]
    if kind.exported is None:
        raise ConfigError(f"stages.{name} of kind {recipe.stages[name].loss!r} trains no whole model to export")
    return kind.exported(recipe)


def encoder_of(model: Model, tokenizer: Tokenizer, data: Data, text: TextTowerConfig | None = None) -> Callable:
    """``encode`` with everything but the example bound; `text` is the tower that reads it instead of the decoder."""
    others = tuple(template_of(model, name) for name in data.member_templates)
    heard = {"senses": model.lvlm.specs} if model.senses and not text else {}
    return functools.partial(
        encode_each,
        template=template_of(model, data.template or data.own_template or None),
        others=others,
        tokenizer=tokenizer,
        visual_tokens=0 if text else model.lvlm.visual_tokens,
        image_token_id=model.image_token_id,
        max_length=data.length,
        embedding_size=(text or model.lvlm).vocab,
        spec=None if text else model.image,
        video=model.video,
        **heard,
        instruction=None if text else instruction_of(model),
    )


def loader_of(
    recipe: Recipe, stage: StageRecipe, tokenizer: Tokenizer, cache: Path | None = None, whole: bool = False
) -> Loader:
    """The batches of a stage: this host's share, or on every host the whole of them."""
    data, model, kind = stage.data, recipe.model, KINDS[stage.loss]
    source, text = data.open(cache, data.on_bad), kind.text(recipe)
    if kind.encoder is None:
        encoder = encoder_of(model, tokenizer, data, text)
    else:
        encoder = kind.encoder(recipe, stage, tokenizer)
    spec = model.image if data.pictures else None
    if spec and kind.pairs:
        spec = dataclasses.replace(spec, tiles=None)  # towers are compared on whole pictures
    measured = measure_lengths(source, encoder, cache=cache, on_bad=data.on_bad, spec=spec, hosts=_hosts())
    for reason, count in getattr(source, "left_out", {}).items():
        print(f"{count:,} {reason} left out of {data.path}", file=sys.stderr, flush=True)
    if measured.bad:
        print(_left_out(measured), file=sys.stderr, flush=True)
    if kind.pairs:
        _one_picture_each(source, measured, stage.loss)
    room = {name: count // data.groups for name, count in data.senses.items()}
    budget = Budget(pictures=data.pictures // data.groups, senses=room)
    budget.check(measured.pictures, measured.senses, source.origin)
    plan = PackingPlan(
        measured.lengths,
        budget.cost(measured.pictures, measured.senses),
        seed=recipe.seed,
        rows=data.rows,
        length=data.length,
        groups=data.groups,
        vision_rows=budget.total,
        pack=data.pack,
        shares=getattr(source, "shares", None),
    )
    change = None
    if data.augment:
        change = functools.partial(augment, **dataclasses.asdict(data.augment))
    return Loader(
        source,
        encoder,
        spec,
        plan=plan,
        visual_tokens=kind.visual_tokens(recipe),
        pad_id=tokenizer.pad_id,
        host=0 if whole else jax.process_index(),
        hosts=1 if whole else jax.process_count(),
        workers=data.workers,
        threads=data.threads,
        augment=change,
        weigh_by=data.weigh_by,
        **kind.holds(recipe, stage),
        senses=kind.senses(recipe),
        budget=budget,
        pictures=measured.pictures,
    )


def _hosts() -> Hosts | None:
    """The processes of this run, if there are several: they measure a data set together."""
    count = jax.process_count()
    return None if count == 1 else Hosts(jax.process_index(), count, hosts.exchange)


def _left_out(measured: Measured, most: int = 3) -> str:
    """Which records on_bad="skip" leaves out, said once before a stage."""
    lines = [f"{len(measured.bad):,} of {len(measured.lengths):,} records are bad and left out (on_bad='skip'):"]
    lines += [f"  {bad}" for bad in measured.bad[:most]]
    if len(measured.bad) > most:
        lines.append(f"  and {len(measured.bad) - most:,} more; lvlm data check lists them all")
    return "\n".join(lines)


def absent(recipe: Recipe, stages: Sequence[str]) -> list[str]:
    """What these stages and the evaluation read and this machine does not have; hub names are not looked up.

    Each once, with all the fields that name it.
    """
    out = []
    for name in stages:
        stage = recipe.stages[name]
        out += _absent_data(f"stages.{name}.data", stage.data)
        for part, start in stage.start.items():
            where = f"stages.{name}.start.{part}"
            if start.workdir:
                try:
                    _check_size(recipe, stage, finished.last_stage(start.workdir), part)
                except ConfigError as error:
                    out.append(f"{where}.workdir: {error}")
            out += [f"{where}.hub: {line}" for line in _absent_here(start.hub)]
        out += [f"stages.{name}.{line}" for line in KINDS[stage.loss].absent(recipe, stage)]
    out += [f"model.tokenizer: {line}" for line in _absent_here(recipe.model.tokenizer)]
    if said := getattr(recipe.model, "instruction", None):
        out += [f"model.instruction.tokenizer: {line}" for line in _absent_here(said.tokenizer)]
    out += _absent_data("evaluation.data", recipe.evaluation.data) if recipe.evaluation else []
    if recipe.beside and not Path(recipe.beside).is_dir():
        out.append(f"beside={recipe.beside!r} does not exist: give the workdir of the run to compare with, or ''")
    found: dict[str, list[str]] = {}
    for line in out:
        place, fault = re.fullmatch(r"([^=:]*)(.*)", line, re.DOTALL).groups()
        found.setdefault(fault, []).append(place)
    return [", ".join(places) + fault for fault, places in found.items()]


def _check_size(recipe: Recipe, stage: StageRecipe, folder: Path, part: str) -> None:
    """ConfigError where a stage's leaves have other shapes in what a part of it, or "all", shall begin with."""
    saved = checkpoint.saved_shapes(folder / "params")
    here = trees.flatten(trees.unstack_layers(abstract(*stage_model(recipe, stage))[0]))
    here = {path: leaf for path, leaf in here.items() if part == "all" or f"{path}/".startswith(f"{part}/")}
    front = finished.front_of(part, saved)
    here = {path.removeprefix(front): leaf for path, leaf in here.items()}
    both = {path: (saved[path].shape, leaf.shape) for path, leaf in here.items() if path in saved}
    other = [f"{path} is {there}, not {wanted}" for path, (there, wanted) in both.items() if there != wanted]
    if other:
        raise ConfigError(f"{folder} holds a model of other sizes: {other[0]}, and {len(other) - 1} more")


def _absent_here(name: str) -> list[str]:
    """What is wrong with a path, or a file inside an installed package; hub names are not looked up."""
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().exists():
        return [f"{name!r} does not exist"]
    try:
        if name.startswith(download.INSTALLED):
            download.resolve(name)
    except FileNotFoundError as error:
        return [str(error)]
    return []


def _absent_data(where: str, data: Data) -> list[str]:
    return [f"{where}.{line}" for line in data.absent()]


def _one_picture_each(source: Any, measured: Measured, kind: str) -> None:
    """Picture i belongs to row i, which another number of pictures would shift in silence."""
    for index in np.flatnonzero((measured.lengths > 0) & (measured.pictures != 1))[:1]:
        raise DataError(
            f"{source.origin(int(index))}: {measured.pictures[index]} pictures, but a {kind} stage takes one picture "
            "a row; leave such records out"
        )


def asked(ask: Evaluation, cache: Path | None = None) -> list[tuple[Any, list[str]]]:
    """What an evaluation asks: (conversation up to an answer, [that answer]) of every answer of its data."""
    return questions(ask.data.open(cache, ask.data.on_bad), ask.limit, ask.data.on_bad)


def floor_of(ask: Evaluation) -> float | None:
    """What answering each question with its commonest training answer would score, where that can be known."""
    if ask.data.source != "easy_vqa" or ask.limit:
        return None
    from lvlm_jax.data.easy_vqa import EasyVqa
    from lvlm_jax.evaluate.scores import question_only_floor

    pairs = lambda source: [  # noqa: E731
        (e.turns[0].segments[-1].text, e.turns[1].segments[0].text) for e in map(source.__getitem__, range(len(source)))
    ]
    return question_only_floor(pairs(EasyVqa("train", holdout=0)), pairs(EasyVqa(ask.data.split)))


def inspection(data: Data, config: str, tokenizer: str | None, length: int | None) -> tuple[Any, Callable, Model, Any]:
    """(source, encode, model, tokenizer) to look at data with, before any run.

    Args:
      config: recipe whose template, tokenizer and sizes are used.
      tokenizer: a folder or hub name instead of the recipe's.
      length: positions of a row; default the model's context.
    """
    model, words = _spoken(config, tokenizer)
    data = dataclasses.replace(data, length=length or model.llm.context)
    return data.open(on_bad=data.on_bad), encoder_of(model, words, data), model, words


def inspected_encoder(config: str, tokenizer: str | None = None) -> Callable:
    """``encode`` as a recipe's model would, without a limit of length; `tokenizer` as for `inspection`."""
    endless = Data(source="easy_vqa", length=2**31)
    return encoder_of(*_spoken(config, tokenizer), endless)


def _spoken(config: str, tokenizer: str | None) -> tuple[Model, Tokenizer]:
    """(model, tokenizer) of a recipe, or with another tokenizer."""
    model = recipes.load(config).model
    if not isinstance(model, Model):
        raise ConfigError(
            f"--config={config}: data are looked at as a vision-language model sees them, and this recipe has none; "
            "give another, such as --config=llava15_align"
        )
    if tokenizer:
        model = dataclasses.replace(model, tokenizer=tokenizer)
        return model, tokenizer_of(model, "--tokenizer")
    return model, tokenizer_of(model, f"the tokenizer of --config={config} (--tokenizer gives another)")


def public_parts(
    start: Start, like: dict, mesh: Any, field: str = "hub", known: Set[str] = frozenset(), config: Any = None
) -> dict:
    """Parts of the model out of a public checkpoint, read once, in the layout of `like`.

    Args:
      known: paths of all leaves of the model, of which `like` may lack some that come from elsewhere.
      config: of the whole model, for files that have none beside them (MiniGPT-4's, BLIP-2's, EVA's).

    A language model's table that is smaller than ours gains rows, each the mean of the old ones, as LLaVA starts them,
    and one that is larger is cut; a visual expert that it lacks is a copy of its own layers. A pair that was exported
    alone starts the one sense of `like`. An error of what cannot be found names `field`.
    """
    with download.named(field):
        path = download.resolve(start.hub, revision=start.revision)
    if config is not None and minigpt4.is_authors(path):
        return _as_like(start.hub, like, minigpt4.read_parts(path, like, config, mesh))
    whole, parts = describe(formats.public_config(path), path).kind == "lvlm", trees.parts(like)
    kind = "vision" if [*like] == ["vision"] and not whole else None
    loaded = import_folder(path, kind=kind, mesh=mesh, scan=trees.is_stacked(like))
    sensed = any(part.startswith("senses/") for part in parts)
    if not whole and (len(parts) > 1 or sensed != (loaded.kind == "sense")):
        raise ConfigError(
            f"{start.hub}: holds a model of kind {loaded.kind!r}, which has no {list(parts)}; name one part"
        )
    found = trees.parts(loaded.params) if whole else dict.fromkeys(parts, loaded.params)
    got = trees.flatten({part: found[part] for part in parts if part in found})
    if "vision" in like:
        got = _without_last(start.hub, got, trees.flatten(like))
    elsewhere = known - trees.flatten(like).keys()
    return _as_like(start.hub, like, {path: leaf for path, leaf in got.items() if path not in elsewhere})


def _as_like(source: str, like: dict, got: dict) -> dict:
    """Leaves by path in the layout of `like`, each in its place."""
    wanted, parts = trees.flatten(like), list(trees.parts(like))
    # A tower that is read patch by patch has no use for the release's pooling head.
    got = {path: leaf for path, leaf in got.items() if path in wanted or not path.startswith("vision/head/")}
    got = visual_expert.from_language(got, wanted)
    if different := sorted(wanted.keys() ^ got.keys()):
        raise ConfigError(f"{source} does not hold the recipe's {parts}: {different[:5]} are on one side only")
    return trees.unflatten({path: _fit(source, path, got[path], wanted[path]) for path in wanted})


def _without_last(source: str, got: dict, wanted: dict) -> dict:
    """A tower with one block more than the recipe's, without it, and said so: LLaVA-OneVision drops SigLIP's last."""
    stack = re.compile(r"vision/(?:.*/)?layers/(?:(\d+)/)?")

    def depth(flat: dict) -> int:
        found = [(stack.match(path), leaf) for path, leaf in flat.items()]
        return max((int(at[1]) + 1 if at[1] else leaf.shape[0] for at, leaf in found if at), default=0)

    blocks, fewer = depth(got), depth(wanted)
    if blocks != fewer + 1:
        return got
    print(f"{source}: the last of its {blocks} blocks is left out, as the recipe's tower has {fewer}", file=sys.stderr)
    out = {}
    for path, leaf in got.items():
        at = stack.match(path)
        if at is None or (at[1] and int(at[1]) < fewer):
            out[path] = leaf
        elif not at[1]:
            out[path] = leaf[:fewer]
    return out


def _fit(source: str, path: str, leaf: Any, like: Any) -> Any:
    """A leaf in the wanted shape and place: vocabulary rows are added or cut, anything else must be equal."""
    axis = {"llm/embed/table": 0, "llm/head/kernel": 1}.get(path)
    short = like.shape[axis] - leaf.shape[axis] if axis is not None else 0
    if short > 0:
        leaf = trees.add_rows(leaf, short, axis)
    elif short < 0:  # rows that no word of the tokenizer reaches
        print(f"{source}: {path}: the last {-short} of {leaf.shape[axis]} words are left out", file=sys.stderr)
        leaf = leaf[: like.shape[0]] if axis == 0 else leaf[:, : like.shape[1]]
    if leaf.shape != like.shape:
        raise ConfigError(f"{source}: {path} is {list(leaf.shape)}, the recipe's model wants {list(like.shape)}")
    return leaf if getattr(like, "sharding", None) is None else jax.device_put(leaf, like.sharding)
