"""LLaVA-NeXT-Video: frames averaged before the connector, and pictures that are not, as the torch library has them."""

import functools

import jax
import numpy as np
import PIL.Image
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lvlm_jax.data.loader import collate
from lvlm_jax.infer.generate import Generator
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import encode
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.schema import Clip, Example, Image, Text, Turn, Video
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.zoo import llava_next_video
from tests import tiny
from tests.parity import compare
from tests.parity.test_clip import VISION
from tests.parity.test_decoders import SIZES
from tests.parity.test_llava_next import PINPOINTS, SPEC, LlavaNextImageProcessorPil, picture
from tests.tokenizers_tiny import llama_tiny

VIDEO = VideoSpec(frames=3, pool="corner", fit="crop")


@functools.cache
def words():
    return Tokenizer(llama_tiny(extra=("<video>", "<image>")))


@functools.cache
def make():
    torch.manual_seed(0)
    whole = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**{**SIZES, "vocab_size": 512, "max_position_embeddings": 256}),
        image_token_index=words().special_id("<image>"),
        video_token_index=words().special_id("<video>"),
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
    )
    model = compare.perturb(LlavaNextVideoForConditionalGeneration(whole))
    config, image_id = llava_next_video.from_hf(model.config.to_dict())
    assert (image_id, config.pools_frames) == (words().special_id("<image>"), True)
    assert llava_next_video.fits(config)
    assert llava_next_video.to_hf(config, image_id, SPEC)["video_token_index"] == words().special_id("<video>")
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    rows = llava_next_video.rows(config, "hf-5-memory")
    return model, LVLM(config), compare.load(rows, compare.tensors(model), shapes)


def clip(frames, width, height):
    rng = np.random.default_rng(frames)
    return Video(rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8), fps=1.0)


def encoded(*shown, **options):
    segments = [one if isinstance(one, Video) else Image(picture(one)) for one in shown]
    turns = (Turn("user", (*segments, Text("What is the color?"))), Turn("assistant", (Text("a red circle"),)))
    q, word = make()[1].config.visual_tokens, words().special_id("<image>")
    template = TEMPLATES["vicuna_v1"].with_system("")
    return encode(Example(turns), template, words(), q, word, spec=SPEC, video=VIDEO, **options)


def given(one):
    tokens, out = one.tokens.copy(), {}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_size": {"height": 28, "width": 28}}
    for image, (first, stop) in zip(one.images, one.spans, strict=True):
        if isinstance(image.source, Clip):
            tokens[first:stop] = words().special_id("<video>")
            frames = [PIL.Image.fromarray(image.source.video.source[i]) for i in image.source.indices]
            pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, **half)(frames, return_tensors="pt")
            out["pixel_values_videos"] = pixels["pixel_values"][None]
    pictures = [image.source for image in one.images if not isinstance(image.source, Clip)]
    if pictures:
        processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, image_grid_pinpoints=[list(pair) for pair in PINPOINTS], **half
        )
        out |= dict(processor(pictures, return_tensors="pt"))
    return {"input_ids": torch.tensor(tokens)[None], **out}


def test_logits_of_a_video_beside_a_picture():
    model, module, params = make()
    each = [encoded(clip(4, 50, 30)), encoded((60, 30), clip(2, 28, 40)), encoded((40, 40))]
    assert [one.sizes for one in each] == [(12,), (16 + 36, 8), (16 + 72,)]
    batch = collate(
        [each[:2], each[2:]],
        length=256,
        groups=1,
        vision_rows=16,
        visual_tokens=16,
        pad_id=0,
        spec=SPEC,
        frames=True,
    )
    assert (batch.frames.sum(), batch.blend_index) == (5, None)
    ours = jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))(params, batch)
    for (row, first), one in zip(((0, 0), (0, len(each[0].tokens)), (1, 0)), each):
        with torch.no_grad():
            expected = model(**given(one)).logits[0].numpy()
        compare.close(ours[row, first : first + len(expected)], expected, f"LLaVA-NeXT-Video {one.sizes}")


def test_greedy_text():
    model, module, params = make()
    prompts = [encoded(clip(4, 50, 30), generate=True), encoded((60, 30), generate=True)]
    ours = Generator(module, params, spec=SPEC, pad_id=0, eos_ids=()).generate(prompts, max_new_tokens=6)
    model.generation_config.eos_token_id = None
    for prompt, answer in zip(prompts, ours, strict=True):
        inputs = given(prompt)
        shown = {"attention_mask": torch.ones_like(inputs["input_ids"])}
        theirs = model.generate(**inputs, **shown, max_new_tokens=6, do_sample=False)
        assert list(answer.tokens) == theirs[0, len(prompt.tokens) :].tolist()
