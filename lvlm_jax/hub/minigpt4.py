"""BLIP-2's, MiniGPT-4's and VideoChat's own checkpoints: what was trained, over a front and a language model of others.

BLIP-2's and InstructBLIP's (LAVIS) hold the Q-Former, the tower's last norm and the dense layer; those of BLIP-2's
first stage heads and texts beside them, for which there is no place. MiniGPT-4's hold the dense layer alone, over
BLIP-2's front: EVA's tower, and the Q-Former with the tower's last norm. It is read out of the authors' own two
files (``eva_vit_g.pth``, ``blip2_pretrained_flant5xxl.pth``) or a folder of the torch library. Version 2 has no
Q-Former, pictures of twice the side, and adapters in the language model, which are merged in. VideoChat's file holds
blocks over time, the norm behind them and more queries besides the dense layer. Where no Q-Former is
read, the tower's last norm is a fresh one, as it was when the authors trained: nothing filled it, and it was frozen.
Pickles are refused; convert a file with ``safetensors.torch.save_file(torch.load(file, weights_only=True)["model"],
...)``, EVA's without the ``["model"]``. Source: salesforce/LAVIS, models/blip2_models/;
Vision-CAIR/MiniGPT-4, models/ and runners/runner_base.py; OpenGVLab/Ask-Anything, video_chat/models/videochat_it.py.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lvlm_jax import mesh as meshes
from lvlm_jax import params as P
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.connectors import QFormerConfig, qformer
from lvlm_jax.hub import configs, formats, place
from lvlm_jax.hub.convert import Loaded, import_folder
from lvlm_jax.hub.families import KINDS, UNUSED
from lvlm_jax.hub.safetensors_io import Overlay, TensorFolder
from lvlm_jax.keymap import Row
from lvlm_jax.llm import DecoderConfig, EncoderDecoderConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.nn import lora
from lvlm_jax.shapes import DTypeLike, Params
from lvlm_jax.vision import ClipConfig, blip2_vit
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.zoo import blip2, image_text, instructblip, minigpt4, videochat, videochat2

PROJECTION = "llama_proj.weight"
PROJECTIONS = (PROJECTION, *(f"{name}.weight" for name in blip2.PROJECTIONS.values()))
"""The dense layer of MiniGPT-4 and VideoChat, and those of BLIP-2 by its language model."""
LAVIS = (blip2, instructblip)
"""The families whose authors keep all that they trained: Q-Former, last norm and dense layer."""
EXTRA = "extra_query_tokens"
"""VideoChat's queries, by which its files are known."""
ADAPTED = "llama_model.base_model.model."
"""What stands before the language model's names where it has adapters."""
ALPHA = 16.0
"""Strength of version 2's adapters, as all of its configs have it (train_configs/minigptv2_finetune.yaml)."""
HEADS = {"tower": 88, "qformer": 64}
"""Width of a head, which no shape tells."""
LAST_BLOCK = 39
"""EVA's giant has one block more than BLIP-2 reads."""

_TOWER = re.compile(r"cls_token|pos_embed|patch_embed\.|blocks\.")
_NOT_READ = (*UNUSED, *image_text.LAVIS_UNUSED, r".*\.rotary_emb\.inv_freq", r".*\.position_ids")


def is_projection(path: Path) -> bool:
    """Whether a folder holds a dense layer that the authors release, and no config.json."""
    return _is_bare(path) and any(key in _tensors(path) for key in PROJECTIONS)


def is_authors(path: Path) -> bool:
    """Whether a folder holds tensors under the authors' names, and no config.json."""
    return _is_bare(path) and any(key in _tensors(path) for key in (PROJECTION, "query_tokens", _CLASS))


_CLASS = "visual_encoder.cls_token"


