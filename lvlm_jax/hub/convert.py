"""Other people's checkpoints in: a folder becomes a config and (sharded) arrays, every key accounted for.

`export.export_folder` is the way back, `verify.verify` the proof that nothing was lost between.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lvlm_jax import checkpoint, keymap, zoo
from lvlm_jax import params as P
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub import configs, download, formats, peft, place
from lvlm_jax.hub.export import export_folder
from lvlm_jax.hub.families import KINDS, Config, without_head
from lvlm_jax.hub.safetensors_io import TensorFolder
from lvlm_jax.keymap import Row
from lvlm_jax.llm.encoder_decoder import EncoderDecoderConfig
from lvlm_jax.mesh import default_devices
from lvlm_jax.shapes import DTypeLike, Params
from lvlm_jax.vision import FAMILIES as TOWERS
from lvlm_jax.vision import family_of
from lvlm_jax.zoo import llava

__all__ = ["Loaded", "export_folder", "import_folder", "import_weights"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint as this library holds it.

    kind: a name of `families.KINDS`. axes: logical axis names of each leaf of `params`.
    image_token_id: what stands in a token list where a picture goes (None: not a LVLM). layout: how the keys were
    written, a name that `export_folder` takes. folder: where it came from, with tokenizer and processor beside it.
    """

    kind: str
    config: Config
    params: Params
    axes: Params
    image_token_id: int | None
    layout: str
    folder: Path


def import_folder(
    folder: str | Path,
    *,
    kind: str | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    scan: bool = False,
    vision: str | Path | None = None,
    base: str | Path | None = None,
    layout: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache: str | Path | None = None,
    offline: bool | None = None,
) -> Loaded:
    """Reads a checkpoint, tensor by tensor, straight into arrays.

    Example:
      >>> loaded = import_folder("runs/quickstart/export", mesh=make_mesh("FSDP"), dtype=jnp.bfloat16, scan=True)

    Args:
      folder: a folder, a GGUF file, or a hub name (with `revision`, `token`, `cache`, `offline` as `download.resolve`
        takes them).
      kind: what it must be; "vision" also takes the vision tower out of a dual encoder. Default what config.json says.
      mesh: where the arrays go; default the first device, whole.
      dtype: of the arrays; default what the file holds (bfloat16 stays bfloat16).
      scan: layers stacked for a scanned model, or one by one.
      vision: folder or hub name of the vision tower, for the LLaVA authors' files, which often hold none.
      base: folder or hub name of the language model, where the folder holds the LLaVA authors' projector, or their
        adapters, alone (their ``--model-base``).
      layout: how the keys are written; default found by probing.

    Raises:
      CheckpointError: what does not fit, before any tensor is read.
    """
    default_devices()  # a backend that cannot start is said before anything is fetched
    hub = {"token": token, "cache": cache, "offline": offline}
    path = download.resolve(folder, revision=revision, **hub)
    raw = formats.public_config(path)
    if base is not None and "mm_vision_tower" not in raw:
        raise CheckpointError(f"{path}: base= completes the LLaVA authors' files, and config.json is none of theirs")
    with download.named("vision= (--vision)"):
        tower_path = None if vision is None else download.resolve(vision, **hub)
    with download.named("model_base= (--model-base)"):
        base_path = None if base is None else download.resolve(base, **hub)
    described = _describe(raw, path, tower_path, kind)
    tensors = formats.opened(path) if base_path is None else peft.on_base(path, base_path)
    described = _by_its_files(described, tensors)
    parts, layout = _parts(described, tensors, tower_path, layout)
    kind_ = KINDS[described.kind]
    rows = [row for _, part in parts for row in part]
    shapes = without_head(kind_.shapes(described.config, False)[0], rows)
    _check_keys(parts, described, layout, shapes, path)
    for tensors, part in parts:
        place.check_shapes(tensors, part, shapes)
    axes = kind_.shapes(described.config, scan)[1]
    flat: dict[str, Any] = {}
    for tensors, part in parts:
        flat.update(place.load(tensors, part, shapes, axes, mesh, dtype, scan))
    named = P.flatten(axes)
    params = P.unflatten(flat)
    if base is not None and (path / peft.CONFIG).is_file():
        params = peft.apply(params, described.config, path)
    return Loaded(
        kind=described.kind,
        config=described.config,
        params=params,
        axes=P.unflatten({name: named[name] for name in flat}),
        image_token_id=described.image_token_id,
        layout=layout,
        folder=path,
    )


def _use(kind: str) -> str:
    """What a part of a model is good for."""
    start = {"decoder": "llm", "vision": "vision", "dual": "vision"}.get(kind)
    return f"; a recipe may start from it (stages.X.start.{start}.hub)" if start else "; see its config.json"


def import_weights(
    source: str,
    out: str,
    revision: str | None = None,
    vision: str | None = None,
    adapter: str | None = None,
    model_base: str | None = None,
    overwrite: bool = False,
) -> str:
    """``lvlm convert import``: a public checkpoint as weights that a recipe starts from (``start.all.workdir``).

    adapter: one of the peft package for this checkpoint, which is merged into it. model_base: the language model under
    the LLaVA authors' projector or adapters alone.

    Raises:
      FileExistsError: weights stand there already, and `overwrite` was not said.
    """
    if checkpoint.is_saved(Path(out) / "params") and not overwrite:
        raise FileExistsError(f"{out} holds imported weights already; give another folder, or --overwrite")
    loaded = import_folder(source, revision=revision, vision=vision, base=model_base)
    params = loaded.params
    if adapter is not None:
        with download.named("--adapter"):
            adapter = str(download.resolve(adapter))
        params = peft.apply(params, loaded.config, adapter)
    checkpoint.save_params(Path(out) / "params", params)
    count = P.size(loaded.params)
    return f"{out}: {loaded.kind}, {count:,} weights, layout {loaded.layout}"


