"""A conversation with a model in a terminal: the loop behind ``lvlm chat``."""

import contextlib
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from io import TextIOBase
from typing import TYPE_CHECKING, Any

from lvlm_jax.data.show import half_blocks
from lvlm_jax.infer.chat import Chat
from lvlm_jax.infer.system import System
from lvlm_jax.processing.image import load_image
from lvlm_jax.processing.schema import Video
from lvlm_jax.processing.video import choose, frames

if TYPE_CHECKING:
    import PIL.Image

HELP = (
    "/image PATH and /video PATH add a picture or a video to your next message, /features SENSE=PATH features, /reset "
    "starts over, /quit leaves, /help says this."
)


def repl(
    system: System,
    *,
    read: Callable[[str], str] = input,
    out: TextIOBase | None = None,
    thumbnails: bool | None = None,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    features: Sequence[str] = (),
    instruction: str | None = None,
    **settings: Any,
) -> None:
    """Chat in a terminal until /quit or end of input. A bad picture or a full context is printed; the chat goes on.

    Args:
      read: asks for a line, given the prompt.
      out: where answers go; default standard output.
      thumbnails: draw pictures in colour blocks; default where `out` is a terminal.
      images, videos: what the first question shows. features: what its named senses read, ``SENSE=PATH``.
      instruction: text of the system turn, instead of the template's.
      settings: as in `System.generate`.
    """
    out = sys.stdout if out is None else out
    thumbnails = out.isatty() if thumbnails is None else thumbnails
    chat, pictures = system.chat(instruction), []
    print(HELP, file=out)
    for kind, paths in (("picture", images), ("video", videos), ("features", features)):
        if paths:
            pictures += _attach(kind, shlex.join(map(str, paths)), system, out, thumbnails)
    while True:
        try:
            line = read(f"you{_waiting(pictures)}> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            chat.reset()
            pictures = []
            print("A new conversation.", file=out)
        elif command in _COMMANDS:
            pictures += _attach(_COMMANDS[command], rest, system, out, thumbnails)
        elif command.startswith("/") and command[1:].isalpha():
            print(HELP if command == "/help" else f"{command}: no such command. {HELP}", file=out)
        elif line and _say(chat, line, pictures, out, settings):
            pictures = []


_COMMANDS = {"/image": "picture", "/video": "video", "/features": "features"}


def _waiting(pictures: "Sequence[PIL.Image.Image | Video | tuple[str, str]]") -> str:
    """What the next question shows, for the prompt."""
    videos, senses = (sum(isinstance(one, kind) for one in pictures) for kind in (Video, tuple))
    counts = ((len(pictures) - videos - senses, "picture"), (videos, "video"), (senses, "other"))
    said = ", ".join(f"{count} {name}(s)" for count, name in counts if count)
    return f" [{said}]" if said else ""


def _attach(
    kind: str, argument: str, system: System, out: TextIOBase, thumbnails: bool
) -> "list[PIL.Image.Image | Video | tuple[str, str]]":
    """The pictures, videos or features that the words name; what is wrong with one is printed."""
    command = next(name for name, what in _COMMANDS.items() if what == kind)
    try:
        paths = shlex.split(argument)
    except ValueError as error:
        print(f"{command}: {error} in {argument}", file=out)
        return []
    if kind == "features":
        return _sensed(paths, system, out)
    if not paths:
        print(f"{command}: give the path of a {kind}", file=out)
    found = []
    for path in paths:
        try:
            one, shown, said = (_video if kind == "video" else _picture)(path, system)
        except ValueError as error:
            print(error, file=out)
            continue
        print(f"{path}: {said}; now ask about it", file=out)
        if thumbnails:
            print(thumbnail(shown), file=out)
        found.append(one)
    return found


def _sensed(words: Sequence[str], system: System, out: TextIOBase) -> list[tuple[str, str]]:
    """(sense, path) of each word ``SENSE=PATH``; what is wrong with one is printed."""
    found, names = [], ", ".join(system.config.specs)
    for word in words or [""]:
        name, equals, path = word.partition("=")
        if not (equals and path and name in system.config.specs):
            known = f"; its senses are {names}" if names else "; this model has no named senses"
            print(f"/features {word}: give SENSE=PATH{known}", file=out)
            continue
        print(f"{path}: for sense {name}; now ask about it", file=out)
        found.append((name, path))
    return found


def _picture(path: str, system: System) -> "tuple[PIL.Image.Image, PIL.Image.Image, str]":
    """(the picture, what to show of it, what to say of it)."""
    picture = load_image(path, max_pixels=system.spec.max_pixels)
    return picture, picture, f"{picture.width} x {picture.height}"


def _video(path: str, system: System) -> "tuple[Video, PIL.Image.Image, str]":
    video = Video(path)
    clip = choose(video, system.video, system.spec.max_pixels)
    with contextlib.closing(frames(clip)) as shown:
        first = next(shown)
    return video, first, f"{first.width} x {first.height}, {clip.duration:.1f} s, {len(clip.indices)} frames are shown"


def _say(chat: Chat, line: str, pictures: list, out: TextIOBase, settings: dict) -> bool:
    """One question and its streamed answer; False when it failed and the pictures should wait for the next."""
    pieces = None
    try:
        videos = [one for one in pictures if isinstance(one, Video)]
        images = [one for one in pictures if not isinstance(one, Video | tuple)]
        features: dict[str, list[str]] = {}
        for name, path in (one for one in pictures if isinstance(one, tuple)):
            features.setdefault(name, []).append(path)
        pieces = chat.ask(line, images, videos=videos, features=features, stream=True, **settings)
        for piece in pieces:
            print(piece, end="", file=out, flush=True)
        print(file=out)
    except KeyboardInterrupt:
        if pieces is not None:
            pieces.close()
        print(" [stopped]", file=out)
    except ValueError as error:
        print(f"{error}{' (or start over with /reset)' if chat.turns else ''}", file=out)
        return False
    return True


def thumbnail(picture: "PIL.Image.Image", columns: int = 32) -> str:
    """A picture as lines of colour blocks, no wider than the terminal."""
    return half_blocks(picture, min(columns, shutil.get_terminal_size().columns))
