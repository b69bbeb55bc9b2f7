"""The model that is measured, its random weights in a folder that both sides read, and what it is fed with."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from lvlm_jax import params as trees
from lvlm_jax import zoo
from lvlm_jax.connectors import MlpConfig
from lvlm_jax.hub.convert import export_folder
from lvlm_jax.llm import llama
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.image import ImageSpec, preprocess
from lvlm_jax.processing.schema import TEXT, Encoded, Image
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD

PAD, FIRST_WORD = 0, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model, and the rows it is measured on: a picture, a question of so many tokens, an answer of so many.

    Training learns the answer; generation is given picture and question, and writes the answer.
    """

    config: LVLMConfig
    question: int
    answer: int

    @property
    def prompt(self) -> int:
        """Positions before the answer."""
        return self.config.visual_tokens + self.question

    @property
    def length(self) -> int:
        """Positions of a whole row."""
        return self.prompt + self.answer

    @property
    def image_id(self) -> int:
        """The id that stands where a picture goes: the last one."""
        return self.config.llm.vocab - 1

    @property
    def spec(self) -> ImageSpec:
        """How a picture becomes patches: as CLIP's processor does it."""
        vision = self.config.vision
        return ImageSpec(size=vision.image_size, patch=vision.patch_size, mean=CLIP_MEAN, std=CLIP_STD)


def _llava(vision: dict[str, int], llm: dict[str, int]) -> LVLMConfig:
    return LVLMConfig(vision=ViTConfig(**vision), connector=MlpConfig(), llm=DecoderConfig(**llm))


_TINY = _llava(
    {"image_size": 28, "patch_size": 7, "width": 32, "depth": 2, "heads": 4, "mlp_dim": 64},
    {"vocab": 512, "width": 64, "depth": 2, "heads": 4, "kv_heads": 4, "mlp_dim": 128, "context": 64},
)
_80M = _llava(
    {"image_size": 224, "patch_size": 16, "width": 384, "depth": 12, "heads": 6, "mlp_dim": 1536},
    {"vocab": 32000, "width": 512, "depth": 8, "heads": 8, "kv_heads": 8, "mlp_dim": 1376, "context": 256},
)
_LLAVA15 = zoo.SYSTEMS["llava15_7b"].config

CASES: dict[str, Case] = {
    "tiny": Case(config=_TINY, question=8, answer=8),
    "80m": Case(config=_80M, question=28, answer=32),
    "1b": Case(config=dataclasses.replace(_LLAVA15, llm=llama.PRESETS["llama32_1b"]), question=64, answer=384),
    "7b": Case(config=_LLAVA15, question=64, answer=384),
}
"""Models by name: one for tests, one for CPUs, and LLaVA-1.5's tower on two decoders of real sizes for accelerators."""


def make_weights(config: LVLMConfig, seed: int = 0) -> dict:
    """Random parameters, drawn on the host, with which tokens depend on the picture and on one another."""
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    rng = np.random.default_rng(seed)
    flat = {}
    for path, leaf in trees.flatten(shapes).items():
        name = path.split("/")[-1]
        spread = leaf.shape[0] ** -0.5 if name == "kernel" else 0.02
        draw = rng.standard_normal(leaf.shape, np.float32)
        flat[path] = draw * np.float32(spread) + np.float32(name == "scale")
    return trees.unflatten(flat)


def write_folder(folder: Path, case: Case) -> Path:
    """The model in the torch library's layout, made by this library's own export."""
    weights = make_weights(case.config)
    return export_folder(folder, case.config, weights, image_spec=case.spec, image_token_id=case.image_id)


def make_examples(case: Case, rows: int, seed: int = 0) -> list[Encoded]:
    """Whole rows: a start token, the picture, question and answer; the answer is to be learned."""
    rng = np.random.default_rng(seed)
    visual = case.config.visual_tokens
    out = []
    for _ in range(rows):
        tokens = rng.integers(FIRST_WORD, case.image_id, case.length, dtype=np.int32)
        weights = (np.arange(case.length) >= case.prompt).astype(np.float32)
        fills = np.full(case.length, TEXT, np.int32)
        tokens[1 : 1 + visual], fills[1 : 1 + visual] = case.image_id, np.arange(visual)
        side = case.spec.size
        picture = PIL.Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        out.append(Encoded(tokens=tokens, weights=weights, visual=fills, images=(Image(picture),)))
    return out


def prompt_of(example: Encoded, case: Case) -> Encoded:
    """The row up to where its answer begins."""
    cut = {name: getattr(example, name)[: case.prompt] for name in ("tokens", "weights", "visual")}
    return dataclasses.replace(example, **cut)


def write_inputs(path: Path, examples: list[Encoded], case: Case, labels: bool) -> Path:
    """The same rows as the torch library takes them: ids, mask, pixels, and with `labels` what is to be learned."""
    tokens = np.stack([example.tokens for example in examples]).astype(np.int64)
    pixels = [preprocess(image.source, case.spec).transpose(2, 0, 1) for e in examples for image in e.images]
    arrays: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    arrays["pixel_values"] = np.stack(pixels)
    if labels:
        arrays["labels"] = np.where(np.stack([example.weights for example in examples]) > 0, tokens, -100)
    np.savez(path, **arrays)
    return path
