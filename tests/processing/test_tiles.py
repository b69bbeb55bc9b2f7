"""Any resolution: which tiles, which positions, from a header alone."""

import io

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import DataError, decode_view, encode
from lvlm_jax.processing.image import ImageSpec, load_image, preprocess, preprocess_rows, to_patches, to_rows
from lvlm_jax.processing.picture import ImageError, picture_size
from lvlm_jax.processing.schema import NEWLINE, TEXT, Example, Image, Text, Turn
from lvlm_jax.processing.tiles import Tiles, largest, span
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.tokenizers_tiny import llama_tiny

PINPOINTS = ((28, 56), (56, 28), (56, 56))
TILES = Tiles(pinpoints=PINPOINTS)
SPEC = ImageSpec(size=28, patch=7, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash", tiles=TILES)
Q = 16


def picture(width, height):
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "rows", "grid"),
    [
        ((56, 28), 3, (4, 8)),  # fits exactly
        ((60, 30), 3, (4, 8)),
        ((30, 60), 3, (8, 4)),
        ((40, 40), 5, (8, 8)),  # a square
        ((100, 40), 3, (4, 8)),  # 40 of 100 of 8 columns are 3.2 rows, and half a row is never cut off
        ((20, 20), 3, (4, 4)),  # both halves keep all of it, the first wins; the width is cut back
        ((120, 20), 3, (2, 8)),  # 1.3 rows of 4: one above and one below go
    ],
)
def test_rows_and_positions(size, rows, grid):
    found = span(*size, TILES, 28, Q)
    assert found.rows == rows
    assert found.index[:Q].tolist() == list(range(Q))
    lines = found.index[Q:].reshape(grid[0], grid[1] + 1)
    assert (lines[:, -1] == NEWLINE).all()
    seen = lines[:, :-1]
    assert len(np.unique(seen)) == seen.size
    assert seen.min() >= Q
    assert seen.max() < rows * Q


@pytest.mark.parametrize("most", [None, 1, 2])
def test_no_picture_takes_more_than_the_largest(most):
    tiles = Tiles(pinpoints=PINPOINTS, most=most)
    spans = [span(width, height, tiles, 28, Q) for width in range(20, 90, 3) for height in range(20, 90, 3)]
    rows, positions = largest(tiles, 28, Q)
    assert max(one.rows for one in spans) == rows == 5
    assert max(len(one.index) for one in spans) <= positions
    assert positions == Q + {None: 64, 1: 20, 2: 39}[most] + 8


def test_positions_follow_the_grid_of_tiles():
    index = span(40, 40, TILES, 28, Q).index[Q:].reshape(8, 9)[:, :-1]
    for r in range(8):
        for c in range(8):
            tile = 1 + (r // 4) * 2 + c // 4
            assert index[r, c] == tile * Q + (r % 4) * 4 + c % 4


@pytest.mark.parametrize(("size", "rounded", "cut"), [((110, 176), 984, 936), ((205, 984), 1800, 1656)])
def test_the_two_ways_to_cut_the_padding_off(size, rounded, cut):
    """Sizes whose side comes to 29.999999... tokens: the torch library and the LLaVA authors differ by two columns."""
    pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    tiles = [Tiles(pinpoints=pinpoints, unpad=how) for how in ("round", "truncate")]
    assert [len(span(*size, one, 336, 576).index) for one in tiles] == [rounded, cut]


def test_order_decides_between_equals():
    wide = Tiles(pinpoints=((28, 56), (56, 28)))
    tall = Tiles(pinpoints=((56, 28), (28, 56)))
    assert (wide.resolution(20, 20), tall.resolution(20, 20)) == ((28, 56), (56, 28))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tiles(pinpoints=()), "at least one"),
        (lambda: Tiles(pinpoints=((28, 0),)), r"at least one \(height, width\)"),
        (lambda: span(40, 40, TILES, 28, 17), "17 visual tokens of a tile are no square"),
        (lambda: TILES.resolution(1, 3000), "so narrow that at every pinpoint one side shrinks to nothing"),
        (lambda: ImageSpec(size=28, patch=7, mean=(0.0,) * 3, std=(1.0,) * 3, tiles=TILES), "use fit='squash'"),
        (
            lambda: ImageSpec(size=24, patch=6, mean=(0.0,) * 3, std=(1.0,) * 3, fit="squash", tiles=TILES),
            r"pinpoint \[28, 56\] is no multiple of a tile's side, size 24",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


@pytest.mark.parametrize("size", [(56, 28), (60, 30), (30, 60), (40, 40), (101, 37), (200, 20), (28, 28), (13, 97)])
def test_pixels_equal_the_torch_librarys(size):
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )(PIL.Image.fromarray(picture(*size)), return_tensors="np")
    ours = preprocess_rows(load_image(picture(*size)), SPEC)
    assert theirs["image_sizes"].tolist() == [[size[1], size[0]]]
    assert len(ours) == span(*size, TILES, 28, Q).rows
    np.testing.assert_array_equal(ours.transpose(0, 3, 1, 2), theirs["pixel_values"][0])


