"""A recipe's values become things: model, loss, tokenizer, loader, and parts of public checkpoints."""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Sequence
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
from lvlm_jax.evaluate.questions import questions
from lvlm_jax.fusion import visual_expert
from lvlm_jax.hub import beside, download, formats
from lvlm_jax.hub.configs import describe
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.export import IMAGE_TOKEN
from lvlm_jax.models.contrastive import DualEncoder
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn import lora, quant
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.chat_templates import TEMPLATES, Template
from lvlm_jax.processing.encode import DataError, encode_each
from lvlm_jax.processing.image import augment
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.recipe import Data, Evaluation, Model, Recipe, StageRecipe, Start
from lvlm_jax.train import flops, losses
from lvlm_jax.vision.text_tower import TextTowerConfig


def dtype_of(recipe: Recipe) -> Any:
    """Compute dtype; "auto" chooses by device (`mesh.compute_dtype`)."""
    return jnp.dtype(meshes.compute_dtype()[0] if recipe.dtype == "auto" else recipe.dtype)


def dtype_line(recipe: Recipe) -> str:
    """What is computed in, and why: a line for the log."""
    why = "as the recipe says" if recipe.dtype != "auto" else meshes.compute_dtype()[1]
    return f"computes in {dtype_of(recipe).name} ({why}); trained weights are float32"


def stage_model(recipe: Recipe, stage: StageRecipe) -> tuple[Any, Any]:
    """(linen module, smallest batch) of a stage."""
    scan = jax.default_backend() != "cpu" if recipe.scan == "auto" else recipe.scan == "yes"
    options = {"dtype": dtype_of(recipe), "scan": scan, "remat": recipe.remat}
    lvlm = recipe.model.lvlm
    if stage.loss == "contrastive":
        return DualEncoder(recipe.dual_encoder, **options), dummy_batch(lvlm, length=recipe.contrastive.text.context)
    return LVLM(lvlm, **options), dummy_batch(lvlm)


def stage_shapes(recipe: Recipe, stage: StageRecipe) -> tuple[dict, dict]:
    """(shapes, logical axes) of a stage's parameters, adapters among them.

    Raises:
      ValueError: a pattern of adapters that takes no dense layer.
    """
    shapes, axes = abstract(*stage_model(recipe, stage))
    return (shapes, axes) if stage.lora is None else lora.add_shapes(shapes, axes, stage.lora)


def trains_head(recipe: Recipe, mask: dict) -> bool:
    """Whether the output head's weights move, by a stage's mask; those of words beside the decoder's are part of it."""
    paths = ("llm/embed/table", "words/table") if recipe.model.llm.tied else ("llm/head/kernel", "words/kernel")
    flat = trees.flatten(mask)
    return any(flat.get(path, False) for path in paths)


def loss_of(stage: StageRecipe, model: Any, head_trained: bool, mesh: meshes.AnyMesh | None = None) -> Callable:
    """(params, batch) -> (loss sum, weight sum, {"correct": sum}) of a stage.

    On accelerators and of scanned models every chunk of positions is computed, so that all steps take equally long;
    else only those that hold a label.
    """
    shards = 1 if mesh is None else mesh.size // mesh.shape["tensor"]
    model = quant.trained_in(model, stage.matmul)

    def language(params: dict, batch: Any) -> tuple:
        hidden, _ = model.apply({"params": params}, batch)
        kernel = model.apply({"params": params}, method="head_kernel")
        loss, weight, correct = losses.language_loss(
            hidden,
            kernel,
            batch.tokens,
            batch.weights,
            chunk=256 if model.scan else 64,
            head_trained=head_trained,
            skip_unlabelled=not model.scan and meshes.platform() == "cpu",
            shards=shards,
            softcap=model.config.llm.final_softcap,
        )
        return loss, weight, {"correct": correct}

    def contrastive(params: dict, batch: Any) -> tuple:
        image, text, scale, bias = model.apply({"params": params}, batch)
        same = (batch.tokens[:, None] == batch.tokens[None]).all(-1)
        real = batch.segments.max(1) > 0  # an epoch's last group may have rows that only fill it up
        if model.config.bias:
            loss, weight, correct = losses.sigmoid_loss(image, text, scale, bias, same, real)
        else:
            loss, weight, correct = losses.contrastive_loss(image, text, jnp.minimum(scale, 100.0), same, real)
        return loss, weight, {"correct": correct}

    return {"language": language, "contrastive": contrastive}[stage.loss]


