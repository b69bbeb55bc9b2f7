"""LLaVA-OneVision: tiles, grids that are interpolated, several pictures and videos, as the torch library has them."""

import functools

import jax
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from lvlm_jax import params as P
from lvlm_jax.data.collate import collate
from lvlm_jax.infer.generate import Generator
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.infer.steps import prefill
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import encode
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.pooling import POOLS, bilinear
from lvlm_jax.processing.schema import Clip, Example, Image, Text, Turn, Video
from lvlm_jax.processing.tiles import Tiles, span
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.processing.video import read_rows
from lvlm_jax.zoo import llava_onevision
from tests import tiny
from tests.parity import compare
from tests.parity.test_decoders import SIZES
from tests.parity.test_siglip import FACTOR, TOWER
from tests.tokenizers_tiny import qwen_tiny

# A side of five patches and two pixels that no patch reads, as the released one has 27 and six.
SIDE, PATCH = 37, 7
PINPOINTS = tuple((SIDE * high, SIDE * wide) for high in range(1, 4) for wide in range(1, 4))
SPEC = ImageSpec(
    size=SIDE,
    patch=PATCH,
    mean=(0.5, 0.4, 0.6),
    std=(0.5,) * 3,
    fit="squash",
    tiles=Tiles(pinpoints=PINPOINTS, most=2, several="whole"),
)
VIDEO = VideoSpec(frames=3, newline="video", pool="bilinear")


@functools.cache
def words():
    return Tokenizer(qwen_tiny(extra=("<image>", "<video>")))


@functools.cache
def make():
    torch.manual_seed(0)
    ids = {"image_token_index": words().special_id("<image>"), "video_token_index": words().special_id("<video>")}
    whole = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **{**TOWER, "image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": 2}, vision_use_head=False
        ),
        text_config=Qwen2Config(**{**SIZES, "vocab_size": 512, "max_position_embeddings": 512}),
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
        vision_aspect_ratio="anyres_max_2",
        **ids,
    )
    model = compare.perturb(LlavaOnevisionForConditionalGeneration(whole), factor=FACTOR)
    config, image_id = llava_onevision.from_hf(model.config.to_dict())
    assert (image_id, config.newline, config.vision.feature_layer) == (ids["image_token_index"], True, -1)
    assert llava_onevision.fits(config)
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    rows = llava_onevision.rows(config, "hf-5-memory")
    return model, LVLM(config), rows, compare.load(rows, compare.tensors(model), shapes)


def picture(width, height):
    rng = np.random.default_rng(width * height)
    return Image(PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))


def clip(frames, width, height):
    rng = np.random.default_rng(frames)
    return Video(rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8), fps=1.0)


def talk(*shown, answer="a red circle"):
    turns = (Turn("user", (*shown, Text("What is the color?"))), Turn("assistant", (Text(answer),)))
    return Example(turns, origin="test")


TALKS = {
    "exact fit": talk(picture(74, 37)),
    "unpadded": talk(picture(80, 33)),
    "one tile": talk(picture(30, 30)),
    "interpolated": talk(picture(111, 111)),
    "unpadded and interpolated": talk(picture(130, 61)),
    "tall and interpolated": talk(picture(61, 130)),
    "several pictures": talk(picture(60, 30), picture(37, 37), picture(20, 50)),
    "video": talk(clip(4, 50, 30)),
    "a video and a picture": talk(clip(2, 37, 37), picture(80, 33)),
    "text": talk(),
}


def encoded(example, **options):
    image_id = words().special_id("<image>")
    config = make()[1].config
    return encode(
        example, TEMPLATES["qwen_chatml"], words(), config.visual_tokens, image_id, spec=SPEC, video=VIDEO, **options
    )


def given(one):
    """What the torch library's model takes of one conversation, its pictures prepared by its processor."""
    tokens, out = one.tokens.copy(), {}
    for image, (first, stop) in zip(one.images, one.spans, strict=True):
        if isinstance(image.source, Clip):
            tokens[first:stop] = words().special_id("<video>")
            chosen = image.source.video.source[list(image.source.indices)]
            out["pixel_values_videos"] = torch.tensor(np.stack([np.stack([squashed(frame) for frame in chosen])]))
    pictures = [image.source for image in one.images if not isinstance(image.source, Clip)]
    if pictures:
        out |= dict(processor()([pictures], return_tensors="pt"))
    return {"input_ids": torch.tensor(tokens)[None], **out}


