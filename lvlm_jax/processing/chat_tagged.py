"""How MiniGPT-4 and VideoChat write conversations down: a picture between tags of plain text.

Their code tokenizes the text on each side of a picture by itself, and so it does an answer that is learnt; what a
prompt repeats of earlier answers it tokenizes with the text around.
Source: Vision-CAIR/MiniGPT-4, models/minigpt_base.py and conversation/conversation.py; OpenGVLab/Ask-Anything,
video_chat/models/videochat_it.py, dataset/it_dataset.py and conversation.py.
"""

from collections.abc import Sequence

from lvlm_jax.processing.pieces import BOS, Piece, Rendered, plain_text
from lvlm_jax.processing.schema import Clip, Segment, Shown, Text, Turn

MINIGPT4_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)


def _tag(picture: Shown) -> str:
    """VideoChat's, which tells videos from pictures."""
    return "Video" if isinstance(picture.source, Clip) else "Image"


def _tagged(segments: Sequence[Segment], own: str = "Img") -> Rendered:
    """Segments in place; a space between a picture's closing tag (`own`, or VideoChat's) and the text behind it."""
    out: Rendered = []
    for index, segment in enumerate(segments):
        if isinstance(segment, Text):
            out.append(Piece(segment.text))
            continue
        behind = index + 1 < len(segments) and isinstance(segments[index + 1], Text)
        tag = own or _tag(segment)
        out += [Piece(f"<{tag}>"), segment, Piece(f"</{tag}>" + " " * behind)]
    return out


def _answer(turn: Turn, generate: bool, end: str = "") -> Piece:
    """What is learnt, by itself."""
    if any(isinstance(segment, Shown) for segment in turn.segments):
        raise ValueError("turns: a picture in an answer, which this template cannot write; move it to a user turn")
    return Piece(plain_text(turn) + end, 1.0, alone=not generate)


def human(system: str, turns: Sequence[Turn], generate: bool, *, gap: str, tag: str = "Img") -> Rendered:
    """``{system}###Human: <Img></Img> {q}###Assistant: {a}###Human: ...``; the answer and its ``###`` are learnt.

    gap: what stands between a question and ``###``: a space where MiniGPT-4 trains, nothing where it is asked. tag: of
    a picture; "" are VideoChat's, for its first stage.
    """
    out: Rendered = [Piece(BOS, special=True), Piece(f"{system}###")]
    for turn in turns:
        if turn.role == "user":
            out += [Piece("Human: "), *_tagged(turn.segments, tag), Piece(f"{gap}###Assistant: ")]
        else:
            out.append(_answer(turn, generate, "###"))
    return out


def inst(system: str, turns: Sequence[Turn], generate: bool, *, gap: str) -> Rendered:
    """``[INST] <Img></Img> {q} [/INST]{a}</s><s>[INST] ...``; the answer and its end token are learnt.

    A system text stands before all, and a start token of its own behind it. gap: what stands between ``[/INST]`` and
    the answer: a space in MiniGPT-4's Llama-2 variant, nothing in version 2.
    """
    again = Piece("<s>", special=True)
    out: Rendered = [Piece(BOS, special=True), *([Piece(system), again] if system else [])]
    for index, turn in enumerate(turns):
        if turn.role == "user":
            out += [again] if index else []
            out += [Piece("[INST] "), *_tagged(turn.segments), Piece(f" [/INST]{gap}")]
        else:
            out += [_answer(turn, generate), Piece("</s>", 1.0, special=True)]
    return out