def flops_of(recipe: Recipe, stage: StageRecipe, params: dict) -> float | None:
    """Model FLOPs of one step; None for a contrastive stage, whose text tower is not counted here."""
    if stage.loss != "language":
        return None
    data, mask = stage.data, stage.stage("x").mask(params)
    sizes = {"rows": data.rows, "length": data.length, "pictures": data.pictures}
    return flops.step_flops(recipe.model.lvlm, params, mask, **sizes)


def tokenizer_of(model: Model, field: str = "--config.model.tokenizer") -> Tokenizer:
    """The recipe's tokenizer; an error names `field`."""
    if model.tokenizer == "easy_vqa":
        from lvlm_jax.data.easy_vqa import word_tokenizer

        return Tokenizer(word_tokenizer())
    with download.named(field):
        words = beside.tokenizer(model.tokenizer)
    # A language model's own tokenizer has no word for a picture: it gets one as its next id.
    if not words.has_special(IMAGE_TOKEN) and words.vocab_size == model.image_token_id:
        words.add_special([IMAGE_TOKEN])
    return words


def template_of(model: Model, name: str | None = None) -> Template:
    """The chat template with the recipe's system text."""
    template = TEMPLATES[name or model.template]
    return template if model.system is None else template.with_system(model.system)


def encoder_of(model: Model, tokenizer: Tokenizer, data: Data, text: TextTowerConfig | None = None) -> Callable:
    """``encode`` with everything but the example bound; `text` is the tower that reads it instead of the decoder."""
    others = tuple(template_of(model, name) for name in data.member_templates)
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
    )


def loader_of(recipe: Recipe, stage: StageRecipe, tokenizer: Tokenizer, cache: Path | None = None) -> Loader:
    """The batches of a stage: this host's share."""
    data, model = stage.data, recipe.model
    text = recipe.contrastive.text if stage.loss == "contrastive" else None
    source, encoder = data.open(cache, data.on_bad), encoder_of(model, tokenizer, data, text)
    spec = model.image if data.pictures else None
    if spec and text:
        spec = dataclasses.replace(spec, tiles=None)  # towers are compared on whole pictures
    measured = measure_lengths(source, encoder, cache=cache, on_bad=data.on_bad, spec=spec, hosts=_hosts())
    for reason, count in getattr(source, "left_out", {}).items():
        print(f"{count:,} {reason} left out of {data.path}", file=sys.stderr, flush=True)
    if measured.bad:
        print(_left_out(measured), file=sys.stderr, flush=True)
    if text:
        _one_picture_each(source, measured)
    plan = PackingPlan(
        measured.lengths,
        measured.pictures,
        seed=recipe.seed,
        rows=data.rows,
        length=data.length,
        groups=data.groups,
        vision_rows=data.pictures // data.groups,
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
        visual_tokens=0 if text else model.lvlm.visual_tokens,
        pad_id=tokenizer.pad_id,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=data.workers,
        threads=data.threads,
        augment=change,
        weigh_by=data.weigh_by,
        blend=blends(recipe, stage),
        frames=model.pools_frames and text is None,
    )