def _describe(raw: dict, path: Path, tower_path: Path | None, kind: str | None) -> configs.Described:
    """What config.json says, held against what the caller wants."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
    tower = None if tower_path is None else configs.read_json(tower_path / "config.json")
    described = configs.describe(raw, path, tower)
    if tower is not None and not described.original:
        raise ValueError(
            f"vision={str(tower_path)!r}: only the LLaVA authors' files take their tower from elsewhere, and {path} is "
            "none; leave it out"
        )
    if kind == "vision" and described.kind == "dual":
        return configs.Described(kind="vision", config=described.config.vision)
    if kind is not None and kind != described.kind:
        raise CheckpointError(f"{path}: holds a model of kind {described.kind!r}, not {kind!r}{_use(described.kind)}")
    return described


def _by_its_files(described: configs.Described, tensors: formats.Tensors) -> configs.Described:
    """Of an encoder-decoder the files tell whether it has a head of its own.

    Version 5 of the torch library writes of all of them that they are tied, and reads them by their files.
    """
    whole = described.config
    text = whole.llm if described.kind == "lvlm" else whole
    if not isinstance(text, EncoderDecoderConfig) or not text.tied:
        return described
    layout = KINDS[described.kind].layout_of(tensors, tensors.path)
    head = _head(described.kind, layout)
    if head not in tensors or _same(tensors, head, _table(described, layout)):
        return described
    text = dataclasses.replace(text, tied=False)
    whole = dataclasses.replace(whole, llm=text) if described.kind == "lvlm" else text
    return dataclasses.replace(described, config=whole)


Parts = list[tuple[formats.Tensors, list[Row]]]


def _parts(
    described: configs.Described, tensors: formats.Tensors, tower: Path | None, layout: str | None
) -> tuple[Parts, str]:
    """(what to read with the key table of each, layout of the first)."""
    path, kind = tensors.path, KINDS[described.kind]
    layout = layout or kind.layout_of(tensors, path)
    if layout not in kind.layouts:
        raise ValueError(f"unknown layout {layout!r}; those of kind {described.kind!r} are {', '.join(kind.layouts)}")
    if layout != "llava-original":
        return [(tensors, _rows(described, layout, path))], layout
    has_tower = any(key.startswith(llava.LAYOUTS[layout].vision) for key in tensors)
    if has_tower and tower is None:
        return [(tensors, kind.rows(described.config, layout))], layout
    if has_tower:
        raise ValueError(f"vision={str(tower)!r}: {path} holds a vision tower already; leave it out")
    if tower is None:
        name = configs.read_json(path / "config.json")["mm_vision_tower"]
        raise CheckpointError(
            f"{path}: holds no vision tower; the authors take it from {name!r}. Give vision={name!r} or its folder"
        )
    files = TensorFolder(tower)
    vision = described.config.vision
    prefix = KINDS["vision"].layouts[KINDS["vision"].layout_of(files, tower)]
    rows = TOWERS[family_of(vision)].rows(vision, "vision", prefix if prefix == "vision_model." else "")
    return [(tensors, llava.rows(described.config, layout, tower=False)), (files, rows)], layout


def _rows(described: configs.Described, layout: str, path: Path) -> list[Row]:
    """The key table, where what config.json says can be written in the layout that the weights are in."""
    try:
        return KINDS[described.kind].rows(described.config, layout)
    except ValueError as error:
        raise CheckpointError(f"{path}: config.json and the weights beside it are of two models: {error}") from error


def _check_keys(parts: Parts, described: configs.Described, layout: str, shapes: Params, path: Path) -> None:
    """No key left over on either side."""
    kinds = [KINDS[described.kind], *[KINDS["vision"]] * (len(parts) - 1)]
    theirs = [key for kind, (tensors, _) in zip(kinds, parts) for key in tensors if not kind.is_unused(key)]
    copy = _tied_copy(parts[0][0], described, layout, path)
    try:
        rows = [row for _, part in parts for row in part]
        keymap.check(rows, P.flatten(shapes), [key for key in theirs if key != copy], str(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _tied_copy(tensors: formats.Tensors, described: configs.Described, layout: str, path: Path) -> str | None:
    """The key of an output head that a tied model's folder holds although it is the embedding over again."""
    config = described.config
    alone = dict.fromkeys(("decoder", "encoder_decoder"), lambda: config)
    decoder = {"lvlm": lambda: config.llm, **alone}.get(described.kind, lambda: None)()
    if decoder is None or not decoder.tied:
        return None
    head = _head(described.kind, layout)
    if head not in tensors:
        return None
    table = _table(described, layout)
    if not _same(tensors, head, table):
        raise CheckpointError(
            f"{path}: config.json ties the output head to the embedding, but {head!r} differs from {table!r}; set "
            "tie_word_embeddings to false to keep both"
        )
    return head


def _head(kind: str, layout: str) -> str:
    """The key of the output head; a language model alone, big_vision's files and Idefics' have it at the top."""
    return getattr(zoo.LAYOUTS.get(layout) if kind == "lvlm" else None, "head", "lm_head.weight")


def _table(described: configs.Described, layout: str) -> str:
    """The key of the embedding."""
    rows = KINDS[described.kind].rows(described.config, layout)
    return next(row.theirs for row in rows if row.leaves[-1] in ("embed/table", "llm/embed/table"))


def _same(tensors: formats.Tensors, one: str, other: str) -> bool:
    """Whether two tensors hold the same bytes."""
    return np.array_equal(tensors.read(one).view(np.uint8), tensors.read(other).view(np.uint8))
