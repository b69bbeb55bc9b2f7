"""``lvlm_jax.load``: a checkpoint becomes a system that can be asked."""

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from lvlm_jax import llm, zoo
from lvlm_jax import params as trees
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.config import near
from lvlm_jax.hub import beside, download, formats, minigpt4, peft, senses
from lvlm_jax.hub.configs import READERS, read_json
from lvlm_jax.hub.convert import Loaded, import_folder
from lvlm_jax.infer.interleaved import InterleavedSystem
from lvlm_jax.infer.system import System
from lvlm_jax.mesh import PRESETS, compute_dtype, make_mesh
from lvlm_jax.models.lvlm import LVLM, LVLMConfig
from lvlm_jax.models.unified import Unified
from lvlm_jax.processing.chat_templates import TEMPLATES, Template
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.shapes import DTypeLike
from lvlm_jax.zoo import SYSTEMS, Spec, chameleon, video_of

EXPORT = "export"
"""Folder of a training run's workdir that holds the trained model for other software."""
DTYPES = ("float32", "bfloat16", "float16")
"""What a loaded model can compute in."""


def load(
    name_or_folder: str | Path,
    *,
    mesh: Mesh | str | None = None,
    dtype: DTypeLike | Literal["stored"] | None = None,
    revision: str | None = None,
    template: str | Template | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    vision: str | Path | None = None,
    adapter: str | Path | None = None,
    model_base: str | Path | None = None,
    sense: Sequence[str | Path] = (),
    token: str | None = None,
    cache: str | Path | None = None,
    offline: bool | None = None,
    rows: int = 16,
) -> System | InterleavedSystem:
    """A vision-language model with all that it takes to ask it; an `InterleavedSystem` of one that writes pictures too.

    Example:
      >>> import lvlm_jax
      >>> model = lvlm_jax.load("runs/quickstart")            # or "llava-hf/llava-1.5-7b-hf", or an exported folder
      >>> answer = model.generate("What color is it?", images="photo.png", max_new_tokens=8)
      >>> chat = model.chat()
      >>> first = chat.ask("What is this?", images="photo.png", max_new_tokens=8)

    Args:
      name_or_folder: a folder in the torch library's or the LLaVA authors' layout, the workdir of an ``lvlm train``
        that has exported, a name out of `zoo.SYSTEMS`, or a hub name.
      mesh: devices to run on (`mesh.make_mesh`), or the name of a preset over all there are; default the first one.
      dtype: of weights and compute; default by device: bfloat16, float16 on GPUs without it, float32 on a CPU. "stored"
        leaves the weights as the files have them, and computes by device.
      revision, token, cache, offline: for a hub name; see `hub.download.resolve`.
      template: chat template, or its name; default the folder's, else the one of the language model's family.
      tokenizer: where it is not in the folder, nor known from the zoo (CogVLM's files have none).
      vision: the vision tower's folder or hub name, for the LLaVA authors' files and BLIP-2's; for MiniGPT-4's,
        BLIP-2's tower and Q-Former (`hub.minigpt4`).
      adapter: a LoRA adapter of the peft package for this model (folder or hub name), or the LLaVA authors' projector.
      model_base: the language model (folder or hub name), where `name_or_folder` holds the LLaVA authors' projector, or
        their adapters, alone, or what BLIP-2's or MiniGPT-4's authors trained.
      sense: pairs of encoder and connector that were exported alone (``lvlm convert export --part``), to be added.
      rows: the most prompts of one batch.

    Raises:
      CheckpointError: a folder that is no vision-language model, or does not fit.
      FileNotFoundError: no folder and no repository of that name, or no tokenizer in it.
      ConnectionError: a hub name that is not in the cache, and the network refused.
      ValueError: a template, mesh or dtype that there is not.
    """
    if isinstance(template, str) and template not in TEMPLATES:
        raise ValueError(f"template={template!r}: choose one of {', '.join(TEMPLATES)}")
    mesh = _mesh(mesh)
    stored = isinstance(dtype, str) and dtype == "stored"
    dtype = compute_dtype()[0] if dtype is None or stored else _floating(dtype)
    kept = None if stored else dtype
    hub = {"token": token, "cache": cache, "offline": offline}
    folder = _folder(name_or_folder, revision, hub)
    kind = _kind(folder)
    kept = kept if kind == "lvlm" else None  # a tokenizer of rounded weights would read other codes
    if minigpt4.is_projection(folder):
        loaded = _projection(folder, vision, model_base, mesh, kept, hub)
    else:
        loaded = import_folder(folder, kind=kind, mesh=mesh, dtype=kept, vision=vision, base=model_base, **hub)
    if kind == "unified":
        _refuse(folder, template=template, adapter=adapter, sense=sense or None)
        options = {"rows": rows, "mesh": mesh, "name": str(name_or_folder)}
        return _interleaved(loaded, folder, tokenizer, dtype, stored, **options)
    config, params = loaded.config, loaded.params
    for pair in sense:
        with download.named("sense= (--sense)"):
            config, params = senses.add(config, params, pair, mesh=mesh, dtype=kept, **hub)
    if adapter is not None:
        with download.named("adapter= (--adapter)"):
            adapter = download.resolve(adapter, **hub)
        params = peft.apply(params, config, adapter)
    spec = next((spec for spec in SYSTEMS.values() if str(name_or_folder) in (spec.name, spec.source)), None)
    if not isinstance(template, Template):
        template = TEMPLATES[template] if template else _template(folder, loaded.config, spec)
    return System(
        model=LVLM(config, dtype=dtype),
        params=params,
        tokenizer=_tokenizer(tokenizer, model_base or (spec and spec.tokenizer) or folder),
        spec=_image_spec(folder, loaded),
        template=template,
        image_token_id=loaded.image_token_id,
        stop_ids=_stop_ids(folder),
        rows=rows,
        mesh=mesh,
        name=str(name_or_folder),
        video=beside.video_spec(folder, video_of(config)),
        instruction=beside.instruction(folder, config.connector) if config.instructed else None,
    )