def _is_bare(path: Path) -> bool:
    return path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def _tensors(path: Path) -> Overlay:
    """The tensors of a folder under the names of a whole model: EVA's own file leaves out where its tower stands."""
    plain = lambda key: f"visual_encoder.{key}" if _TOWER.match(key) else key  # noqa: E731
    return Overlay([TensorFolder(path)], lambda key: plain(key.removeprefix("model.").replace(".default.", ".")))


# ---------------------------------------------------------------------------------------------------------------------
# A whole model


def import_projection(
    folder: str | Path,
    front: str | Path,
    base: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    scan: bool = False,
) -> Loaded:
    """Reads the dense layer and what it stands between.

    Args:
      folder: of the authors' checkpoint, as safetensors.
      front: folder of BLIP-2's tower and, for a MiniGPT-4 that reads it, its Q-Former.
      base: folder of the language model.

    Raises:
      CheckpointError: what does not fit, before any tensor is read.
    """
    folder, front, base = Path(folder), Path(front), Path(base)
    given, seen = _tensors(folder), _front(front)
    host = configs.describe(formats.public_config(base), base)
    if host.kind not in ("decoder", "encoder_decoder"):
        raise CheckpointError(f"{base}: holds a model of kind {host.kind!r}, not a language model")
    config = _config(folder, given, seen, host.config)
    shapes = KINDS["lvlm"].shapes(config, False)[0]
    family = _family(config, folder)
    always = {row.theirs for row in (blip2.lavis_rows(config) if family in LAVIS else minigpt4.projection_rows())}
    own = [row for row in _rows(family, config) if row.theirs in given or row.theirs in always]
    trained = {path for row in own for path in row.leaves}
    fronts = [row for row in seen.rows(config) if not trained & {*row.leaves}]
    parts = [(given, own), (seen.tensors, fronts)]
    _check(folder, parts, shapes, front)
    for tensors, rows in parts:
        place.check_shapes(tensors, rows, shapes)
    words = import_folder(base, mesh=mesh, dtype=dtype, scan=scan)
    # Whether a T5 has a head of its own its files tell, and not its config.json.
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, tied=words.config.tied))
    axes = KINDS["lvlm"].shapes(config, scan)[1]
    flat = P.flatten({"llm": words.params})
    for tensors, rows in parts:
        flat |= place.load(tensors, rows, shapes, axes, mesh, dtype, scan)
    flat |= _fresh_norm(flat, axes, config.vision.width, dtype or flat["connector/linear_1/bias"].dtype, mesh)
    merged = lora.merge(P.unflatten(flat), _adapters(folder, given, config))
    return Loaded(
        kind="lvlm",
        config=config,
        params=merged,
        axes=axes,
        image_token_id=0,  # no word of theirs stands for a picture; any will do, since the picture is laid over it
        layout=next(iter(family.LAYOUTS)),
        folder=folder,
    )


def _config(folder: Path, given: Overlay, seen: "_Front", host: DecoderConfig | EncoderDecoderConfig) -> LVLMConfig:
    """The whole model, by the shapes of its dense layer.

    Raises:
      CheckpointError: a layer that reads neither the Q-Former's queries nor four patches, or writes another width.
    """
    key = next(key for key in PROJECTIONS if key in given)
    wide, reads = given.shape(key)
    if wide != host.width:
        raise CheckpointError(
            f"{folder}: {key} is for a language model of width {wide}, the one given (model_base=) has {host.width}"
        )
    if key != PROJECTION:
        return _lavis_config(folder, given, seen.tower, host)
    tower, between = seen.tower, seen.qformer
    if between is not None and reads == between.width and reads != 4 * tower.width:
        if EXTRA in given:  # VideoChat
            blocks = {found[1] for key in given if (found := re.match(r"visual_encoder\.gmhra\.(\d+)\.", key))}
            tower = ClipConfig(**dataclasses.asdict(tower), global_blocks=len(blocks))
            between = dataclasses.replace(between, extra=given.shape(EXTRA)[1])
        return LVLMConfig(vision=tower, connector=between, llm=host)
    if reads != 4 * tower.width:
        queries = "no Q-Former" if between is None else f"a Q-Former of width {between.width}"
        raise CheckpointError(
            f"{folder}: {PROJECTION} reads {reads} values, but the front (vision=) has {queries} and a tower of width "
            f"{tower.width}, of which four patches are {4 * tower.width}; give BLIP-2's tower and Q-Former"
        )
    tower = dataclasses.replace(tower, class_feature=False)
    if any(key.startswith(ADAPTED) for key in given):  # version 2 sees twice as far
        tower = dataclasses.replace(tower, resize="cubic", max_patches=4 * tower.grid**2)
    return LVLMConfig(vision=tower, connector=minigpt4.FOUR_OF_A_ROW, llm=host)


