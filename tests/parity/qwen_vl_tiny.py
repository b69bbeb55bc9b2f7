"""Tiny Qwen-VLs of the torch library, conversations with pictures and videos, and what each library makes of them."""

import dataclasses

import numpy as np
import PIL.Image
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lvlm_jax.data.collate import collate
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.native import Native
from lvlm_jax.processing.schema import TEXT, Clip, Encoded, Image, Video
from lvlm_jax.processing.shared_rows import Shared
from lvlm_jax.zoo import qwen2_5_vl, qwen2_vl, qwen3_vl
from tests.parity import compare

IMAGE_ID, VIDEO_ID, PATCH, ROW, RATE = 97, 98, 4, 48, 3.0
WORDS = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, "vision_start_token_id": 94, "vision_end_token_id": 95}
TEXT_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TOWER = {"depth": 3, "num_heads": 4, "patch_size": PATCH}


def _rope(sections, **more):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections, **more}}


CASES = {
    "qwen2_vl": (
        qwen2_vl,
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        {**TEXT_SIZES, **_rope([1, 1, 2])},
        {**TOWER, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": (
        qwen2_5_vl,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        {**TEXT_SIZES, **_rope([2, 1, 1])},
        {
            **TOWER,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 40,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
            "tokens_per_second": int(RATE),
        },
    ),
    "qwen3_vl": (
        qwen3_vl,
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        {**TEXT_SIZES, "head_dim": 16, **_rope([4, 2, 2], mrope_interleaved=True)},
        {
            **TOWER,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    ),
}


def reference(case, **changes):
    """(the torch library's model, its weights perturbed; our family; how pictures are prepared)."""
    torch.manual_seed(0)
    family, cls, config, text, tower = CASES[case]
    model = compare.perturb(cls(config(text_config={**text, **changes}, vision_config=dict(tower), **WORDS)))
    native = Native(min_pixels=8 * PATCH**2, max_pixels=48 * PATCH**2)
    native = dataclasses.replace(native, **({"window": 4, "rate": RATE} if case == "qwen2_5_vl" else {}))
    spec = ImageSpec(
        size=24, patch=PATCH, mean=(0.5,) * 3, std=(0.5,) * 3, fit="native", max_patches=ROW, native=native
    )
    return model, family, spec


def make(case, **changes):
    """(their model, our module, our parameters: their weights, the image spec)."""
    model, family, spec = reference(case, **changes)
    config, image_id = family.from_hf({**model.config.to_dict(), "model_type": family.MODEL_TYPE})
    assert image_id == IMAGE_ID
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, max_patches=ROW))
    assert family.fits(config)
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    rows = family.rows(config, "qwen_vl-nested")
    return model, LVLM(config), compare.load(rows, compare.tensors(model), shapes), spec


def picture(size):
    rng = np.random.default_rng(sum(size))
    return PIL.Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def clip(frames, width, height, fps=2.0):
    """A video of which every frame is shown; its sides are such that nothing is resized."""
    rng = np.random.default_rng(frames + width)
    shown = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    times = tuple(i / fps for i in range(frames))
    return Clip(Video(shown, fps=fps), tuple(range(frames)), times, fps, frames / fps)


def shown(case, parts):
    """Parts as words (a number) and pictures: a Qwen3-VL sees each two frames of a video apart, behind their time."""
    for part in parts:
        if isinstance(part, int):
            yield part
        elif len(part) == 2:
            yield Image(picture(part))
        elif case != "qwen3_vl":
            yield Image(clip(*part))
        else:
            whole = clip(*part)
            for i in range(0, part[0], 2):
                here = slice(i, i + 2)
                yield 1
                yield Image(dataclasses.replace(whole, indices=whole.indices[here], times=whole.times[here]))


def conversation(case, parts, spec, rng):
    """Parts as what the loader takes: so many words, a picture (width, height), a video (frames, width, height)."""
    shared, tokens, visual, images, rows, sizes = Shared(spec), [], [], [], [], []
    for part in shown(case, parts):
        if isinstance(part, int):
            tokens.append(rng.integers(3, 94, part))
            visual.append(np.full(part, TEXT))
            continue
        images.append(part)
        span = shared.add(part)
        tokens.append(np.full(len(span.index), VIDEO_ID if isinstance(part.source, Clip) else IMAGE_ID))
        visual.append(span.index)
        rows.append(span.rows)
        sizes.append(len(span.index))
    tokens = np.concatenate(tokens).astype(np.int32)
    weights, visual = np.ones(len(tokens), np.float32), np.concatenate(visual).astype(np.int32)
    return shared.finished(Encoded(tokens, weights, visual, tuple(images), tuple(rows), tuple(sizes)))


def packed(case, spec, layout, groups=1, vision_rows=10, length=None):
    """(the conversations, a batch of them)."""
    rng = np.random.default_rng(0)
    rows = [[conversation(case, parts, spec, rng) for parts in row] for row in layout]
    return rows, together(rows, spec, groups, vision_rows, length)


def together(rows, spec, groups=1, vision_rows=10, length=None):
    """A batch of conversations."""
    return collate(
        rows,
        length=length or max(sum(len(e.tokens) for e in row) for row in rows),
        groups=groups,
        vision_rows=vision_rows,
        visual_tokens=ROW // 4,
        pad_id=0,
        spec=spec,
    )


def inputs(one, spec):
    """What their model takes of one conversation: pictures by their own processor, videos cut by plain loops."""
    tokens = torch.tensor(one.tokens, dtype=torch.int64)[None]
    given = {"input_ids": tokens}
    stills = [image.source for image in one.images if not isinstance(image.source, Clip)]
    moving = [image.source for image in one.images if isinstance(image.source, Clip)]
    if stills:
        native = spec.native
        high = min(native.max_pixels, spec.max_patches * spec.patch**2)
        processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": native.min_pixels, "longest_edge": high},
            patch_size=spec.patch,
            image_mean=list(spec.mean),
            image_std=list(spec.std),
        )
        given |= dict(processor(stills, return_tensors="pt"))
    if moving:
        cut = [_cut((one.video.source[list(one.indices)] / 255 - 0.5) / 0.5) for one in moving]
        given["pixel_values_videos"] = torch.tensor(np.concatenate([values for values, _ in cut]), dtype=torch.float32)
        given["video_grid_thw"] = torch.tensor([grid for _, grid in cut])
        if spec.native.rate is not None:
            seconds = [2 * one.duration / len(one.indices) for one in moving]
            given["second_per_grid_ts"] = torch.tensor(seconds)
    if one.images:
        given["mm_token_type_ids"] = (tokens == IMAGE_ID).int() + 2 * (tokens == VIDEO_ID).int()
    return given


def _cut(frames):
    """Frames [N, height, width, 3] -> (their patches, token by token, [time, rows, columns])."""
    frames = np.concatenate([frames, frames[-1:]]) if len(frames) % 2 else frames
    grid = [len(frames) // 2, frames.shape[1] // PATCH, frames.shape[2] // PATCH]
    out = []
    for t in range(grid[0]):
        for r in range(0, grid[1], 2):
            for c in range(0, grid[2], 2):
                for y, x in ((r, c), (r, c + 1), (r + 1, c), (r + 1, c + 1)):
                    part = frames[2 * t : 2 * t + 2, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
                    out.append(part.transpose(3, 0, 1, 2).reshape(-1))
    return np.stack(out), grid


def alone(model, one, spec, **more):
    """Their logits of one conversation."""
    model.model.rope_deltas = None
    return model(**inputs(one, spec), **more).logits[0]
