"""Positions that several visual tokens fill: by hand on small grids, and on their way into a batch."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.data.loader import collate
from lvlm_jax.infer.rows import left_padded
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import DataError, encode
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.image import ImageSpec, to_rows
from lvlm_jax.processing.picture import ImageError
from lvlm_jax.processing.pooling import POOLS, bilinear, pooled_side, taps
from lvlm_jax.processing.schema import NEWLINE, TEXT, Blend, Clip, Example, Image, Text, Turn, Video
from lvlm_jax.processing.tiles import Tiles, limit_of, span
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.processing.video import choose, read_rows
from tests.tokenizers_tiny import qwen_tiny

Q = 9
TILES = Tiles(pinpoints=((21, 21), (21, 42), (42, 42)), most=2, several="whole")
SPEC = ImageSpec(size=21, patch=7, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash", tiles=TILES)
VIDEO = VideoSpec(frames=2, newline="video", pool="bilinear")


def grid(rows, cols):
    return np.arange(rows * cols).reshape(rows, cols)


def mixed(blend, values):
    return (values[blend.index] * blend.weight).sum(1)


def test_half_of_a_side_of_three():
    """Places of 3 cells at a step of 1.5: a quarter cell in, and a quarter cell before the last."""
    blend = POOLS["bilinear"](grid(3, 3))
    np.testing.assert_allclose(blend.weight.sum(1), 1)
    row = np.array([0.25, 1.75])
    np.testing.assert_allclose(mixed(blend, np.repeat(np.arange(3.0), 3)), np.repeat(row, 2))
    np.testing.assert_allclose(mixed(blend, np.tile(np.arange(3.0), 3)), np.tile(row, 2))


def test_the_mean_of_four_leaves_an_odd_edge_out():
    blend = POOLS["average"](grid(3, 5))
    np.testing.assert_array_equal(blend.index, [[0, 1, 5, 6], [2, 3, 7, 8]])
    np.testing.assert_array_equal(blend.weight, np.full((2, 4), 0.25))
    assert [pooled_side(27, pool) for pool in ("none", "bilinear", "average")] == [27, 14, 13]


def test_the_same_size_is_the_same_grid():
    blend = bilinear(grid(4, 3), 4, 3)
    np.testing.assert_array_equal(blend.index[:, 0], np.arange(12))
    np.testing.assert_array_equal(blend.weight, np.eye(4)[np.zeros(12, int)])


def test_taps_of_text_of_one_token_and_of_several():
    blend = Blend(np.array([[0] * 4, [5, 6, 7, 8], [0] * 4]), np.array([[0.0] * 4, [0.25] * 4, [0.0] * 4]))
    index, weight = taps(np.array([TEXT, 5, 9]), blend)
    np.testing.assert_array_equal(index, [[0] * 4, [5, 6, 7, 8], [9, 0, 0, 0]])
    np.testing.assert_array_equal(weight, [[0] * 4, [0.25] * 4, [1, 0, 0, 0]])


@pytest.mark.parametrize(("newline", "positions"), [("none", 8), ("row", 8 + 4), ("frame", 8 + 2), ("video", 8 + 1)])
def test_positions_of_pooled_frames(newline, positions):
    found = dataclasses.replace(VIDEO, newline=newline).span(2, Q)
    assert (found.rows, len(found.index), len(found.blend.index)) == (2, positions, positions)
    filled = found.index != NEWLINE
    np.testing.assert_array_equal(found.index[filled], found.blend.index[filled, 0])
    np.testing.assert_allclose(found.blend.weight.sum(1), filled)
    assert found.blend.index[filled][:4].max() < Q <= found.blend.index[filled][4:].min()
    assert dataclasses.replace(VIDEO, newline=newline).span(2, 0).blend is None


def test_the_first_of_each_square_and_frames_cut_to_the_middle():
    assert VideoSpec(pool="corner").span(2, 16).index.tolist() == [0, 2, 8, 10, 16, 18, 24, 26]
    assert VideoSpec(pool="corner").span(2, 16).blend is None
    found = choose(clip(), VideoSpec(frames=1, fit="crop"))
    (patches, _), (squashed, _) = read_rows(Image(found), SPEC), read_rows(Image(choose(clip(), VIDEO)), SPEC)
    cut = dataclasses.replace(SPEC, tiles=None, fit="crop")
    np.testing.assert_array_equal(patches, to_rows(PIL.Image.fromarray(clip().source[0]), cut)[0])
    assert np.abs(patches[0] - squashed[0]).max() > 0.1


def test_a_grid_above_the_limit_is_made_smaller():
    assert span(42, 21, TILES, 21, Q).blend is None  # two tiles
    found = span(42, 42, TILES, 21, Q)  # 6 x 6 of at most 18, each side by a root of two
    assert (found.rows, len(found.index)) == (5, Q + 4 * 5)
    assert not found.blend.weight[:Q].any()
    lines = found.index[Q:].reshape(4, 5)
    assert (lines[:, -1] == NEWLINE).all()
    assert not found.blend.weight[Q:].reshape(4, 5, 4)[:, -1].any()
    assert found.blend.index[Q:].reshape(4, 5, 4)[:, :-1].min() >= Q
    assert span(42, 42, dataclasses.replace(TILES, most=None), 21, Q).blend is None
    assert len(span(42, 42, dataclasses.replace(TILES, most=3), 21, Q).index) == Q + 5 * 6  # 1.15 times too long
    assert span(42, 42, dataclasses.replace(TILES, most=4), 21, Q).blend is None


@pytest.fixture(scope="module")
def words():
    return Tokenizer(qwen_tiny())


def picture(width, height):
    rng = np.random.default_rng(width * height)
    return Image(PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))


def run(words, *shown, **options):
    turns = (Turn("user", (*shown, Text("What is this?"))), Turn("assistant", (Text("a cat"),)))
    spec = options.pop("spec", SPEC)
    return encode(
        Example(turns, origin="test"),
        TEMPLATES["qwen_chatml"],
        words,
        Q,
        words.special_id("<image>"),
        spec=spec,
        video=VIDEO,
        **options,
    )


def clip():
    return Video(np.random.default_rng(0).integers(0, 256, (3, 30, 20, 3), dtype=np.uint8), fps=1.0)


def test_several_pictures_are_read_whole(words):
    one = run(words, picture(42, 42), picture(10, 40))
    assert (one.rows, one.sizes, one.blend) == ((1, 1), (Q + 1, Q + 1), None)
    assert all(image.whole for image in one.images)
    patches, _ = read_rows(one.images[1], SPEC)
    grey = (127 / 255 - 0.5) / 0.5  # 10 of 40 columns are the picture's
    np.testing.assert_allclose(patches[0].reshape(3, 3, 7, 7, 3)[:, 0, :, :6], grey, atol=1e-6)
    single = run(words, picture(42, 42))
    assert (single.rows, single.images[0].whole) == ((5,), False)
    beside = run(words, clip(), picture(42, 42))  # frames are no pictures
    assert (beside.rows, beside.images[1].whole) == ((2, 5), False)
    tiled = dataclasses.replace(SPEC, tiles=dataclasses.replace(TILES, several="tiles"))
    assert run(words, picture(42, 42), picture(10, 40), spec=tiled).rows == (5, 5)


def test_a_batch_says_which_tokens_fill_a_position(words):
    """Pictures take their group's next vision rows, here two groups of two rows; the numbers of the taps follow."""
    video, text = run(words, clip()), run(words)
    shrunk, plain = (run(words, picture(42, high)) for high in (42, 21))
    sizes = {"length": 160, "groups": 2, "vision_rows": 9, "visual_tokens": Q, "pad_id": 0, "spec": SPEC}
    batch = collate([[text, plain], [shrunk], [video, plain], []], **sizes)
    newline = 9 * Q
    assert batch.blend_index.shape == batch.blend_weight.shape == (4, 160, 4)
    np.testing.assert_allclose(batch.blend_weight.sum(-1), batch.image_index >= 0, atol=1e-6)
    np.testing.assert_array_equal(batch.blend_index[..., 0], np.maximum(batch.image_index, 0))
    for row, encoded, before, at in ((1, shrunk, 3, 0), (2, video, 0, 0)):
        several = encoded.blend.weight.any(1)
        here = np.flatnonzero(several) + at
        np.testing.assert_array_equal(batch.blend_index[row, here], encoded.blend.index[several] + before * Q)
        np.testing.assert_array_equal(batch.blend_weight[row, here], encoded.blend.weight[several])
    assert (batch.image_index == newline).sum() == 3 * 2 + 4 + 1
    moved = left_padded(batch)
    size = len(shrunk.tokens)
    for name in ("image_index", "blend_index", "blend_weight"):
        np.testing.assert_array_equal(getattr(moved, name)[1, -size:], getattr(batch, name)[1, :size])
    assert collate([[plain]], **sizes | {"groups": 1}).blend_index is None
    assert collate([[plain]], **sizes | {"groups": 1}, blend=True).blend_index is not None
    with pytest.raises(DataError, match=r"several visual tokens fill a position together, .* blend=False"):
        collate([[shrunk]], **sizes | {"groups": 1}, blend=False)


