"""Parity as a user's command: the same folder here and in the torch library, on one picture and one prompt."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub import (
    beside,
    convert,
    download,
    formats,
    verify_fused,
    verify_here,
    verify_native,
    verify_queries,
    verify_unified,
)
from lvlm_jax.hub.comparison import TOLERANCE, Comparison, Part
from lvlm_jax.hub.export import export_folder
from lvlm_jax.processing.image import ImageSpec, load_image, preprocess_rows, to_rows
from lvlm_jax.processing.pooling import taps
from lvlm_jax.processing.schema import NEWLINE, TEXT, Blend
from lvlm_jax.processing.tiles import span, whole
from lvlm_jax.vision import CONVOLUTIONAL, NativeViTConfig, VisionConfig
from lvlm_jax.vision.text_tower import TextTowerConfig
from lvlm_jax.vision.vq import VQConfig
from lvlm_jax.zoo import OWN_TYPES, family_of
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD

PROMPT = "What is in this picture?"


def verify(
    folder: str | Path,
    theirs: str | Path | None = None,
    picture: Any = None,
    prompt: str = PROMPT,
    vision: str | Path | None = None,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Runs a checkpoint here and in the torch library, both in float32, and compares stage by stage.

    Args:
      folder: what we read; a folder or a hub name.
      theirs: what the torch library reads, likewise; default the same. The LLaVA authors' layout and big_vision's,
        which it does not know, are exported for it first.
      picture: anything `load_image` takes; default a made one.
      prompt: read by the folder's tokenizer; a folder without one gets made token ids.
      vision: as `import_folder` takes it.

    Raises:
      FileNotFoundError: what is named on this machine is not there.
      ModuleNotFoundError: torch is not installed.
    """
    for name in filter(None, (folder, theirs, vision)):
        download.here(name)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "verify compares with the torch library, and torch is not installed: pip install torch==2.13.0 "
            "(a CPU build on Python 3.11)"
        ) from error
    loaded = convert.import_folder(folder, dtype=jnp.float32, vision=vision)
    if loaded.kind not in _REFERENCES:
        raise ValueError(f"{folder}: of kind {loaded.kind!r}; this command compares {', '.join(_REFERENCES)}")
    theirs = None if theirs is None else download.resolve(theirs)
    with tempfile.TemporaryDirectory() as spare, jax.default_matmul_precision("highest"):
        if theirs is None and (loaded.layout in ("llava-original", "timm") or loaded.folder.suffix == ".npz"):
            theirs = export_folder(
                Path(spare) / "hf",
                loaded.config,
                loaded.params,
                image_spec=_spec(loaded),
                image_token_id=loaded.image_token_id,
            )
        inputs = _inputs(loaded, picture, prompt)
        reference, keys = _REFERENCES[loaded.kind](loaded, Path(theirs or loaded.folder), inputs)
        run = jax.jit(
            lambda params, inputs: verify_here.OURS[loaded.kind](dataclasses.replace(loaded, params=params), inputs)
        )
        ours = jax.tree.map(np.asarray, run(loaded.params, jax.tree.map(jnp.asarray, inputs)))
    parts = [_part(name, ours[name], value) for name, value in reference.items()]
    return Comparison(tuple(parts), tuple(keys), tolerance)