def videochat(system: str, turns: Sequence[Turn], generate: bool, *, gap: str, behind: str) -> Rendered:
    """``{system}###Human: <Video></Video> {sentence} ###Human: {q} ###Assistant: {a} ###``.

    Pictures and videos, and what is said of them, stand in a human turn of their own before the question, the last
    text of the turn. The role tags behind it are learnt with the answers, questions are not.

    gap: what ends a question (a space where VideoChat trains, a line break where it is asked), behind: an answer.
    """
    out: Rendered = [Piece(BOS, special=True), Piece(system)]
    for turn in turns:
        if turn.role == "assistant":
            out += [Piece("###Assistant: ", 1.0), Piece(plain_text(turn) + behind, 1.0)]
            continue
        shown, asked = _shown(turn.segments)
        if shown:
            out += [Piece("###Human: "), *_between_tags(shown), Piece(gap)]
        out += [Piece("###Human:", 1.0), Piece(f" {asked}{gap}")]
    return [*out, Piece("###Assistant:")] if generate else [*out, Piece("###", 1.0)]


def _shown(segments: Sequence[Segment]) -> tuple[Sequence[Segment], str]:
    """(pictures and what is said of them, the question): the question is the last text, if it is the last of all."""
    if not any(isinstance(segment, Shown) for segment in segments):
        return (), "".join(segment.text for segment in segments if isinstance(segment, Text))
    asks = bool(segments) and isinstance(segments[-1], Text)
    return (segments[:-1], segments[-1].text) if asks else (segments, "")


def _between_tags(segments: Sequence[Segment]) -> Rendered:
    out: Rendered = []
    for segment in segments:
        if isinstance(segment, Text):
            out.append(Piece(f" {segment.text.strip()}"))
            continue
        tag = _tag(segment)
        out += [Piece(f"<{tag}>"), segment, Piece(f"</{tag}>")]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The same in Jinja

_TAGGED = (
    "{% macro write(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<Img><image></Img>' }}"
    "{% if not loop.last and loop.nextitem['type'] == 'text' %}{{ ' ' }}{% endif %}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
_VIDEOCHAT = (
    "{% macro write(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% macro ask(content) %}{% set seen = namespace(any=false) %}{% if content is not string %}"
    "{% for part in content %}{% if part['type'] == 'image' %}"
    "{{ ('' if seen.any else '###Human: ') + '<Image><image></Image>' }}{% set seen.any = true %}"
    "{% endif %}{% endfor %}{% endif %}{{ (GAP if seen.any else '') + '###Human: ' + write(content) + GAP }}"
    "{% endmacro %}"
)


def human_jinja(system: str, gap: str, tag: str = "Img") -> str:
    """`human`, of pictures; `system` is what finds the system text and the rounds behind it (`chat_jinja`)."""
    return (
        (
            _TAGGED + system + "{{ system + '###' }}{% for message in rounds %}{% if message['role'] == 'user' %}"
            "{{ 'Human: ' + write(message['content']) + GAP + '###' }}{% else %}"
            "{{ 'Assistant: ' + write(message['content']) + '###' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
        )
        .replace("GAP", f"'{gap}'")
        .replace("Img>", f"{tag or 'Image'}>")
    )


def inst_jinja(system: str, gap: str) -> str:
    """`inst`."""
    return (
        _TAGGED + system + "{% if system %}{{ system + '<s>' }}{% endif %}{% for message in rounds %}"
        "{% if message['role'] == 'user' %}{{ ('' if loop.first else '<s>') + '[INST] ' }}"
        "{{ write(message['content']) + ' [/INST]' + GAP }}{% else %}{{ write(message['content']) + '</s>' }}"
        "{% endif %}{% endfor %}"
    ).replace("GAP", f"'{gap}'")


def videochat_jinja(system: str, gap: str, behind: str) -> str:
    """`videochat`, of pictures before a question, without a sentence on a video."""
    quoted = {name: "'" + value.replace("\n", "\\n") + "'" for name, value in (("GAP", gap), ("BEHIND", behind))}
    text = (
        _VIDEOCHAT + system + "{{ system }}{% for message in rounds %}{% if message['role'] == 'user' %}"
        "{{ ask(message['content']) }}{% else %}{{ '###Assistant: ' + write(message['content']) + BEHIND }}"
        "{% endif %}{% endfor %}{{ '###' + ('Assistant:' if add_generation_prompt else '') }}"
    )
    for name, value in quoted.items():
        text = text.replace(name, value)
    return text