def squashed(frame):
    """A frame as their video processor makes it, which cannot be installed here (it needs torchvision)."""
    small = PIL.Image.fromarray(frame).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
    mean, std = np.asarray(SPEC.mean, np.float32), np.asarray(SPEC.std, np.float32)
    return ((np.asarray(small, np.float32) / 255 - mean) / std).transpose(2, 0, 1)


@functools.cache
def processor():
    return LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
        image_mean=list(SPEC.mean),
        image_std=list(SPEC.std),
    )


def packed(names, groups=1):
    """Two conversations a row."""
    each = [encoded(TALKS[name]) for name in names]
    rows = [each[i : i + 2] for i in range(0, len(each), 2)]
    batch = collate(
        rows,
        length=max(sum(len(e.tokens) for e in row) for row in rows),
        groups=groups,
        vision_rows=max(sum(e.vision_rows for e in each), 1),
        visual_tokens=make()[1].config.visual_tokens,
        pad_id=0,
        spec=SPEC,
    )
    return rows, batch


def run(module, params, batch):
    return np.asarray(jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))(params, batch))


def test_logits_of_packed_rows():
    model, module, _, params = make()
    rows, batch = packed(TALKS)
    assert batch.blend_index is not None
    ours, names = run(module, params, batch), iter(TALKS)
    for row, conversations in zip(ours, rows):
        at = 0
        for one in conversations:
            with torch.no_grad():
                expected = model(**given(one)).logits[0].numpy()
            compare.close(row[at : at + len(expected)], expected, f"LLaVA-OneVision, {next(names)}")
            at += len(expected)


def test_without_a_blend_the_batch_has_none():
    model, module, _, params = make()
    rows, batch = packed(["exact fit", "several pictures"])
    assert batch.blend_index is None
    assert batch.blend_weight is None
    ours, at = run(module, params, batch)[0], 0
    for one in rows[0]:
        with torch.no_grad():
            expected = model(**given(one)).logits[0].numpy()
        compare.close(ours[at : at + len(expected)], expected, "LLaVA-OneVision without a blend")
        at += len(expected)


def test_pixels_of_each_vision_row_equal_the_processors():
    for name in ("unpadded", "interpolated", "several pictures"):
        one = encoded(TALKS[name])
        theirs, at = given(one)["pixel_values"].numpy(), 0
        for picture, (image, rows) in enumerate(zip(one.images, one.rows, strict=True)):
            ours, _ = read_rows(image, SPEC)
            pixels = theirs[picture, :rows, :, : 5 * PATCH, : 5 * PATCH].transpose(0, 2, 3, 1)
            cut = pixels.reshape(rows, 5, PATCH, 5, PATCH, 3).swapaxes(2, 3).reshape(rows, 25, -1)
            np.testing.assert_allclose(ours, cut, atol=1e-6, err_msg=name)
            assert not theirs[picture, rows:].any()
            at += rows


def test_greedy_text():
    model, module, _, params = make()
    names = ["unpadded and interpolated", "several pictures", "video"]
    prompts = [encoded(TALKS[name], generate=True) for name in names]
    generator = Generator(module, params, spec=SPEC, pad_id=0, eos_ids=())
    ours = generator.generate(prompts, max_new_tokens=8)
    model.generation_config.eos_token_id = None
    for prompt, answer in zip(prompts, ours, strict=True):
        inputs = given(prompt)
        theirs = model.generate(
            **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=8, do_sample=False
        )
        assert list(answer.tokens) == theirs[0, len(prompt.tokens) :].tolist()


def test_pictures_of_one_bucket_run_one_program():
    """Of any size, alone or several, interpolated or not: within a shape what differs is numbers."""
    _, module, _, params = make()
    generator = Generator(module, params, spec=SPEC, pad_id=0, eos_ids=())
    shown = [(picture(*size),) for size in ((74, 37), (72, 36), (70, 35), (80, 33))]
    shown += [(picture(60, 30), picture(37, 37), picture(20, 50))]
    batches = [generator.batch_of([encoded(talk(*pictures), generate=True)], 1) for pictures in shown]
    shapes = {str(jax.tree.map(np.shape, vars(batch))) for batch in batches}
    assert len(shapes) < 4 <= len(batches)
    before = prefill._cache_size()
    for batch in batches:
        list(generator.tokens(batch, 2, Sampling()))
    assert prefill._cache_size() - before == len(shapes)