def test_a_text_that_is_cut_keeps_its_blend(words):
    whole = run(words, picture(42, 42))
    cut = run(words, picture(42, 42), max_length=len(whole.tokens) - 1)
    assert len(cut.blend.index) == len(cut.blend.weight) == len(cut.tokens) == len(whole.tokens) - 1
    assert isinstance(run(words, clip()).images[0].source, Clip)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VideoSpec(pool="max"), "pool 'max' is unknown; choose one of none, bilinear, average, corner"),
        (lambda: VIDEO.span(2, 8), "pool 'bilinear' with 8 visual tokens of a frame, which are no square grid"),
        (lambda: VideoSpec(pool="average").span(2, 1), "pool 'average' leaves nothing of 1 visual tokens of a frame"),
        (lambda: dataclasses.replace(TILES, most=0), "most 0: a grid of at least one tile's tokens"),
        (lambda: limit_of("pad"), "vision_aspect_ratio is 'pad', which is not supported"),
        (lambda: limit_of("anyres_max_"), "vision_aspect_ratio is 'anyres_max_', which is not supported"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_picture_of_which_nothing_would_be_left():
    tiles = Tiles(pinpoints=((21, 21 * 60),), most=1)
    with pytest.raises(ImageError, match=r"<picture of 3000 x 20>: its grid of 1 x 180 visual tokens is interpolated"):
        span(3000, 20, tiles, 21, Q)


def test_a_processors_file_goes_out_and_comes_back():
    raw = SPEC.to_hf()
    assert (raw["image_processor_type"], raw["vision_aspect_ratio"]) == ("LlavaOnevisionImageProcessor", "anyres_max_2")
    assert ImageSpec.from_hf(raw, 7) == SPEC
    released = {name: value for name, value in raw.items() if name != "vision_aspect_ratio"}
    assert ImageSpec.from_hf(released, 7).tiles.most == 9  # their class's default stands in config.json alone
    assert VideoSpec.from_hf(VIDEO.to_hf()) == VIDEO
    with pytest.raises(ValueError, match="of a SiglipImageProcessor are not supported"):
        Tiles.from_hf({**raw, "image_processor_type": "SiglipImageProcessor"})
