"""Tokens to text while they come: whole characters only, and an end at a stop string."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_BROKEN = "\ufffd"  # what decoders write for the bytes of an unfinished character


class TextStream:
    """The text of one answer, piece by piece.

    Bytes of an unfinished character are held back until it is whole, and so is text that may be the beginning of a stop
    string (which may span tokens). The pieces join to the decoded answer, cut before the first stop string.

    Args:
      decode: ids -> text.
      stop: strings that end the answer and are not part of it.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()):
        self._decode, self._stop = decode, tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._before = self._shown = 0  # ids[before:shown]: the last piece; spaces depend on the token to the left
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that this token makes certain ("" where nothing is yet)."""
        self._ids.append(token)
        return self._advance(last=False)

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        piece = self._advance(last=True) if not self.stopped else ""
        piece, self._held = piece + self._held, ""
        return piece

    def _advance(self, last: bool) -> str:
        if self.stopped:
            return ""
        prefix = self._decode(self._ids[self._before : self._shown])
        text = self._decode(self._ids[self._before :])
        if text.endswith(_BROKEN) and not last:
            return ""
        if len(text) > len(prefix):
            self._before, self._shown = self._shown, len(self._ids)
        return self._release(text[len(prefix) :])

    def _release(self, new: str) -> str:
        """What of the held and the new text cannot belong to a stop string any more."""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def whole_text(decode: Decode, ids: Sequence[int]) -> str:
    """The text of a whole answer, the same as its stream.

    A decoder that meets broken bytes may give up the good ones beside them too, which a stream has already shown.
    """
    text = decode(ids)
    if _BROKEN not in text:
        return text
    stream = TextStream(decode)
    return "".join([*map(stream.feed, ids), stream.finish()])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