def _part(name: str, ours: np.ndarray, theirs: Any) -> Part:
    theirs = theirs.detach().float().numpy()
    if ours.shape != theirs.shape:
        raise CheckpointError(f"{name}: shape {list(ours.shape)} here and {list(theirs.shape)} in the torch library")
    return Part(name, float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()))


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def _inputs(loaded: convert.Loaded, picture: Any, prompt: str) -> dict[str, np.ndarray]:
    """Token ids, and pixels both as patches (ours) and as one array (theirs)."""
    tower, spec = _tower(loaded), _spec(loaded)
    out: dict[str, np.ndarray] = {}
    if tower is not None:
        if spec.size != tower.image_size and getattr(tower, "resize", "none") == "none":
            raise CheckpointError(
                f"{loaded.folder}: pictures are prepared at {spec.size} pixels, but the tower reads "
                f"{tower.image_size}; see preprocessor_config.json"
            )
        if getattr(loaded.config, "newline", False) and spec.tiles is None:
            raise CheckpointError(f"{loaded.folder}: preprocessor_config.json names no image_grid_pinpoints (tiles)")
        image = load_image(_made_picture() if picture is None else picture)
        if spec.native is not None:
            return verify_native.inputs(image, spec, _tokens(loaded, prompt), loaded.image_token_id)
        patches, positions = to_rows(image, spec)
        out |= {"patches": patches, "positions": positions, "segments": np.ones(patches.shape[:2], np.int32)}
        # A tower of theirs for pictures of any shape takes patches, too.
        if spec.fit != "naflex":
            out["pixels"] = preprocess_rows(image, spec).transpose(0, 3, 1, 2)
        out["picture_size"] = np.asarray([[image.height, image.width]], np.int32)
    if loaded.kind == "lvlm":
        q = loaded.config.visual_tokens
        found = whole(q) if spec.tiles is None else span(*image.size, spec.tiles, spec.size, q)
        words = _tokens(loaded, prompt)
        before, after = 2, len(words) - 2
        words[before:before] = [loaded.image_token_id] * len(found.index)
        index = np.where(found.index == NEWLINE, found.rows * q, found.index)
        out["image_index"] = np.pad(index, (before, after), constant_values=TEXT)[None]
        if found.blend is not None:
            more = lambda x: np.pad(x, ((before, after), (0, 0)))  # noqa: E731
            several = taps(out["image_index"][0], Blend(more(found.blend.index), more(found.blend.weight)))
            out["blend_index"], out["blend_weight"] = (x[None] for x in several)
        out["tokens"] = np.asarray([words], np.int32)
        out["weights"] = np.zeros(out["tokens"].shape, np.float32)
        if loaded.config.two_stacks:
            out["weights"][:, -verify_queries.WRITTEN :] = 1
        if loaded.config.instructed:
            out["instruction"] = verify_queries.instruction(loaded.config.connector, loaded.folder, prompt)[None]
    elif loaded.kind == "unified":
        out["tokens"], out["image_index"] = verify_unified.row(loaded.config, _tokens(loaded, prompt))
    elif loaded.kind in ("dual", "text"):
        out["tokens"] = _texts(getattr(loaded.config, "text", loaded.config))
    elif loaded.kind in ("decoder", "encoder_decoder"):
        out["tokens"] = np.asarray([_tokens(loaded, prompt)], np.int32)
    if loaded.kind == "encoder_decoder":
        out["written"] = np.roll(out["tokens"], 1)
        out["written"][0, 0] = loaded.config.start_id
    return out


def _tower(loaded: convert.Loaded) -> VisionConfig | VQConfig | None:
    return getattr(loaded.config, "vision", loaded.config if loaded.kind == "vision" else None)


def _spec(loaded: convert.Loaded) -> ImageSpec | None:
    """How pictures come to the tower: the folder's word, or what fits it; None for a model without one."""
    tower = _tower(loaded)
    if tower is None:
        return None
    if found := beside.image_spec(loaded.folder, tower.patch_size):
        return found
    if isinstance(tower, NativeViTConfig):
        return verify_native.spec_of(tower, CLIP_MEAN, CLIP_STD)
    spec = ImageSpec(size=tower.image_size, patch=tower.patch_size, mean=CLIP_MEAN, std=CLIP_STD)
    if getattr(tower, "resize", "none") == "linear_antialias":  # a tower for pictures of any shape (SigLIP 2)
        spec = dataclasses.replace(spec, fit="naflex", max_patches=tower.patches)
    tiles = beside.original_tiles(loaded.folder)
    return spec if tiles is None else dataclasses.replace(spec, fit="squash", tiles=tiles)