def _lavis_config(
    folder: Path, given: Overlay, tower: ViTConfig, host: DecoderConfig | EncoderDecoderConfig
) -> LVLMConfig:
    """A BLIP-2, or an InstructBLIP where its Q-Former reads words.

    Raises:
      CheckpointError: no Q-Former beside the dense layer, or a language model that none was trained on.
    """
    between = _qformer(given)
    if between is None:
        raise CheckpointError(f"{folder}: a BLIP-2's dense layer without its Q-Former (query_tokens, Qformer.bert...)")
    table, places = (f"Qformer.bert.embeddings.{name}_embeddings.weight" for name in ("word", "position"))
    if table in given and places in given:
        between = dataclasses.replace(between, vocab=given.shape(table)[0], context=given.shape(places)[0])
    try:
        return blip2.authors_config(tower, between, host)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _check(folder: Path, parts: list[tuple[Any, list[Row]]], shapes: Params, front: Path) -> None:
    """No key missing; of the projection's folder none left over (a front has the rest of a BLIP-2 beside it)."""
    for (tensors, rows), path in zip(parts, (folder, front)):
        _there(path, tensors, rows)
    if left := _unread(*parts[0]):
        raise CheckpointError(
            f"{folder}: {', '.join(left[:5])} are no part of a MiniGPT-4's, VideoChat's or BLIP-2's checkpoint"
        )
    covered = {path for _, rows in parts for row in rows for path in row.leaves}
    if gaps := sorted(path for path in {*P.flatten(shapes)} - covered - {*_NORM} if not path.startswith("llm/")):
        raise CheckpointError(f"{folder}: nothing of what is given fills {', '.join(gaps[:5])}")


def _there(path: Path, tensors: formats.Tensors, rows: list[Row]) -> None:
    """CheckpointError where a folder lacks tensors of these rows."""
    if absent := sorted({row.theirs for row in rows} - {*tensors}):
        raise CheckpointError(f"{path}: {', '.join(absent[:5])} of {len(absent)} tensors are not there")


def _unread(tensors: Overlay, rows: list[Row]) -> list[str]:
    """The keys of a folder that hold weights and are in no row; adapters are read elsewhere."""
    known = {row.theirs for row in rows}
    left = [key for key in tensors if key not in known and not key.startswith(ADAPTED)]
    return [key for key in left if not any(re.fullmatch(pattern, key) for pattern in _NOT_READ)]


_NORM = {"vision/post_norm/scale": 1.0, "vision/post_norm/bias": 0.0}


def _fresh_norm(flat: Mapping[str, Any], axes: Params, width: int, dtype: Any, mesh: Mesh | None) -> dict[str, Any]:
    """The tower's last norm as it begins, where nothing fills it."""
    named = P.flatten(axes)
    where = lambda path: None if mesh is None else NamedSharding(mesh, meshes.spec(mesh, named[path], (width,)))  # noqa: E731
    return {
        path: jax.device_put(jnp.full(width, value, dtype), where(path))
        for path, value in _NORM.items()
        if path not in flat
    }