def _kind(folder: Path) -> str:
    """Of what can be asked, the kind that config.json says: "unified", or "lvlm"."""
    told = None if minigpt4.is_projection(folder) else READERS.get(formats.public_config(folder).get("model_type"))
    return "unified" if told is not None and told[0] == "unified" else "lvlm"


def _refuse(folder: Path, **given: Any) -> None:
    """ValueError for what a model of text and picture tokens has no use for."""
    if useless := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{folder}: a model of text and picture tokens takes no {'=, '.join(useless)}=; leave it out")


def _interleaved(
    loaded: Loaded,
    folder: Path,
    tokenizer: str | Path | Tokenizer | None,
    dtype: DTypeLike,
    stored: bool,
    **options: Any,
) -> InterleavedSystem:
    """A model of text and picture tokens as something to ask; only its decoder's weights are cast."""
    found = beside.image_spec(folder, loaded.config.vision.patch_size)
    if found is None and loaded.config.vision != chameleon.PRESETS["chameleon_7b"].vision:
        raise CheckpointError(f"{folder}: no preprocessor_config.json, so how its pictures were prepared is not known")
    return InterleavedSystem(
        model=Unified(loaded.config, dtype=dtype),
        params=loaded.params if stored else {**loaded.params, "llm": trees.cast(loaded.params["llm"], dtype)},
        tokenizer=_tokenizer(tokenizer, folder),
        spec=found or chameleon.IMAGE,
        **options,
    )


def _tokenizer(given: str | Path | Tokenizer | None, folder: str | Path) -> Tokenizer:
    """The tokenizer that was given, or the folder's."""
    if isinstance(given, Tokenizer):
        return given
    with download.named("tokenizer=") if given else contextlib.nullcontext():
        return beside.tokenizer(given or folder)


def _projection(
    folder: Path,
    vision: str | Path | None,
    base: str | Path | None,
    mesh: Mesh | None,
    dtype: DTypeLike | None,
    hub: dict[str, Any],
) -> Loaded:
    """What BLIP-2's or MiniGPT-4's authors trained, between the front and the language model that the caller names."""
    given = {"vision=": vision, "model_base=": base}
    if absent := [name for name, value in given.items() if value is None]:
        raise CheckpointError(
            f"{folder}: holds BLIP-2's Q-Former or MiniGPT-4's dense layer alone; give {' and '.join(absent)}: "
            "BLIP-2's tower (with its Q-Former for MiniGPT-4's version 1) and the language model"
        )
    found = []
    for name, value in given.items():
        with download.named(name):
            found.append(download.resolve(value, **hub))
    return minigpt4.import_projection(folder, *found, mesh=mesh, dtype=dtype)


def export_line(workdir: str | Path) -> str:
    """The command that exports what a finished run trained, anew if it was exported before."""
    return f"lvlm convert export {workdir} {Path(workdir) / EXPORT} --overwrite"


def _mesh(mesh: Mesh | str | None) -> Mesh | None:
    """A mesh as it is, or that of a preset. ValueError for a name that is none."""
    if not isinstance(mesh, str):
        return mesh
    if mesh not in PRESETS:
        raise ValueError(f"mesh={mesh!r}{near(mesh, PRESETS)}: choose one of {', '.join(PRESETS)}, or give a Mesh")
    return make_mesh(mesh)