def _made_picture() -> np.ndarray:
    """Colours that change smoothly, with noise: every frequency is there."""
    y, x = np.mgrid[0:300, 0:400]
    smooth = np.stack([y / 300, x / 400, (x + y) / 700], -1) * 200
    return (smooth + np.random.default_rng(0).uniform(0, 55, smooth.shape)).astype(np.uint8)


def _texts(text: TextTowerConfig, rows: int = 8) -> np.ndarray:
    """Several texts of full length, since the score of one pair alone may be zero by chance; the id pooled is last."""
    ids = 3 + np.outer(7 + np.arange(rows), np.arange(text.context)) % (text.vocab - 4)
    ids[:, -1] = text.eos_id if text.pool == "eos" else text.vocab - 1
    return ids.astype(np.int32)


def _tokens(loaded: convert.Loaded, prompt: str) -> list[int]:
    decoder = getattr(loaded.config, "llm", loaded.config)
    try:
        words = beside.tokenizer(loaded.folder).encode_text(prompt)[0].tolist()
    except FileNotFoundError:
        words = [3 + (7 * i) % (decoder.vocab - 4) for i in range(12)]
    return [word for word in words if word != loaded.image_token_id]


# ---------------------------------------------------------------------------------------------------------------------
# In the torch library

Reference = tuple[dict[str, Any], list[str]]


_CLASSES = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "clip_text_model": "CLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2": "Siglip2Model",
    "siglip2_vision_model": "Siglip2VisionModel",
    "blip_2_vision_model": "Blip2VisionModel",
    "siglip2_text_model": "Siglip2TextModel",
}
"""Their class of each ``model_type``; their automatic choice does not know all."""


