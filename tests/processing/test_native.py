"""Pictures at their own resolution: sizes, order of patches, vision rows, positions, conversations."""

import dataclasses
import itertools

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.data.collate import collate
from lvlm_jax.processing import native
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import DataError, encode
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.image import ImageSpec, to_patches, to_rows
from lvlm_jax.processing.native import Native, Packer, fitted, order, token_places
from lvlm_jax.processing.picture import ImageError
from lvlm_jax.processing.schema import Clip, Example, Image, Text, Turn, Video
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.processing.video import chosen, read_rows
from tests.tokenizers_tiny import qwen_tiny

OWN = Native(min_pixels=8 * 16, max_pixels=48 * 16)
SPEC = ImageSpec(size=24, patch=4, mean=(0.5,) * 3, std=(0.5,) * 3, fit="native", max_patches=48, native=OWN)
WORDS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def picture(width, height):
    rng = np.random.default_rng(width)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_sizes_are_theirs():
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    for width, height in itertools.product((1, 14, 27, 42, 70, 100, 199, 640, 1333), repeat=2):
        limits = (3136, 28 * 28 * 64)
        if max(width, height) > 200 * min(width, height):
            with pytest.raises(ImageError, match="more than 200 times"):
                fitted(width, height, 28, *limits)
            continue
        assert fitted(width, height, 28, *limits) == theirs(height, width, 28, *limits)


