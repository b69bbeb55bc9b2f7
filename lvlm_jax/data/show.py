"""One conversation as the model will meet it, for a person at a terminal: every token coloured by its loss weight."""

import PIL.Image

from lvlm_jax.processing.encode import decode_view
from lvlm_jax.processing.image import ImageError
from lvlm_jax.processing.schema import Clip, Encoded, Example, Image
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.processing.video import pictures as opened

_PLAIN, _TRAINED, _PARTLY, _IMAGE, _RESET = "\x1b[2m", "\x1b[1;32m", "\x1b[1;33m", "\x1b[36m", "\x1b[0m"


def show(example: Example, encoded: Encoded, tokenizer: Tokenizer, *, thumbnail: int = 24, colour: bool = True) -> str:
    """The text of `encoded`: trained tokens bold green (weights other than 1 yellow), the rest dim, pictures marked.

    A picture reads ``[image 336x336 x576 tokens]`` (its own size, and the positions that it takes), a video ``[video 8
    frames of 336x336 x4608 tokens]``; small versions in half blocks, `thumbnail` columns wide (0 leaves them out),
    follow the text. Without `colour` trained text stands
    between » and «, and there are no small versions. Line breaks are shown as ↵.
    """
    pictures = [_read(image) for image in encoded.images]
    parts = [_paint(f"{example.origin or example.id or 'example'}", _IMAGE, colour), "\n"]
    number, run, run_weight = 0, "", 0.0
    for text, weight, is_picture in decode_view(encoded, tokenizer):
        if is_picture or weight != run_weight:
            parts.append(_text(run, run_weight, colour))
            run, run_weight = "", weight
        if is_picture:
            what = _what(encoded.images[number], pictures[number])
            parts.append(_paint(f"[{what} x{encoded.sizes[number]} tokens]", _IMAGE, colour))
            number += 1
        else:
            run += text
    parts.append(_text(run, run_weight, colour))
    trained = int((encoded.weights > 0).sum())
    parts.append(f"\n{len(encoded.tokens)} tokens, {trained} trained; {len(pictures)} picture(s)")
    for j, (image, found) in enumerate(zip(encoded.images, pictures)):
        name = f"{'video' if isinstance(image.source, Clip) else 'image'} {j}"
        if isinstance(found, str):
            parts.append(f"\n{name}: {found}")
        elif colour and thumbnail:
            times = [f" at {time:.1f} s" for time in image.source.times] if isinstance(image.source, Clip) else [""]
            parts += [f"\n{name}{at}:\n{half_blocks(one, thumbnail)}" for at, one in zip(times, found)]
    return "".join(parts)


def half_blocks(picture: PIL.Image.Image, columns: int = 24) -> str:
    """A picture in true-colour half blocks, at most 32 lines: each character is two pixels, one above the other."""
    width = max(1, min(columns, picture.width))
    height = min(64, max(2, round(picture.height * width / picture.width / 2) * 2))
    pixels = picture.convert("RGB").resize((width, height), PIL.Image.Resampling.BOX).load()
    lines = []
    for y in range(0, height, 2):
        cells = []
        for x in range(width):
            (r, g, b), (r2, g2, b2) = pixels[x, y], pixels[x, y + 1]
            cells.append(f"\x1b[38;2;{r};{g};{b};48;2;{r2};{g2};{b2}m▀")
        lines.append("".join(cells) + _RESET)
    return "\n".join(lines)


def _read(image: Image) -> list[PIL.Image.Image] | str:
    """The picture or the frames, or what is wrong: a person who looks at a record wants to see the rest of it."""
    try:
        return list(opened(image))
    except ImageError as error:
        return str(error)


def _what(image: Image, found: list[PIL.Image.Image] | str) -> str:
    size = "broken" if isinstance(found, str) else f"{found[0].width}x{found[0].height}"
    clip = image.source
    return f"video {len(clip.indices)} frames of {size}" if isinstance(clip, Clip) else f"image {size}"


def _text(text: str, weight: float, colour: bool) -> str:
    if not text:
        return ""
    text = text.replace("\x1b", "␛")  # a record must not steer the terminal
    if not colour:
        return f"»{text}«" if weight else text
    shade = _PLAIN if weight == 0 else _TRAINED if weight == 1 else _PARTLY
    return _paint(text.replace("\n", "↵\n"), shade, colour)


def _paint(text: str, shade: str, colour: bool) -> str:
    return f"{shade}{text}{_RESET}" if colour else text