def blends(recipe: Recipe, stage: StageRecipe) -> bool:
    """Whether several visual tokens may fill one position: a fact of the recipe, so that all batches have one shape."""
    model, limited = recipe.model, recipe.model.image.tiles is not None and recipe.model.image.tiles.most is not None
    return (
        stage.loss == "language"
        and stage.data.pictures > 0
        and (limited or model.video.pool in ("bilinear", "average"))
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
                    _check_size(recipe, stage, finished.last_stage(start.workdir))
                except ConfigError as error:
                    out.append(f"{where}.workdir: {error}")
            out += [f"{where}.hub: {line}" for line in _absent_here(start.hub)]
    out += [f"model.tokenizer: {line}" for line in _absent_here(recipe.model.tokenizer)]
    out += _absent_data("evaluation.data", recipe.evaluation.data) if recipe.evaluation else []
    found: dict[str, list[str]] = {}
    for line in out:
        place, fault = re.fullmatch(r"([^=:]*)(.*)", line, re.DOTALL).groups()
        found.setdefault(fault, []).append(place)
    return [", ".join(places) + fault for fault, places in found.items()]


def _check_size(recipe: Recipe, stage: StageRecipe, folder: Path) -> None:
    """ConfigError where a stage's leaves have other shapes in what it shall begin with."""
    saved = checkpoint.saved_shapes(folder / "params")
    here = trees.flatten(trees.unstack_layers(abstract(*stage_model(recipe, stage))[0]))
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


def _one_picture_each(source: Any, measured: Measured) -> None:
    """A contrastive loss pairs picture i with row i, which another number of pictures would shift in silence."""
    for index in np.flatnonzero((measured.lengths > 0) & (measured.pictures != 1))[:1]:
        raise DataError(
            f"{source.origin(int(index))}: {measured.pictures[index]} pictures, but a contrastive stage compares one "
            "picture with one caption; leave such records out"
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
    if tokenizer:
        model = dataclasses.replace(model, tokenizer=tokenizer)
        return model, tokenizer_of(model, "--tokenizer")
    return model, tokenizer_of(model, f"the tokenizer of --config={config} (--tokenizer gives another)")


def public_parts(start: Start, like: dict, mesh: Any, field: str = "hub") -> dict:
    """Parts of the model out of a public checkpoint, read once, in the layout of `like`.

    A language model's table that is smaller than ours gains rows, each the mean of the old ones, as LLaVA starts them;
    a visual expert that it lacks is a copy of its own layers. An error of what cannot be found names `field`.
    """
    with download.named(field):
        path = download.resolve(start.hub, revision=start.revision)
    whole = describe(formats.public_config(path), path).kind == "lvlm"
    kind = "vision" if [*like] == ["vision"] and not whole else None
    loaded = import_folder(path, kind=kind, mesh=mesh, scan=trees.is_stacked(like))
    if not whole and len(like) > 1:
        raise ConfigError(
            f"{start.hub}: holds a model of kind {loaded.kind!r}, which has no {list(like)}; name one part"
        )
    found = loaded.params if whole else dict.fromkeys(like, loaded.params)
    wanted, got = trees.flatten(like), trees.flatten({part: found[part] for part in like if part in found})
    if "vision" in like:
        got = _without_last(start.hub, got, wanted)
    # A tower that is read patch by patch has no use for the release's pooling head.
    got = {path: leaf for path, leaf in got.items() if path in wanted or not path.startswith("vision/head/")}
    got = visual_expert.from_language(got, wanted)
    if different := sorted(wanted.keys() ^ got.keys()):
        raise ConfigError(f"{start.hub} does not hold the recipe's {list(like)}: {different[:5]} are on one side only")
    return trees.unflatten({path: _fit(start.hub, path, got[path], wanted[path]) for path in wanted})


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
    """A leaf in the wanted shape and place: vocabulary rows are added, anything else must be equal."""
    axis = {"llm/embed/table": 0, "llm/head/kernel": 1}.get(path)
    short = like.shape[axis] - leaf.shape[axis] if axis is not None else 0
    if short > 0:
        leaf = trees.add_rows(leaf, short, axis)
    if leaf.shape != like.shape:
        raise ConfigError(f"{source}: {path} is {list(leaf.shape)}, the recipe's model wants {list(like.shape)}")
    return leaf if getattr(like, "sharding", None) is None else jax.device_put(leaf, like.sharding)