def test_as_many_positions_as_the_processor_counts():
    """At the released sizes, where a picture takes up to 36 tiles."""
    counter = object.__new__(LlavaOnevisionProcessor)  # to make one whole takes torchvision
    counter.image_processor = LlavaOnevisionImageProcessorPil()
    counter.num_image_tokens, counter.vision_aspect_ratio = 729, "anyres_max_9"
    image, rng = llava_onevision.IMAGE, np.random.default_rng(0)
    assert [list(pair) for pair in image.tiles.pinpoints] == counter.image_processor.image_grid_pinpoints
    sizes = [(384, 384), (2304, 2304), (5000, 400), (400, 5000), *rng.integers(50, 3000, (60, 2)).tolist()]
    shrunk = 0
    for width, height in sizes:
        found = span(width, height, image.tiles, image.size, 729)
        assert len(found.index) == counter._get_number_of_features(height, width, 384, 384), (width, height)
        shrunk += found.blend is not None
    assert 0 < shrunk < len(sizes)


@pytest.mark.parametrize(
    ("rows", "cols", "new"), [(27, 27, (14, 14)), (10, 7, (7, 4)), (81, 54, (40, 27)), (4, 5, (4, 5))]
)
def test_taps_are_the_torch_librarys_interpolation(rows, cols, new):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(rows * cols, 8)).astype(np.float32)
    blend = bilinear(np.arange(rows * cols).reshape(rows, cols), *new)
    ours = (tokens[blend.index] * blend.weight[..., None]).sum(1)
    grid = torch.tensor(tokens).reshape(1, rows, cols, 8).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(grid, list(new), mode="bilinear")[0].permute(1, 2, 0).reshape(-1, 8)
    compare.close(ours, theirs.numpy(), f"bilinear {rows} x {cols} to {new}")


@pytest.mark.parametrize("side", [24, 27])
def test_pools_are_the_authors(side):
    tokens = np.random.default_rng(0).normal(size=(side * side, 8)).astype(np.float32)
    grid = torch.tensor(tokens).reshape(1, side, side, 8).permute(0, 3, 1, 2)
    half = [-(-side // 2)] * 2
    for pool, theirs in (
        ("bilinear", torch.nn.functional.interpolate(grid, half, mode="bilinear")),
        ("average", torch.nn.functional.avg_pool2d(grid, 2)),
    ):
        blend = POOLS[pool](np.arange(side * side).reshape(side, side))
        ours = (tokens[blend.index] * blend.weight[..., None]).sum(1)
        compare.close(ours, theirs[0].permute(1, 2, 0).reshape(-1, 8).numpy(), f"{pool} pool of {side}")


@pytest.mark.slow
def test_gradients():
    model, module, rows, params = make()
    talks, batch = packed(["unpadded and interpolated", "video"])
    pull = np.random.default_rng(1).normal(size=(batch.tokens.shape[1], 512)).astype(np.float32)
    model.zero_grad()
    expected = torch.cat([model(**given(one)).logits[0] for one in talks[0]])
    (expected * torch.tensor(pull)).sum().backward()
    theirs = compare.gradients(model)
    expected = P.flatten(P.unflatten({k: v for row in rows for k, v in row.load(theirs[row.theirs]).items()}))
    loss = lambda p, b: (module.apply({"params": p}, b, method=tiny.logits)[0] * pull).sum()  # noqa: E731
    ours = P.flatten(jax.jit(jax.grad(loss))(params, batch))
    for part in ("vision", "connector", "llm", "newline"):
        keys = sorted(k for k in ours if k.startswith(f"{part}/"))
        together = [np.concatenate([np.asarray(flat[k]).ravel() for k in keys]) for flat in (ours, expected)]
        compare.close(*together, f"LLaVA-OneVision gradients of {part}")


def test_every_weight_is_read():
    _, module, _, params = make()
    _, batch = packed(["interpolated"])
    once = jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))
    parts = {name: params[name] for name in ("newline", "connector")}
    assert not compare.dead(lambda p: once({**params, **p}, batch), parts)
