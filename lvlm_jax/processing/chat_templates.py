"""How a conversation is written down for a model: pieces of text with a loss weight each, and pictures between them.

A template builds a list, never a string to be searched. Beside each builder stands the same shape as a Hugging Face
chat template (Jinja), which exported folders carry; tests hold the two together id by id.
"""

import dataclasses
from collections.abc import Callable, Sequence

from lvlm_jax.processing.schema import Image, Text, Turn

BOS = "bos"
"""Name of the piece where the tokenizer's own start token goes; nothing for a tokenizer that adds none."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text with one loss weight. `special`: the text is the exact name of one special token (or `BOS`)."""

    text: str
    weight: float = 0.0
    special: bool = False


Rendered = list[Piece | Image]
"""What a template makes of a conversation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """One way to write a conversation down.

    `system` is used unless the conversation brings a system turn; `stop` are the strings (special tokens by name) that
    end an answer. `jinja` is the Hugging Face form with ``%SYSTEM%`` where the system text goes.
    """

    name: str
    system: str
    builder: Callable[[str, Sequence[Turn], bool], Rendered]
    stop: tuple[str, ...]
    source: str

    def render(self, turns: Sequence[Turn], generate: bool = False) -> Rendered:
        """Pieces and pictures in order; `generate` ends where the assistant begins and drops a last answer.

        Raises ValueError when roles are out of order or, for training, when nobody answers.
        """
        system, rounds = _rounds(turns, generate)
        return self.builder(self.system if system is None else system, rounds, generate)

    def with_system(self, system: str) -> "Template":
        """The same template with another system text; with "" there is no system part at all."""
        return dataclasses.replace(self, system=system)

    def jinja(self) -> str:
        """The same shape as a Hugging Face chat template, for a folder that other software loads.

        It writes no BOS: the processor's tokenizer adds its own, as for the released LLaVA-1.5 folders.
        """
        quoted = self.system.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        return self.source.replace("%SYSTEM%", f"'{quoted}'")


def _rounds(turns: Sequence[Turn], generate: bool) -> tuple[str | None, list[Turn]]:
    """(system text or None, alternating user and assistant turns); the order is checked here once."""
    turns = list(turns)
    system = None
    if turns and turns[0].role == "system":
        if any(isinstance(s, Image) for s in turns[0].segments):
            raise ValueError("turn 0 (system): a picture in the system turn; move it to the first user turn")
        system = _plain_text(turns.pop(0))
    offset = 0 if system is None else 1
    for index, turn in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if turn.role != expected:
            raise ValueError(
                f"turn {index + offset}: roles out of order, found {turn.role!r} where {expected!r} must speak; "
                "a conversation is an optional system turn, then user and assistant in turn"
            )
    if generate:
        if turns and turns[-1].role == "assistant":
            turns.pop()
        if not turns:
            raise ValueError("turns: there is no user turn to answer; add one")
    elif len(turns) < 2:
        raise ValueError("turns: there is no assistant turn, so nothing to learn from; add one or drop the record")
    elif turns[-1].role != "assistant":
        raise ValueError(f"turn {len(turns) - 1 + offset}: the last user turn has no answer; add one or drop the turn")
    return system, turns


def _plain_text(turn: Turn) -> str:
    return "".join(s.text for s in turn.segments if isinstance(s, Text))


def _segments(turn: Turn, weight: float = 0.0) -> Rendered:
    """A turn's segments in place; a line break after each picture that something follows, as LLaVA writes it."""
    out: Rendered = []
    for index, segment in enumerate(turn.segments):
        if isinstance(segment, Text):
            out.append(Piece(segment.text, weight))
            continue
        out.append(segment)
        following = turn.segments[index + 1] if index + 1 < len(turn.segments) else None
        if isinstance(following, Image) or (isinstance(following, Text) and not following.text.startswith("\n")):
            out.append(Piece("\n", weight))
    return out