def _floating(dtype: DTypeLike) -> DTypeLike:
    """`dtype` if a model can compute in it. ValueError with the choices."""
    try:
        known = jnp.dtype(dtype).name in DTYPES
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}, or 'stored'")
    return dtype


def _folder(name: str | Path, revision: str | None, hub: dict[str, Any]) -> Path:
    """The checkpoint's folder: exported by a training run, or as `hub.download` finds it."""
    path = Path(name).expanduser()
    if minigpt4.is_projection(path):
        return path
    if path.is_dir() and not (path / "config.json").is_file() and revision is None:
        if (path / EXPORT / "config.json").is_file():
            return path / EXPORT
        if (path / "recipe.json").is_file():
            raise CheckpointError(
                f"{path}: nothing is exported yet. If this training run has not finished, run the same lvlm train "
                f"command to its end (it resumes); a run of several hosts ends without: {export_line(path)}"
            )
        if (path / "params").is_dir():
            raise CheckpointError(
                f"{path}: imported weights alone, for a recipe to start from (stages.X.start.all.workdir); to ask the "
                "model, give the public folder or name that they came from"
            )
        raise CheckpointError(
            f"{path}: neither config.json nor {EXPORT}/config.json is in it. Of a training run, give the workdir after "
            "it has exported (the last stage does); of a checkpoint, the folder with config.json"
        )
    if not path.is_dir() and str(name) in SYSTEMS:
        spec = SYSTEMS[str(name)]
        if not spec.released:
            only = f", only those of its language model ({spec.source})" if spec.source else ""
            raise CheckpointError(
                f"{name}: nobody published its weights{only}; train it (lvlm list names the recipes) and load the "
                "workdir"
            )
        return download.resolve(spec.source, revision, **hub)
    word = "/" not in str(name) and not str(name).startswith(download.INSTALLED) and path.suffix not in download.FILES
    if word and not path.exists():
        raise FileNotFoundError(
            f"{name}: no such folder here, no system of that name{near(str(name), SYSTEMS)}, and not a hub name either "
            "(those are 'owner/name'); check the path, or see lvlm list"
        )
    return download.resolve(name, revision, **hub)


def _image_spec(folder: Path, loaded: Loaded) -> ImageSpec:
    """How pictures are prepared: the folder's own word, else that of the released system with the same vision tower."""
    found = beside.image_spec(folder, loaded.config.vision.patch_size)
    if found is not None:
        return found
    for spec in SYSTEMS.values():
        if (spec.config.vision, spec.config.newline) == (loaded.config.vision, loaded.config.newline):
            tiles = beside.original_tiles(folder)
            return spec.image if tiles is None else dataclasses.replace(spec.image, tiles=tiles)
    raise CheckpointError(
        f"{folder}: there is no preprocessor_config.json, so how pictures were prepared in training is not known; put "
        "it there (the vision tower's repository has one)"
    )


HOST_TEMPLATES = {
    "mistral": "mistral_instruct",
    "qwen2": "qwen_chatml",
    "qwen3": "qwen_chatml",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
}
"""Family of the language model -> template of a folder that has none, where no system of the zoo tells."""


def default_template(config: LVLMConfig) -> str:
    """What the zoo's systems of the same family, on the same kind of language model, are asked with."""
    host, front = llm.family_of(config.llm), (config.vision, config.connector)
    systems = zoo.senses.base_of(config)[0].SYSTEMS.values()
    alike = [spec for spec in systems if llm.family_of(spec.config.llm) == host]
    if alike:
        return min(alike, key=lambda spec: (spec.config.vision, spec.config.connector) != front).template
    return HOST_TEMPLATES.get(host, "vicuna_v1")


def _template(folder: Path, config: LVLMConfig, spec: Spec | None = None) -> Template:
    """The template that the folder's own stands for, else the zoo's word for it, else that of the model's family."""
    found = beside.chat_template(folder)
    if found is None and spec is not None:
        return TEMPLATES[spec.template]
    if found is None:
        name = default_template(config)
        warnings.warn(
            f"{folder}: no chat template that is known here, so {name!r} is used; if the model was trained with "
            f"another, give template= (--template): one of {', '.join(TEMPLATES)}",
            stacklevel=3,
        )
        found = TEMPLATES[name]
    return found


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """Tokens that end an answer, of generation_config.json (config.json has them in old folders)."""
    if folder.is_file() or not (folder / "config.json").is_file():
        return ()
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    places = (read_json(generation) if generation.is_file() else {}, config, config.get("text_config", {}))
    for place in places:
        ids = place.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()