def _open(name: str | None, folder: Path) -> tuple[Any, list[str]]:
    """(their model in float32, what it says of the keys)."""
    import torch
    import transformers

    raw = formats.public_config(folder)
    kind = raw.get("model_type")
    if kind in (None, *OWN_TYPES, *CONVOLUTIONAL):  # timm's own folders have no model_type
        raise CheckpointError(
            f"{folder}: the torch library has no class for this model (another connector, prefix attention, a fusion, "
            "or one of timm's towers), so there is nothing to compare with"
        )
    name = name or _CLASSES.get(kind) or raw["architectures"][0]
    where = (str(folder.parent), folder.name) if folder.is_file() else (str(folder), None)
    model, said = getattr(transformers, name).from_pretrained(
        where[0], gguf_file=where[1], dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    names = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model.eval(), [f"{name.split('_')[0]}: {key}" for name in names for key in said[name]]


def _tensor(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.int64 if x.dtype == np.int32 else torch.float32)


def _their_lvlm(loaded: convert.Loaded, folder: Path, inputs: dict[str, np.ndarray]) -> Reference:
    import torch

    model, keys = _open(family_of(loaded.config).ARCHITECTURE, folder)
    inner = getattr(model, "model", model)
    pixels, tokens, tower = _tensor(inputs["pixels"]), _tensor(inputs["tokens"]), loaded.config.vision
    if loaded.config.fusion is not None:
        return torch.no_grad()(verify_fused.reference)(model, tokens, pixels, loaded.image_token_id), keys
    # Their folder may have another word for a picture than ours.
    tokens = tokens.masked_fill(tokens == loaded.image_token_id, model.config.image_token_id)
    if "grid" in inputs:
        return torch.no_grad()(verify_native.reference)(model, tokens, pixels, _tensor(inputs["grid"])), keys
    if hasattr(model, "qformer"):
        said = [_tensor(inputs["instruction"])] if "instruction" in inputs else []
        return torch.no_grad()(verify_queries.reference)(model, tokens, pixels, *said), keys
    with torch.no_grad():
        seen = inner.vision_tower(pixels, output_hidden_states=True)
        features = seen.last_hidden_state if tower.feature_norm else seen.hidden_states[tower.feature_layer]
        if tower.class_token and not tower.class_feature:
            features = features[:, 1:]
        connected = inner.multi_modal_projector(features)
        more = {"token_type_ids": torch.zeros_like(tokens)} if loaded.config.attention == "prefix" else {}
        if loaded.config.newline:
            more, pixels = {**more, "image_sizes": _tensor(inputs["picture_size"])}, pixels[None]
        out = model(
            input_ids=tokens,
            pixel_values=pixels,
            attention_mask=torch.ones_like(tokens),
            output_hidden_states=True,
            **more,
        )
    parts = {"vision features": features, "connector": connected.reshape(1, -1, connected.shape[-1])}
    return parts | {"hidden states": out.hidden_states[-1], "logits": out.logits}, keys


def _their_unified(loaded: convert.Loaded, folder: Path, inputs: dict[str, np.ndarray]) -> Reference:
    model, keys = _open(None, folder)
    parts = verify_unified.theirs(loaded.config, model, _tensor(inputs["tokens"]), _tensor(inputs["pixels"]))
    return parts, keys


def _their_decoder(loaded: convert.Loaded, folder: Path, inputs: dict[str, np.ndarray]) -> Reference:
    import torch

    bare = loaded.layout == "bare"
    model, keys = _open("AutoModel" if bare else "AutoModelForCausalLM", folder)
    with torch.no_grad():
        out = model(input_ids=_tensor(inputs["tokens"]), output_hidden_states=True)
    return {"hidden states": out.hidden_states[-1]} | ({} if bare else {"logits": out.logits}), keys


def _their_encoder_decoder(loaded: convert.Loaded, folder: Path, inputs: dict[str, np.ndarray]) -> Reference:
    import torch

    model, keys = _open("AutoModelForSeq2SeqLM", folder)
    with torch.no_grad():
        out = model(input_ids=_tensor(inputs["tokens"]), decoder_input_ids=_tensor(inputs["written"]))
    return {"encoder": out.encoder_last_hidden_state, "logits": out.logits}, keys


def _their_dual(loaded: convert.Loaded, folder: Path, inputs: dict[str, np.ndarray]) -> Reference:
    import torch

    model, keys = _open(None, folder)
    with torch.no_grad():
        out = model(input_ids=_tensor(inputs["tokens"]), **_their_picture(inputs))
    vectors = {"picture vector": out.image_embeds, "text vector": out.text_embeds}
    return vectors | {"logits": out.logits_per_image}, keys


def _their_picture(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """A picture as their towers take it: pixels, or patches with the grid that they fill."""
    if "pixels" in inputs:
        return {"pixel_values": _tensor(inputs["pixels"])}
    return {
        "pixel_values": _tensor(inputs["patches"]),
        "pixel_attention_mask": _tensor(inputs["segments"]),
        "spatial_shapes": _tensor(inputs["positions"].max(1) + 1),
    }


def _their_tower(loaded: convert.Loaded, folder: Path, inputs: dict[str, np.ndarray]) -> Reference:
    import torch

    model, keys = _open(None, folder)
    given = _their_picture(inputs) if loaded.kind == "vision" else {"input_ids": _tensor(inputs["tokens"])}
    with torch.no_grad():
        whole = model(**given)
        # Behind a classifier stands the tower that it reads.
        out = whole if "last_hidden_state" in whole else model.base_model(**given)
    parts = {"hidden states": out.last_hidden_state} | ({"logits": whole.logits} if "logits" in whole else {})
    return parts if out.pooler_output is None else parts | {"pooled vector": out.pooler_output}, keys


_REFERENCES = {
    "lvlm": _their_lvlm,
    "unified": _their_unified,
    "decoder": _their_decoder,
    "encoder_decoder": _their_encoder_decoder,
    "dual": _their_dual,
    "vision": _their_tower,
    "text": _their_tower,
}
