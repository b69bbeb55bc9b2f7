"""Reading pictures: what is bad is one clear ImageError, what is odd is read right."""

import base64
import contextlib
import io
import zlib

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.processing.image import ImageError, load_image
from lvlm_jax.processing.schema import Image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ramp(width=20, height=10):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return PIL.Image.fromarray(pixels)


def bomb(width=12_000, height=12_000):
    """A small PNG whose header claims 144 megapixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
BAD_FILES = {
    "missing.jpg": (
        None,
        r"missing\.jpg: the file does not exist; check the path in the record and the image folder, ",
    ),
    "empty.jpg": (b"", r"empty\.jpg: the file is empty; download or export it again"),
    "cut.jpg": (
        encoded(NOISE, "JPEG")[:-900],
        r"cut\.jpg: the picture is truncated or damaged \(.*\); download or export",
    ),
    "cut.png": (encoded(NOISE)[:-3000], r"cut\.png: the picture is truncated or damaged \(.*\); download or export"),
    "page.jpg": (
        b"\n<!DOCTYPE html><html>404</html>",
        r"page\.jpg: is an HTML or XML page, not a picture; .* fetch it again",
    ),
    "lfs.png": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        r"lfs\.png: is a Git LFS pointer.*; run git lfs pull",
    ),
    "noise.jpg": (
        b"\0\1\2\3" * 99,
        r"noise\.jpg: is not a JPEG, PNG, WEBP, GIF or BMP picture.*; convert it or fetch it",
    ),
    "other.tif": (encoded(NOISE, "TIFF"), r"other\.tif: is not a JPEG, PNG, WEBP, GIF or BMP picture.*; convert it"),
    "bomb.png": (
        bomb(),
        r"bomb\.png: the picture claims 12000 x 12000 = 144.0 megapixels, more than the limit of 40.0 .*raise",
    ),
    "huge.png": (bomb(2**20, 2**20), r"huge\.png: decompression bomb .*; shrink the picture"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name, tmp_path):
    data, message = BAD_FILES[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=message):
        load_image(name, root=tmp_path)
    if data is not None:
        with pytest.raises(ImageError):
            load_image(data)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "sub/../../secret.png", "link.png"])
def test_path_outside_the_root_is_refused(path, tmp_path):
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(encoded(ramp()))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ImageError, match=r"leads outside the image folder .*; move the picture into the folder"):
        load_image(path, root=root)


def test_path_inside_the_root_may_be_absolute(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(ramp()))
    assert load_image(str(tmp_path / "a.png"), root=tmp_path).size == (20, 10)
    assert load_image("sub/../a.png", root=tmp_path).size == (20, 10)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com/a.jpg", r"is an address, and nothing is fetched here; download it and give the path"),
        ("a\0b.jpg", r"the file cannot be read \(.*null (byte|character).*\); check its name and rights"),
        ("x" * 5000, r"the file cannot be read \(.*too long.*\); check its name and rights"),
        ("/", r"/: is a folder or a device, not a picture file; name the file itself"),
        ("/dev/zero", r"/dev/zero: is a folder or a device"),
        ("data:image/png,abc", r"<data URL>: 'data:image/png' is not base64"),
        ("data:image/png;base64,%%", r"<data URL>: its base64 is broken .*; encode the file again"),
        (None, r"<NoneType>: not a picture; give a path, bytes, a PIL image or a uint8 array"),
        (["a.jpg"], r"<list>: not a picture"),
        (np.zeros((3, 8, 8), np.uint8), r"<array>: shape 3x8x8 is not a picture; give \[H, W, 3\] \(channels last\)"),
        (np.zeros((0, 8, 3), np.uint8), r"<array>: shape 0x8x3 is not a picture"),
        (np.zeros((8, 8, 3), np.float32), r"<array>: float32 values have no agreed range; .* give uint8"),
        (PIL.Image.new("F", (4, 4)), r"<PIL image>: floating-point pixels have no agreed range"),
        (PIL.Image.new("I", (4, 4), 70_000), r"<PIL image>: 32-bit values from 70000 to 70000 have no agreed range"),
        (PIL.Image.new("RGB", (7000, 7000)), r"<PIL image>: the picture claims 7000 x 7000 = 49.0 megapixels"),
    ],
)
def test_bad_source(source, message):
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_every_source_gives_the_same_picture(tmp_path):
    image = ramp()
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [str(tmp_path / "a.png"), tmp_path / "a.png", data, url, image, np.asarray(image), Image(data)]
    for source in sources:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = ramp()
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])
    stored = upright
    for method in undo:
        stored = stored.transpose(PIL.Image.Transpose(method))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(upright))


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    expected = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    for source in (encoded(PIL.Image.fromarray(values)), PIL.Image.fromarray(values), values):
        np.testing.assert_array_equal(np.asarray(load_image(source)), expected)


def test_sixteen_bit_mode_i_is_scaled():
    image = PIL.Image.fromarray(np.full((4, 4), 65535 // 2, np.int32))
    assert image.mode == "I"
    assert np.asarray(load_image(image)).mean() == pytest.approx(127, abs=1)


def test_cmyk():
    red = PIL.Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    pixel = np.asarray(load_image(encoded(red, "JPEG")))[8, 8]
    assert pixel[0] > 240
    assert pixel[1:].max() < 15


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind):
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert PIL.Image.open(io.BytesIO(data)).n_frames == 3
    assert np.asarray(load_image(data))[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_on_white(mode):
    image = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    pixels = np.asarray(load_image(image.convert(mode)))
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[3, 3].tolist() == [255, 255, 255]


def test_palette_with_a_transparent_entry_lies_on_white():
    image = PIL.Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((0, 0), 0)
    pixels = np.asarray(load_image(encoded(image, "PNG", transparency=1)))
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV"])
def test_other_modes_come_out_as_rgb(mode):
    image = load_image(PIL.Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode))
    assert (image.mode, image.size) == ("RGB", (5, 3))
    assert np.asarray(image).min() >= 250


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)])
def test_arrays(shape):
    pixels = np.asarray(load_image(np.full(shape, 255, np.uint8)))
    assert pixels.shape == (4, 5, 3)
    assert pixels.min() == 255
    assert np.asarray(load_image(np.ones((4, 5), bool))).min() == 255


def test_reading_leaves_the_source_alone():
    image = PIL.Image.new("RGBA", (4, 4), (1, 2, 3, 0))
    load_image(image)
    assert (image.mode, image.getpixel((0, 0))) == ("RGBA", (1, 2, 3, 0))


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_never_escape_as_another_error():
    """Every format with bytes flipped and cut: an RGB picture or an ImageError."""
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        whole = encoded(ramp(), kind)
        for _ in range(150):
            data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            for position in rng.integers(0, len(data), 3):
                data[position] = rng.integers(0, 256)
            with contextlib.suppress(ImageError):
                assert load_image(bytes(data)).mode == "RGB"
