"""Reading a picture from anywhere, safely: one function, one exception.

Whatever is wrong with a file, `load_image` says it in one `ImageError` that names the file, the fault and the fix.
"""

import base64
import binascii
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin

from lvlm_jax.processing.schema import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_ORIENTATION = 0x0112
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG may keep its rotation
_MOVIES = (b"\x1aE\xdf\xa3", b"FLV\x01")  # how Matroska, WebM and FLV begin
_BRANDS = tuple(b"ftyp" + brand for brand in (b"iso", b"mp4", b"avc", b"m4v", b"qt", b"3gp"))  # AVIF has others
MAX_PIXELS = 40_000_000
"""The most pixels a header may claim; a 17 kB file can hold 144 million."""

REMOTE = ("gs://", "s3://", "az://")
"""Disks that etils reads; other addresses are refused."""


class ImageError(ValueError):
    """A picture that cannot be used: the message names the file, what is wrong, and the fix."""


def load_image(source: Any, root: str | Path | None = None, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """An upright, fully decoded 8-bit RGB picture.

    source: a path (under `root` if that is given, and never outside it, links followed), encoded bytes, a
    ``data:image/...;base64,`` string, a PIL image, an array uint8 or uint16 [H, W], [H, W, 1|3|4], or an `Image`.
    EXIF rotation is applied, 16 bits are scaled to 8, transparency lies on white, an animation gives its first frame.
    Raises ImageError and nothing else.
    """
    name, opened = _open(source, root)
    _check_size(name, opened, max_pixels)
    try:
        opened.load()
    except Exception as error:
        raise ImageError(
            f"{name}: the picture is truncated or damaged ({_reason(error)}); download or export it again"
        ) from error
    try:
        return _to_rgb(PIL.ImageOps.exif_transpose(opened), name)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(
            f"{name}: the picture of mode {opened.mode} does not convert to RGB ({_reason(error)}); save it again as "
            "an 8-bit RGB JPEG or PNG"
        ) from error


def picture_size(source: Any, root: str | Path | None = None, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of what `load_image` will give, EXIF rotation applied, from the header alone.

    Raises ImageError as `load_image` does, for what a header can show.
    """
    name, opened = _open(source, root)
    _check_size(name, opened, max_pixels)
    try:
        turned = _exif(opened).get(_ORIENTATION) in (5, 6, 7, 8)
    except Exception as error:
        raise ImageError(f"{name}: its EXIF data is damaged ({_reason(error)}); download or export it again") from error
    return (opened.height, opened.width) if turned else opened.size


def _exif(opened: PIL.Image.Image) -> PIL.Image.Exif:
    """The EXIF data; a PNG whose data can only stand at its beginning is not decoded to look for some at its end."""
    data = getattr(opened, "fp", None)
    png = isinstance(opened, PIL.PngImagePlugin.PngImageFile) and isinstance(data, io.BytesIO)
    if png and not any(mark in data.getvalue() for mark in _PNG_EXIF):
        return PIL.Image.Exif()
    return opened.getexif()


def _check_size(name: str, opened: PIL.Image.Image, max_pixels: int) -> None:
    width, height = opened.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: the picture claims {width} x {height} = {width * height / 1e6:.1f} megapixels, more than the "
            f"limit of {max_pixels / 1e6:.1f} (a decompression bomb looks like this); shrink it or raise max_pixels"
        )


def _open(source: Any, root: str | Path | None) -> tuple[str, PIL.Image.Image]:
    """(name for messages, image whose header is read)."""
    under = ""
    if isinstance(source, Image):
        source, under = source.source, source.under
    if isinstance(source, PIL.Image.Image):
        return getattr(source, "filename", "") or "<PIL image>", source
    if isinstance(source, np.ndarray):
        return "<array>", _from_array(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return "<bytes>", _decode_header(bytes(source), "<bytes>")
    if isinstance(source, str) and source.startswith("data:"):
        return "<data URL>", _decode_header(read_data_url(source), "<data URL>")
    if isinstance(source, str | os.PathLike):
        name, data = _read_file(source, root, under)
        return name, _decode_header(data, name)
    raise ImageError(
        f"<{type(source).__name__}>: not a picture; give a path, bytes, a PIL image or a uint8 array of [H, W, 3]"
    )


def no_such_file(path: str, under: str = "") -> str:
    """What to say of a picture that is not there. under: the folder that a record's paths start from, if it has one."""
    if not under:
        start = "" if os.path.isabs(path) or "://" in path else f", which starts in {os.getcwd()}"
        return f"{path}: the file does not exist; check the path{start}"
    folder = under if "://" in under else os.path.abspath(under)
    return (
        f"{path}: the file does not exist; check the path in the record and the image folder, {folder} (set by "
        "--images DIR, in a recipe by data.images, where the source has that field)"
    )


def _read_file(source: str | os.PathLike, root: str | Path | None, under: str) -> tuple[str, bytes]:
    name = os.fspath(source)
    name = name.decode(errors="replace") if isinstance(name, bytes) else name
    if name.startswith(REMOTE):
        if root is not None:
            raise ImageError(f"{name}: leads outside the image folder {root}; give a path inside it")
        return name, read_remote(name, under)
    if "://" in name:
        raise ImageError(f"{name}: is an address, and nothing is fetched here; download it and give the path")
    try:
        path = Path(name) if root is None else Path(root) / name
        real = path.resolve()
        if root is not None and not real.is_relative_to(Path(root).resolve()):
            raise ImageError(
                f"{name}: leads outside the image folder {root} (to {real}); move the picture into the folder or "
                "choose a folder that holds it"
            )
        if not real.exists():
            raise ImageError(no_such_file(str(path), under or os.fspath(root or "")))
        if not real.is_file():
            raise ImageError(f"{path}: is a folder or a device, not a picture file; name the file itself")
        return str(path), real.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(
            f"{name[:200]}: the file cannot be read ({_reason(error)}); check its name and rights"
        ) from error


def read_remote(name: str, under: str = "") -> bytes:
    """A file of a bucket, by etils; `under` as in `no_such_file`. Raises ImageError."""
    from etils import epath

    try:
        return epath.Path(name).read_bytes()
    except FileNotFoundError:
        raise ImageError(no_such_file(name, under)) from None
    except ImportError as error:
        raise ImageError(f"{name}: cannot be reached ({_reason(error)}); pip install gcsfs, s3fs or adlfs") from error
    except Exception as error:
        raise ImageError(
            f"{name}: the file cannot be read ({_reason(error)}); check name, rights and network"
        ) from error


def read_data_url(source: str) -> bytes:
    """The bytes of a ``data:...;base64,`` URL. Raises ImageError."""
    head, _, body = source.partition(",")
    if not head.endswith(";base64"):
        raise ImageError(f"<data URL>: {head[:60]!r} is not base64; write data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"<data URL>: its base64 is broken ({_reason(error)}); encode the file again") from error


def _decode_header(data: bytes, name: str) -> PIL.Image.Image:
    """Read the header only; the pixel count is checked before anything is decoded."""
    if not data:
        raise ImageError(f"{name}: the file is empty; download or export it again")
    head = data[:512].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<body", b"<script", b"<svg")):
        raise ImageError(f"{name}: is an HTML or XML page, not a picture; the download failed, fetch it again")
    if data.startswith(_MOVIES) or data[4:11].lower().startswith(_BRANDS) or data[8:12] == b"AVI ":
        raise ImageError(f"{name}: is a video, not a picture; give it as one: videos=, --video, or a record's 'video'")
    if head.startswith(b"version https://git-lfs"):
        raise ImageError(f"{name}: is a Git LFS pointer, not the picture itself; run git lfs pull")
    try:
        return PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture, or its header is damaged (it starts "
            f"with {data[:8]!r}); convert it or fetch it again"
        ) from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: decompression bomb ({_reason(error)}); shrink the picture") from error
    except Exception as error:
        raise ImageError(f"{name}: the header is damaged ({_reason(error)}); download or export it again") from error


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    """An array as a PIL image: uint8, uint16 (scaled) or bool, channels last."""
    shape = "x".join(map(str, array.shape))
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"<array>: shape {shape} is not a picture; give [H, W, 3] (channels last), [H, W] or [H, W, 4]"
        )
    if array.dtype == np.uint16:
        array = _scale_16(array)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ImageError(f"<array>: {array.dtype} values have no agreed range; scale them to 0...255 and give uint8")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return PIL.Image.fromarray(np.ascontiguousarray(array))


def _scale_16(values: np.ndarray) -> np.ndarray:
    """0...65535 to the nearest of 0...255; Pillow's own conversion would clip to white."""
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _to_rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """8-bit RGB, transparency on white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{name}: 32-bit values from {values.min()} to {values.max()} have no agreed range; save 8 or 16 bits"
            )
        return PIL.Image.fromarray(_scale_16(values)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no agreed range; save the picture with 8 or 16 bits")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        white = PIL.Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    """The library's own words, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
