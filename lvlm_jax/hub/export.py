"""A model of ours as a complete folder that the torch library (or the LLaVA authors' code) loads."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import params as P
from lvlm_jax import vision, zoo
from lvlm_jax.hub import beside, configs
from lvlm_jax.hub.families import KINDS, Config, without_head
from lvlm_jax.hub.safetensors_io import SHARD_BYTES, new_folder, write_tensors
from lvlm_jax.keymap import Row
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.chat_templates import TEMPLATES, Template
from lvlm_jax.processing.frames import DEFAULT, VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.instruction import Instruction
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.shapes import DTypeLike, Params

IMAGE_TOKEN = "<image>"
"""The name of a picture's placeholder in the tokenizer."""


def export_folder(
    folder: str | Path,
    config: Config,
    params: Params,
    tokenizer: Tokenizer | None = None,
    image_spec: ImageSpec | None = None,
    template: str | Template | None = None,
    layout: str = "hf",
    *,
    image_token_id: int | None = None,
    video: VideoSpec | None = None,
    instruction: Instruction | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Writes config.json, weights, and what of tokenizer, picture processor and chat template is given.

    The folder appears whole or not at all. Weights go shard by shard: no more than one is held on the host.

    Args:
      params: the model's parameters, layers stacked or one by one.
      tokenizer: needed for a folder that generates; a vision-language model's has the special token ``<image>``.
      template: a chat template or its name.
      layout: "hf", which every version of the torch library loads, or a name out of `families.KINDS`;
        "llava-original" is the LLaVA authors'.
      image_token_id: default the tokenizer's ``<image>``.
      video: how videos become frames; what the model's family does anyway is not written down.
      instruction: what writes down what the connector reads beside a picture, for one that reads anything.
      dtype: of the weights; default as they are.
      overwrite: replace what stands there.

    Raises:
      ValueError: parameters that do not fit the config, a tokenizer without ``<image>`` or with more ids than the
        embedding has rows, a layout that has no place for a part.
      FileExistsError: the folder is there and `overwrite` is False.
    """
    kind = configs.kind_of(config)
    layout = _layout(kind, layout, config)
    template = _template(template)
    vocab = _vocab(config)
    if tokenizer is not None and vocab is not None and tokenizer.vocab_size > vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the embedding has {vocab} rows; export the tokenizer "
            "that the model was trained with"
        )
    if isinstance(config, LVLMConfig) and image_token_id is None and layout != "llava-original":
        image_token_id = _image_token(config, tokenizer)
    rows, shapes = KINDS[kind].rows(config, layout), KINDS[kind].shapes(config, False)[0]
    _check_rows(rows, without_head(shapes, rows), layout)
    read = _leaves(params, shapes, dtype)
    if layout == "llava-original":
        public = configs.to_original(config, image_spec)
    elif layout == "timm":
        public = vision.timm.to_config(config)
    else:
        public = configs.public_config(config, image_token_id, image_spec)
    files = _files(config, public, tokenizer, image_spec, template, _widest(params, dtype))
    usual = zoo.video_of(config) if isinstance(config, LVLMConfig) else DEFAULT
    if video is not None and video != usual:
        files[beside.VIDEO_FILE] = video.to_hf()
    with new_folder(folder, overwrite) as partial:
        if tokenizer is not None:
            tokenizer.save(partial)
        if instruction is not None:
            beside.save_instruction(instruction, partial)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
        write_tensors(partial, _tensors(rows, read), max_shard_bytes)
    return Path(folder)


def _layout(kind: str, layout: str, config: Config) -> str:
    names = KINDS[kind].layouts
    if layout == "hf" and "hf" not in names:
        return KINDS[kind].default(config)
    if layout not in names:
        known = ", ".join(dict.fromkeys(["hf", *names]))
        raise ValueError(f"unknown layout {layout!r}; for kind {kind!r} there are {known}")
    return layout


def _template(template: str | Template | None) -> Template | None:
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise ValueError(f"no chat template {template!r}; there are {', '.join(TEMPLATES)}")
        return TEMPLATES[template]
    return template


def _vocab(config: Config) -> int | None:
    return getattr(getattr(config, "text", config), "vocab", None)


def _image_token(config: LVLMConfig, tokenizer: Tokenizer | None) -> int:
    family, plain = zoo.senses.base_of(config)  # named senses change nothing of a picture's word
    if family.MODEL_TYPE in zoo.WORDLESS:
        return zoo.WORDLESS[family.MODEL_TYPE]
    word = family.processor(plain).get("image_token", IMAGE_TOKEN)
    if tokenizer is None:
        raise ValueError("give the tokenizer, or image_token_id=: config.json names the token where a picture goes")
    if not tokenizer.has_special(word):
        raise ValueError(
            f"the tokenizer has no special token {word!r}, which the torch library puts where a picture goes. "
            "Call hub.export.add_image_token(config, params, tokenizer) first and export what it returns"
        )
    return tokenizer.special_id(word)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _check_rows(rows: list[Row], shapes: Params, layout: str) -> None:
    """Every leaf has its place in the layout: what has none would be left out without a word."""
    if gaps := sorted({path for row in rows for path in row.leaves} ^ P.flatten(shapes).keys()):
        some = ", ".join(gaps[:4]) + (f" ... and {len(gaps) - 4} more" if len(gaps) > 4 else "")
        raise ValueError(f"layout {layout!r} cannot hold this model ({some}); choose another layout")


def _leaves(params: Params, shapes: Params, dtype: Any) -> Callable[[str], np.ndarray]:
    """A function that brings one leaf (layers apart) to the host; first, the tree is held against the config."""
    flat, wanted = P.flatten(params), P.flatten(shapes)
    have: dict[str, tuple[int, ...]] = {}
    place: dict[str, tuple[str, int | None]] = {}
    for path in wanted:
        stack, index = P.stack_path(path)
        source = (path, None) if path in flat else (stack, index)
        if source[0] in flat:
            place[path] = source
            have[path] = tuple(flat[source[0]].shape[0 if source[1] is None else 1 :])
    missing = sorted(wanted.keys() - have.keys())
    extra = sorted(flat.keys() - {source for source, _ in place.values()})
    wrong = [f"{p} {list(have[p])} for {list(wanted[p].shape)}" for p in have if have[p] != tuple(wanted[p].shape)]
    if missing or extra or wrong:
        raise ValueError(
            f"the parameters are not those of this config: missing {missing[:5]}, extra {extra[:5]}, "
            f"other shapes {wrong[:5]}"
        )

    def read(path: str) -> np.ndarray:
        source, index = place[path]
        leaf = flat[source]
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(f"{source} is spread over several processes; load the checkpoint in one, and export there")
        leaf = _on_host(leaf, index)
        return leaf.astype(dtype) if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return read


def _on_host(leaf: Any, index: int | None) -> np.ndarray:
    """One leaf, or one layer of a stack, on the host: a view where it lies there already, else a copy of its own.

    `np.asarray` of an array elsewhere keeps what it fetched inside that array for as long as it lives: a whole model,
    in the end. So a copy is fetched, and dropped.
    """
    if isinstance(leaf, np.ndarray) or (len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"):
        return np.asarray(leaf) if index is None else np.asarray(leaf)[index]
    return np.asarray(jnp.copy(leaf) if index is None else leaf[index])


def _tensors(rows: list[Row], read: Callable[[str], np.ndarray]) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    for row in rows:
        yield row.theirs, lambda row=row: row.save({path: read(path) for path in row.leaves})


def _widest(params: Params, dtype: Any) -> str:
    """The number type that holds every weight: what config.json promises."""
    kinds = {leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return jnp.dtype(dtype if dtype is not None else jnp.result_type(*kinds)).name


# ---------------------------------------------------------------------------------------------------------------------
# Everything beside the weights


def _files(
    config: Config,
    public: dict[str, Any],
    tokenizer: Tokenizer | None,
    spec: ImageSpec | None,
    template: Template | None,
    dtype: str,
) -> dict[str, str | Mapping[str, Any]]:
    """The small files by name."""
    # Versions 4 of the torch library read torch_dtype, versions 5 dtype.
    out: dict[str, Any] = {"config.json": {**public, "dtype": dtype, "torch_dtype": dtype}}
    if tokenizer is not None:
        words = _words(tokenizer, template)
        if "text_config" in public:
            out["config.json"]["text_config"] = {**public["text_config"], **words}
        elif _vocab(config) is not None:
            out["config.json"].update(words)
        if configs.kind_of(config) in ("lvlm", "unified", "decoder", "encoder_decoder"):
            start = "decoder_start_token_id"
            out["generation_config.json"] = words | ({start: public[start]} if start in public else {})
    lvlm = isinstance(config, LVLMConfig)
    if spec is not None:
        out["preprocessor_config.json"] = spec.to_hf()
    if lvlm and spec is not None:
        processor = zoo.family_of(config).processor(config)
        names = ("processor_class", "image_processor_type", "image_seq_length")
        shared = {name: processor[name] for name in names if name in processor}
        # LLaVA-OneVision's processor counts the positions of a picture by a limit that stands with the pictures here.
        limit = out["preprocessor_config.json"].get("vision_aspect_ratio")
        processor |= {} if limit is None else {"vision_aspect_ratio": limit}
        out["preprocessor_config.json"] |= shared
        if tokenizer is not None:
            out["processor_config.json"] = {"image_token": IMAGE_TOKEN, **processor}
    if template is not None:
        out["chat_template.jinja"] = template.jinja()
    return out


def _words(tokenizer: Tokenizer, template: Template | None) -> dict[str, Any]:
    """Ids that start, end and pad a text; an answer also ends where its template says."""
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ends += tokenizer.word_ids(template.stop if template is not None else ())
    ends = list(dict.fromkeys(ends))
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_id,
    }


def add_image_token(
    config: LVLMConfig, params: Params, tokenizer: Tokenizer, multiple: int = 64
) -> tuple[LVLMConfig, Params]:
    """Gives a model of the LLaVA authors' kind, which has no word for a picture, the words ``<image>`` and ``<pad>``.

    The tokenizer grows in place; embedding and head get rows up to a `multiple`, each the mean of the old rows (new
    words start there: systems that add tokens do so, LLaVA among them).
    """
    tokenizer.add_special([IMAGE_TOKEN, "<pad>"])
    size = -(-max(tokenizer.vocab_size, config.llm.vocab) // multiple) * multiple
    extra = size - config.llm.vocab

    llm = dict(params["llm"])
    llm["embed"] = {"table": P.add_rows(llm["embed"]["table"], extra, 0)}
    if "head" in llm:
        llm["head"] = {"kernel": P.add_rows(llm["head"]["kernel"], extra, 1)}
    return dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab=size)), {**params, "llm": llm}
