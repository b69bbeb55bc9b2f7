"""LLaVA-NeXT: pictures of several shapes in packed rows, as the torch library's model sees each conversation alone."""

import jax
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from lvlm_jax import params as P
from lvlm_jax.data.collate import collate
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.schema import NEWLINE, Encoded, Image
from lvlm_jax.processing.tiles import Tiles, span
from lvlm_jax.zoo import llava_next
from tests import tiny
from tests.parity import compare
from tests.parity.test_clip import VISION
from tests.parity.test_decoders import SIZES
from tests.parity.test_siglip import FACTOR, TOWER

IMAGE_ID = 98
PINPOINTS = ((28, 56), (56, 28), (56, 56))
SPEC = ImageSpec(size=28, patch=7, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash", tiles=Tiles(pinpoints=PINPOINTS))
CASES = {
    "clip + llama": (CLIPVisionConfig(**VISION), LlamaConfig(**SIZES), {}, 5.0),
    "clip + mistral": (CLIPVisionConfig(**VISION), MistralConfig(**SIZES, sliding_window=None), {}, 5.0),
    "siglip + qwen2": (
        SiglipVisionConfig(**TOWER, vision_use_head=False),
        Qwen2Config(**SIZES),
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        FACTOR,
    ),
}
# Two conversations a row: two shapes in one, one that fits exactly; text alone; a square; a narrow and an odd one.
ROWS = [
    [[3, (60, 30), 2, (28, 56), 4], [5]],
    [[2, (40, 40), 3], [1, (200, 20), 4]],
    [[4, (37, 101), 2]],
]


def make(case):
    torch.manual_seed(0)
    tower, text, changes, factor = CASES[case]
    whole = LlavaNextConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
        **changes,
    )
    model = compare.perturb(LlavaNextForConditionalGeneration(whole), factor=factor)
    config, image_id = llava_next.from_hf(model.config.to_dict())
    assert (image_id, config.newline) == (IMAGE_ID, True)
    assert llava_next.fits(config)
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    rows = llava_next.rows(config, "hf-5-memory")
    return model, LVLM(config), rows, compare.load(rows, compare.tensors(model), shapes)


def picture(size):
    rng = np.random.default_rng(sum(size))
    return PIL.Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def conversation(parts, q, rng):
    """Parts (a number: so many words; a pair: a picture of that width and height) as what the loader takes."""
    tokens, visual, images, rows, sizes = [], [], [], [], []
    for part in parts:
        if isinstance(part, int):
            tokens.append(rng.integers(3, IMAGE_ID, part))
            visual.append(np.full(part, -1))
            continue
        found = span(*part, SPEC.tiles, SPEC.size, q)
        tokens.append(np.full(len(found.index), IMAGE_ID))
        visual.append(np.where(found.index == NEWLINE, NEWLINE, found.index + q * sum(rows)))
        images.append(Image(picture(part)))
        rows.append(found.rows)
        sizes.append(len(found.index))
    tokens = np.concatenate(tokens).astype(np.int32)
    visual = np.concatenate(visual).astype(np.int32)
    weights = np.ones(len(tokens), np.float32)
    return Encoded(tokens, weights, visual, tuple(images), tuple(rows), tuple(sizes))


def packed(config, layout=ROWS, groups=1):
    rng = np.random.default_rng(0)
    rows = [[conversation(parts, config.visual_tokens, rng) for parts in row] for row in layout]
    batch = collate(
        rows,
        length=max(sum(len(e.tokens) for e in row) for row in rows),
        groups=groups,
        vision_rows=24,
        visual_tokens=config.visual_tokens,
        pad_id=0,
        spec=SPEC,
    )
    return rows, batch


def reference(model, one):
    """Logits of one conversation, its pictures prepared by the torch library's processor."""
    given = {}
    if one.images:
        processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        given = dict(processor([image.source for image in one.images], return_tensors="pt"))
    return model(input_ids=torch.tensor(one.tokens)[None], **given).logits[0]


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if "mistral" in c else c for c in CASES])
def test_logits_of_packed_rows(case):
    model, module, _, params = make(case)
    rows, batch = packed(module.config)
    logits = jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))(params, batch)
    with torch.no_grad():
        expected = [np.concatenate([reference(model, one).numpy() for one in row]) for row in rows]
    ours = [np.asarray(logits)[i, : len(row)] for i, row in enumerate(expected)]
    compare.close(np.concatenate(ours), np.concatenate(expected), f"LLaVA-NeXT {case}, packed")


def test_rows_in_groups_of_their_own():
    _, module, _, params = make("clip + llama")
    run = jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))
    together, apart = (packed(module.config, groups=groups)[1] for groups in (1, 3))
    shown = together.segments > 0
    ours, others = (np.asarray(run(params, batch))[shown] for batch in (together, apart))
    np.testing.assert_allclose(ours, others, atol=2e-5 * np.abs(ours).max())


@pytest.mark.slow
def test_gradients():
    model, module, rows, params = make("clip + llama")
    talks, batch = packed(module.config, ROWS[:1])
    pull = np.random.default_rng(1).normal(size=(batch.tokens.shape[1], 99)).astype(np.float32)
    expected = torch.cat([reference(model, one) for one in talks[0]])
    (expected * torch.tensor(pull)).sum().backward()
    theirs = compare.gradients(model)
    expected = P.flatten(P.unflatten({k: v for row in rows for k, v in row.load(theirs[row.theirs]).items()}))
    loss = lambda p, b: (module.apply({"params": p}, b, method=tiny.logits)[0] * pull).sum()  # noqa: E731
    ours = P.flatten(jax.jit(jax.grad(loss))(params, batch))
    for part in ("vision", "connector", "llm", "newline"):
        keys = sorted(k for k in ours if k.startswith(f"{part}/"))
        together = [np.concatenate([np.asarray(flat[k]).ravel() for k in keys]) for flat in (ours, expected)]
        compare.close(*together, f"LLaVA-NeXT gradients of {part}")


def test_every_weight_is_read():
    _, module, _, params = make("siglip + qwen2")
    _, batch = packed(module.config, [[[3, (60, 30), 4]]])
    run = jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))
    unread = compare.dead(lambda p: run(p, batch), {"newline": params["newline"], "connector": params["connector"]}
                          | {k: v for k, v in params.items() if k not in ("newline", "connector")})  # fmt: skip
    assert not any(path.startswith(("newline", "connector", "llm")) for path in unread)