@pytest.mark.parametrize("size", [(24, 16), (17, 30), (200, 20), (5, 5)])
def test_patches_are_theirs(size):
    """Token by token; of each value the two frames, rows, columns and colours."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(
        size={"shortest_edge": OWN.min_pixels, "longest_edge": OWN.max_pixels},
        patch_size=4,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    given = processor([picture(*size)], return_tensors="np")
    patches, positions = to_patches(picture(*size), SPEC)
    _, rows, cols = given["image_grid_thw"][0].tolist()
    assert (positions.max(0) + 1).tolist() == [rows, cols]
    theirs = given["pixel_values"].reshape(-1, 3, 2, 4, 4).transpose(0, 2, 3, 4, 1).reshape(rows * cols, -1)
    np.testing.assert_allclose(patches, theirs, atol=1e-6)


def test_windows_and_tokens_stand_together():
    rows, cols, window = 10, 6, 4
    at = order(rows, cols, 2, window)
    r, c = np.divmod(at, cols)
    assert sorted(at) == list(range(rows * cols))
    tokens = np.stack([r // 2, c // 2], -1).reshape(-1, 4, 2)
    assert (tokens == tokens[:, :1]).all()
    runs = np.stack([r // window, c // window], -1)
    assert (np.diff(runs, axis=0) != 0).any(-1).sum() + 1 == 3 * 2
    # A token in reading order is found where it was sent to.
    places = token_places(rows, cols, 2, window)
    assert [tokens[place, 0].tolist() for place in places] == [[y, x] for y in range(5) for x in range(3)]


def test_frames_go_two_by_two():
    shown = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    clip = Clip(Video(shown, fps=1.0), (0, 1, 2), (0.0, 1.0, 2.0), 1.0, 3.0)
    patches, positions = read_rows(Image(clip), SPEC)
    assert (patches.shape, positions.shape) == ((2, 16, 96), (2, 16, 2))
    both = patches.reshape(2, 16, 2, 48)
    single = [to_rows(PIL.Image.fromarray(frame), SPEC)[0].reshape(16, 2, 48)[:, 0] for frame in shown]
    for (pair, half), frame in {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 2}.items():
        np.testing.assert_array_equal(both[pair, :, half], single[frame])


def test_a_row_takes_what_fits():
    packer = Packer(48, OWN)
    first = packer.add((1, 4, 6))
    assert (first[1], first[2], first[0].tolist()) == (((0, 0, 24),), 1, [0, 1, 2, 3, 4, 5])
    video = packer.add((2, 4, 4))
    assert (video[1], video[2]) == (((0, 24, 16), (1, 0, 16)), 1)
    assert video[0].tolist() == [6, 7, 8, 9, 12, 13, 14, 15]
    assert packer.add((1, 2, 4))[1:] == (((0, 40, 8),), 0)
    assert packer.used == [48, 16]


BAD = {
    "min_pixels": ({"min_pixels": 20, "max_pixels": 10}, "no interval"),
    "window": ({"window": 3}, "window=3 patches are no multiple of merge=2"),
    "merge": ({"merge": 0}, "merge=0, frames=2: at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_limits_that_do_not_fit(name):
    fields, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Native(**fields)


def test_a_spec_that_does_not_fit():
    with pytest.raises(ValueError, match="fit='native' needs it"):
        dataclasses.replace(SPEC, native=None)
    with pytest.raises(ValueError, match="need max_patches"):
        dataclasses.replace(SPEC, max_patches=None)
    narrow = dataclasses.replace(SPEC, max_patches=8, native=dataclasses.replace(OWN, min_pixels=8 * 16))
    with pytest.raises(ImageError, match=r"2 x 8 patches, but a vision row holds 8"):
        narrow.native.grid(60, 7, 4, 8)


def tokenizer():
    return Tokenizer(qwen_tiny(extra=WORDS))


def encoded(words, *segments, template="qwen2_vl", **options):
    asked = Turn("user", tuple(Text(s) if isinstance(s, str) else s for s in segments))
    example = Example((asked, Turn("assistant", (Text("a cat"),))), origin="a.json:1")
    return encode(example, TEMPLATES[template], words, 12, words.special_id("<|image_pad|>"), spec=SPEC, **options)


@pytest.mark.parametrize("template", ["qwen2_vl", "qwen3_vl"])
def test_ids_equal_the_chat_template(template):
    words = tokenizer()
    a, b = Image(picture(24, 16)), Image(picture(8, 8))
    got = encoded(words, "Look: ", a, b, "\nWhat is it?", template=template)
    words.hf.chat_template = TEMPLATES[template].jinja()
    said = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "image"}]
    said.append({"type": "text", "text": "\nWhat is it?"})
    told = [{"role": "user", "content": said}, {"role": "assistant", "content": "a cat"}]
    text = words.hf.apply_chat_template(told, tokenize=False)
    assert ("You are a helpful assistant." in text) == (template == "qwen2_vl")
    counts, pad, ids = iter(got.sizes), words.special_id("<|image_pad|>"), []
    for token in words.hf(text)["input_ids"]:
        ids += [pad] * next(counts) if token == pad else [token]
    assert got.tokens.tolist() == ids
    assert words.decode(got.tokens[got.weights > 0], skip_special=False) == "a cat<|im_end|>"


def test_what_a_conversation_says_of_its_pictures():
    got = encoded(tokenizer(), "Look: ", Image(picture(24, 16)), Image(picture(17, 30)), "?")
    assert got.sizes == (6, 8)
    assert got.rows == (1, 1)  # 24 and 32 patches do not share a row of 48
    assert got.places == (((0, 0, 24),), ((1, 0, 32),))
    (first, stop), (second, _) = got.spans
    assert got.axes[first - 1].tolist() == [first - 1] * 3
    assert (got.axes[first:stop] - first).tolist() == [[0, r, c] for r in range(2) for c in range(3)]
    # The larger side is three tokens; then </vision> and <vision>.
    assert got.axes[second].tolist() == [first + 3 + 2] * 3
    assert (np.diff(got.axes[-4:], axis=0) == 1).all()
    cut = encoded(
        tokenizer(), "Look: ", Image(picture(24, 16)), Image(picture(17, 30)), "?", max_length=len(got.tokens) - 1
    )
    assert len(cut.axes) == len(cut.tokens) == len(got.tokens) - 1


def test_a_video_is_told_its_times():
    shown = np.zeros((5, 16, 16, 3), np.uint8)
    video = Video(shown, fps=1.0)
    spec = VideoSpec(sampler="uniform", frames=8, stamp="qwen3_vl")
    example = Example((Turn("user", (Text("See "), video)),))
    with_pairs = dataclasses.replace(spec, sampler="fps", fps=1.0, multiple=2)
    turn = chosen(example, with_pairs).turns[0]
    texts = [s.text for s in turn.segments if isinstance(s, Text)]
    assert texts == ["See ", "<0.5 seconds>", "<3.5 seconds>"]
    assert [s.source.indices for s in turn.segments if isinstance(s, Image)] == [(0, 1), (3, 4)]


def test_a_batch_has_them_where_they_belong():
    one = encoded(tokenizer(), "Look: ", Image(picture(24, 16)), Image(picture(8, 8)), "?")
    two = encoded(tokenizer(), "Text alone?")
    length = len(one.tokens) + len(two.tokens)
    batch = collate([[two, one], [one]], length=length, groups=1, vision_rows=3, visual_tokens=12, pad_id=0, spec=SPEC)
    assert batch.patch_segments[0].max(-1).tolist() == [2, 2, 0]
    assert batch.axes[0, len(two.tokens) :].tolist() == one.axes.tolist()
    np.testing.assert_array_equal(batch.patches[0, 0], batch.patches[0, 1])
    short = native.trimmed(batch, native.longest(batch), 2)
    assert (native.longest(batch), short.patches.shape[2]) == (40, 40)
    taken = [b.image_index[1][b.image_index[1] >= 0] for b in (batch, short)]
    assert (taken[0] - 12).tolist() == (taken[1] - 10).tolist()
    with pytest.raises(DataError, match="needs more than 1 vision rows"):
        collate([[one], [one]], length=length, groups=1, vision_rows=1, visual_tokens=12, pad_id=0, spec=SPEC)


def test_the_processors_file():
    spec = dataclasses.replace(SPEC, native=dataclasses.replace(OWN, window=4, rate=2.0, min_frame=64, max_frame=512))
    assert ImageSpec.from_hf(spec.to_hf(), 0) == spec
    released = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    found = ImageSpec.from_hf(released, 0)
    assert (found.patch, found.max_patches, found.native.max_pixels, found.values) == (14, 5120, 12845056, 1176)