def _plain(system: str, turns: Sequence[Turn], generate: bool) -> Rendered:
    """``<image>{caption}\\n``: the pictures, then the caption; whatever the user said is left out, as in LLaVA."""
    if len(turns) > 2:
        raise ValueError(
            f"turns: the plain template takes one caption, this conversation has {len(turns)} turns; use vicuna_v1 or "
            "another chat template"
        )
    out: Rendered = [Piece(BOS, special=True)]
    out += [s for s in turns[0].segments if isinstance(s, Image)]
    if not generate:
        out += [s if isinstance(s, Image) else Piece(s.text, 1.0) for s in turns[1].segments]
        out.append(Piece("\n", 1.0))
    return out


def _vicuna(system: str, turns: Sequence[Turn], generate: bool) -> Rendered:
    """``{system} USER: {q} ASSISTANT: {a}</s>USER: ...``; the space before an answer is learnt with the answer."""
    out: Rendered = [Piece(BOS, special=True)]
    if system:
        out.append(Piece(system + " "))
    for turn in turns:
        if turn.role == "user":
            out += [Piece("USER: "), *_segments(turn), Piece(" ASSISTANT:")]
        else:
            out += [Piece(" ", 1.0), *_segments(turn, 1.0), Piece("</s>", 1.0, special=True)]
    return out


def _chatml(system: str, turns: Sequence[Turn], generate: bool) -> Rendered:
    """``<|im_start|>role\\n{text}<|im_end|>\\n``; the answer and its <|im_end|> are learnt, the line break is not."""
    start, end, newline = Piece("<|im_start|>", special=True), Piece("<|im_end|>", special=True), Piece("\n")
    out: Rendered = [Piece(BOS, special=True)]
    if system:
        out += [start, Piece(f"system\n{system}"), end, newline]
    for turn in turns:
        if turn.role == "user":
            out += [start, Piece("user\n"), *_segments(turn), end, newline, start, Piece("assistant\n")]
        else:
            out += [*_segments(turn, 1.0), Piece("<|im_end|>", 1.0, special=True), newline]
    return out


# A content is a string, or a list of {"type": "image"} and {"type": "text", "text": ...}. Each template is one line, so
# that no setting of whitespace control can change it.
_CONTENT = (
    "{% macro write(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% if not loop.last and (loop.nextitem['type'] == 'image' or not loop.nextitem['text'].startswith('\\n')) %}"
    "{{ '\\n' }}{% endif %}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = write(messages[0]['content']) %}"
    "{% set rounds = messages[1:] %}{% else %}{% set system = %SYSTEM% %}{% set rounds = messages %}{% endif %}"
)
_VICUNA_JINJA = (
    _CONTENT + _SYSTEM + "{% if system %}{{ system + ' ' }}{% endif %}{% for message in rounds %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + write(message['content']) + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + write(message['content']) + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_CHATML_JINJA = (
    _CONTENT + _SYSTEM + "{% if system %}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in rounds %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + write(message['content']) + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_PLAIN_JINJA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{% if message['content'] is not string %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{% endif %}{% elif message['role'] == 'assistant' %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "{% endif %}{{ '\\n' }}{% endif %}{% endfor %}"
)

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

TEMPLATES: dict[str, Template] = {
    "plain": Template(name="plain", system="", builder=_plain, stop=("\n",), source=_PLAIN_JINJA),
    "vicuna_v1": Template(
        name="vicuna_v1", system=VICUNA_SYSTEM, builder=_vicuna, stop=("</s>",), source=_VICUNA_JINJA
    ),
    "qwen_chatml": Template(
        name="qwen_chatml",
        system="You are a helpful assistant.",
        builder=_chatml,
        stop=("<|im_end|>",),
        source=_CHATML_JINJA,
    ),
}


def jinja(name: str) -> str:
    """The Hugging Face chat template of a registered template; ValueError lists the names."""
    if name not in TEMPLATES:
        raise ValueError(f"no chat template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name].jinja()