def test_without_tiles_a_picture_is_one_row():
    spec = ImageSpec(size=28, patch=7, mean=(0.5,) * 3, std=(0.5,) * 3)
    image = load_image(picture(50, 40))
    np.testing.assert_array_equal(preprocess_rows(image, spec), preprocess(image, spec)[None])
    for rows, one in zip(to_rows(image, spec), to_patches(image, spec)):
        np.testing.assert_array_equal(rows, one[None])


def test_config_round_trip():
    assert ImageSpec.from_hf(SPEC.to_hf(), 7) == SPEC
    cut = ImageSpec(size=28, patch=7, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash",
                    tiles=Tiles(pinpoints=PINPOINTS, unpad="truncate"))  # fmt: skip
    assert ImageSpec.from_hf(cut.to_hf(), 7) == cut
    with pytest.raises(ValueError, match="image_grid_pinpoints of a SiglipImageProcessor are not supported"):
        ImageSpec.from_hf(SPEC.to_hf() | {"image_processor_type": "SiglipImageProcessor"}, 7)
    with pytest.raises(ValueError, match="image_grid_pinpoints with size 32 but crop_size 28; make them equal"):
        ImageSpec.from_hf(SPEC.to_hf() | {"size": {"shortest_edge": 32}}, 7)


# ---------------------------------------------------------------------------------------------------------------------
# Headers


def encoded(image, kind, orientation=None):
    out = io.BytesIO()
    exif = PIL.Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(out, kind, exif=exif)
    return out.getvalue()


def with_late_exif(data):
    """A PNG whose EXIF chunk stands behind the pixels, where a reader of the header alone does not come by."""
    at = data.index(b"eXIf") - 4
    size = int.from_bytes(data[at : at + 4], "big") + 12
    chunk, rest = data[at : at + size], data[:at] + data[at + size :]
    end = rest.index(b"IEND") - 4
    return rest[:end] + chunk + rest[end:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_size_is_that_of_the_loaded_picture(kind, orientation):
    data = encoded(PIL.Image.fromarray(picture(50, 20)), kind, orientation)
    assert picture_size(data) == load_image(data).size
    assert picture_size(Image(data)) == ((20, 50) if orientation in (6, 8) else (50, 20))


def test_size_of_a_png_whose_rotation_comes_last():
    data = with_late_exif(encoded(PIL.Image.fromarray(picture(50, 20)), "PNG", 6))
    assert picture_size(data) == load_image(data).size == (20, 50)


def test_a_header_is_enough(tmp_path):
    data = encoded(PIL.Image.fromarray(picture(50, 20)), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    assert picture_size(str(tmp_path / "cut.jpg")) == (50, 20)
    with pytest.raises(ImageError, match="truncated or damaged"):
        load_image(str(tmp_path / "cut.jpg"))
    with pytest.raises(ImageError, match="more than the limit"):
        picture_size(data, max_pixels=999)
    assert picture_size(PIL.Image.fromarray(picture(50, 20))) == picture_size(picture(50, 20)) == (50, 20)


# ---------------------------------------------------------------------------------------------------------------------
# In a conversation


@pytest.fixture(scope="module")
def llama():
    return Tokenizer(llama_tiny())


def run(tokenizer, *sizes, **options):
    images = tuple(Image(picture(*size)) for size in sizes)
    turns = (Turn("user", (*images, Text("What is the color?"))), Turn("assistant", (Text("a red circle"),)))
    template, word = TEMPLATES["vicuna_v1"].with_system(""), tokenizer.special_id("<image>")
    return encode(Example(turns, origin="train.json:7"), template, tokenizer, Q, word, spec=SPEC, **options)


def test_every_picture_takes_what_its_size_asks_for(llama):
    result = run(llama, (60, 30), (40, 40))
    assert (result.rows, result.vision_rows) == ((3, 5), 8)
    spans = [span(w, h, TILES, 28, Q).index for w, h in ((60, 30), (40, 40))]
    assert result.sizes == tuple(map(len, spans)) == (Q + 4 * 9, Q + 8 * 9)
    for (first, stop), index, before in zip(result.spans, spans, (0, 3 * Q)):
        here = result.visual[first:stop]
        np.testing.assert_array_equal(here, np.where(index == NEWLINE, NEWLINE, index + before))
        assert (result.tokens[first:stop] == llama.special_id("<image>")).all()
        assert not result.weights[first:stop].any()
    assert (result.visual == TEXT).sum() == len(result.tokens) - sum(result.sizes)
    view = [text for text, _, image in decode_view(result, llama) if image]
    assert view == ["[image 0: 52 tokens]", "[image 1: 88 tokens]"]


def test_a_picture_is_never_cut_in_half(llama):
    whole = run(llama, (60, 30), (40, 40))
    (_, end), (first, stop) = whole.spans
    with pytest.raises(
        DataError, match=rf"cut a picture in half \(image 1 of 2 fills positions {first} to {stop - 1}\)"
    ):
        run(llama, (60, 30), (40, 40), max_length=stop - 1)  # in the middle of a newline's row
    with pytest.raises(DataError, match=r"would cut a picture in half \(image 0 of 2"):
        run(llama, (60, 30), (40, 40), max_length=end - 1)


def test_a_bad_picture_names_its_record(llama):
    with pytest.raises(DataError, match=r"^train\.json:7: <picture of 1 x 3000>: it is so narrow"):
        run(llama, (1, 3000))