def _adapters(folder: Path, given: Overlay, config: LVLMConfig) -> Params:
    """Version 2's adapters beside the kernels of the language model; none in the first's files."""
    keys = [key for key in given if re.fullmatch(rf"{re.escape(ADAPTED)}.+\.lora_A\.weight", key)]
    rows = minigpt4.host_rows(config) if keys else []
    kernels = {row.theirs.removesuffix(".weight"): row.leaves[0] for row in rows}
    low: dict[str, Any] = {}
    for key in keys:
        name = key.removeprefix(ADAPTED).removesuffix(".lora_A.weight")
        kernel, other = kernels[f"llama_model.{name}"], key.replace(".lora_A.", ".lora_B.")
        if other not in given:
            raise CheckpointError(f"{folder}: of {name!r} only lora_A is there; fetch the checkpoint again")
        a, b = given[key].T, given[other].T
        low[lora.beside(kernel, lora.A)], low[lora.beside(kernel, lora.B)] = a, b
        low[lora.beside(kernel, lora.SCALE)] = np.float32(lora.scale_of(a.shape[1], ALPHA, False))
    return P.unflatten(low)


# ---------------------------------------------------------------------------------------------------------------------
# The front


@dataclasses.dataclass(frozen=True)
class _Front:
    """BLIP-2's tower and, where it is there, its Q-Former; `layout` is how the keys of both are named."""

    tensors: Any
    tower: ViTConfig
    qformer: QFormerConfig | None
    layout: str
    prefix: str = ""

    def rows(self, config: LVLMConfig) -> list[Row]:
        """The key table of what `config` reads of it."""
        reads = isinstance(config.connector, QFormerConfig)
        if self.layout == "lavis":
            out = blip2_vit.authors_rows(config.vision)
        else:
            out = blip2_vit.rows(config.vision, theirs=self.prefix)
        if reads:
            own = dataclasses.replace(config.connector, extra=0)
            return out + qformer.rows(own, "connector/qformer", layout=self.layout)
        return [row for row in out if row.leaves[0] not in _NORM]


def _front(path: Path) -> _Front:
    """The front in a folder, by its config.json or by its shapes.

    Raises:
      CheckpointError: no tower of BLIP-2's make.
    """
    if (path / "config.json").is_file():
        raw = configs.read_json(path / "config.json")
        tensors, kind = TensorFolder(path), raw.get("model_type")
        if kind == "blip_2_vision_model":
            return _Front(tensors, blip2_vit.from_hf(raw), None, "blip_2")
        if kind in ("blip-2", "blip_2"):
            reads = qformer.from_hf(raw["qformer_config"], raw["num_query_tokens"])
            return _Front(tensors, blip2_vit.from_hf(raw["vision_config"]), reads, "blip_2", "vision_model.")
        raise CheckpointError(f"{path}: model_type is {kind!r}; a MiniGPT-4 begins with a BLIP-2, or its tower")
    tensors = _tensors(path)
    return _Front(tensors, _tower(path, tensors), _qformer(tensors), "lavis")


def _tower(path: Path, tensors: Overlay) -> ViTConfig:
    """Sizes of the authors' tower by its shapes."""
    numbers = {int(found[1]) for key in tensors if (found := re.match(r"visual_encoder\.blocks\.(\d+)\.", key))}
    if not numbers or "visual_encoder.pos_embed" not in tensors:
        raise CheckpointError(
            f"{path}: neither config.json nor EVA's tower (blocks.0..., pos_embed); the authors take it from "
            "eva_vit_g.pth, to be converted to safetensors"
        )
    width, patch = (tensors.shape(f"visual_encoder.{key}")[at] for key, at in (("pos_embed", 2), (_PATCH, 3)))
    places = tensors.shape("visual_encoder.pos_embed")[1] - 1
    return dataclasses.replace(
        blip2_vit.PRESETS["blip2_vit_g14_224"],
        image_size=math.isqrt(places) * patch,
        patch_size=patch,
        width=width,
        depth=min(len(numbers), LAST_BLOCK),
        heads=width // HEADS["tower"],
        mlp_dim=tensors.shape("visual_encoder.blocks.0.mlp.fc1.weight")[0],
    )


_PATCH = "patch_embed.proj.weight"


def _qformer(tensors: Overlay) -> QFormerConfig | None:
    """Sizes of the authors' Q-Former by its shapes, without its text; None where it is not there."""
    if "query_tokens" not in tensors:
        return None
    layers = "Qformer.bert.encoder.layer."
    numbers = {int(found[1]) for key in tensors if (found := re.match(rf"{re.escape(layers)}(\d+)\.", key))}
    crossed = {n for n in numbers if f"{layers}{n}.crossattention.self.query.weight" in tensors}
    _, queries, width = tensors.shape("query_tokens")
    return QFormerConfig(
        queries=queries,
        width=width,
        depth=len(numbers),
        heads=width // HEADS["qformer"],
        mlp_dim=tensors.shape(f"{layers}0.intermediate_query.dense.weight")[0],
        cross_every=len(numbers) // max(len(crossed), 1),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Parts, for a recipe


def _family(config: LVLMConfig, path: Path) -> ModuleType:
    for family in (minigpt4, videochat, videochat2, *LAVIS):
        if family.fits(config):
            return family
    raise CheckpointError(
        f"{path}: tensors under BLIP-2's or MiniGPT-4's names and no config.json, but the recipe's model is neither of "
        "them, nor a VideoChat"
    )


def _rows(family: ModuleType, config: LVLMConfig) -> list[Row]:
    """The key table under the authors' names."""
    return blip2.authors_rows(config) if family in LAVIS else family.rows(config)


def read_parts(path: Path, like: Params, config: LVLMConfig, mesh: Mesh | None = None) -> dict[str, Any]:
    """Leaves of a model by path, out of a folder under the authors' names: those of `like`, all of them.

    Args:
      config: the whole model's; `like` holds parts of its parameters, layers stacked or apart.

    Raises:
      CheckpointError: a tensor that is not there, or has another shape.
    """
    tensors, scan, wanted = _tensors(path), P.is_stacked(like), {*P.flatten(P.unstack_layers(like))}
    table = _rows(_family(config, path), config)
    rows = [row for row in table if wanted & {*row.leaves}]
    if any(leaf.startswith("connector/qformer/") for leaf in wanted):
        _say(path, tensors, table)
    pictures = {row.theirs: row for row in blip2_vit.authors_rows(config.vision)}
    # VideoChat's patches are cut by a convolution over one frame; those of EVA's file know no frames.
    flat = lambda key: key in pictures and key in tensors and len(tensors.shape(key)) == 4  # noqa: E731
    rows = [pictures[row.theirs] if flat(row.theirs) else row for row in rows]
    if not isinstance(config.connector, QFormerConfig):
        rows = [row for row in rows if row.leaves[0] not in _NORM]
    _there(path, tensors, rows)
    shapes, axes = (KINDS["lvlm"].shapes(config, flag)[part] for flag, part in ((False, 0), (scan, 1)))
    place.check_shapes(tensors, rows, shapes)
    found = place.load(tensors, rows, shapes, axes, mesh, None, scan)
    fresh = _fresh_norm(found, axes, config.vision.width, next(iter(found.values())).dtype, mesh)
    return found | {path: leaf for path, leaf in fresh.items() if path in wanted}


def _say(path: Path, tensors: Overlay, rows: list[Row]) -> None:
    """What a Q-Former's file holds that the model has no place for: of BLIP-2's first stage, its texts and heads."""
    left = {key.replace(".", "/") for key in _unread(tensors, rows)}
    if left and jax.process_index() == 0:
        names = ", ".join(P.only_in(left, {key.replace(".", "/") for key in tensors} - left)).replace("/", ".")
        print(f"{path}: {names} left out, of which this model has none", file=sys.stderr)
