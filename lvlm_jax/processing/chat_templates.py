"""How a conversation is written down for a model: pieces of text with a loss weight each, and pictures between them.

A template builds a list, never a string to be searched. Beside each builder stands the same shape as a Hugging Face
chat template (Jinja, `chat_jinja`), which exported folders carry; tests hold the two together id by id.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from lvlm_jax.processing import chat_cogvlm, chat_documents, chat_jinja, chat_tagged
from lvlm_jax.processing.pieces import BOS, EOS, Piece, Rendered, plain_text
from lvlm_jax.processing.query_templates import pictures_first, read_and_written
from lvlm_jax.processing.schema import Shown, Text, Turn


def _rounds(turns: Sequence[Turn], generate: bool) -> tuple[str | None, list[Turn]]:
    """(system text or None, alternating user and assistant turns); the order is checked here once."""
    turns = list(turns)
    system = None
    if turns and turns[0].role == "system":
        if any(isinstance(s, Shown) for s in turns[0].segments):
            raise ValueError("turn 0 (system): a picture in the system turn; move it to the first user turn")
        system = plain_text(turns.pop(0))
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """One way to write a conversation down.

    `system` is used unless the conversation brings a system turn; `stop` are the strings (special tokens by name) that
    end an answer. `source` is the Hugging Face form with ``%SYSTEM%`` where the system text goes. `order` checks who
    speaks when: (turns, generate) -> (system text or None, turns to write down). `words` are special tokens of its own,
    which a language model's tokenizer gains before its word for a picture.
    """

    name: str
    system: str
    builder: Callable[[str, Sequence[Turn], bool], Rendered]
    stop: tuple[str, ...]
    source: str
    order: Callable[[Sequence[Turn], bool], tuple[str | None, list[Turn]]] = _rounds
    words: tuple[str, ...] = ()

    def render(self, turns: Sequence[Turn], generate: bool = False) -> Rendered:
        """Pieces and pictures in order; `generate` ends where the assistant begins and drops a last answer.

        Raises ValueError when roles are out of order or, for training, when nobody answers.
        """
        system, rounds = self.order(turns, generate)
        return self.builder(self.system if system is None else system, rounds, generate)

    def with_system(self, system: str) -> "Template":
        """The same template with another system text; with "" there is no system part at all."""
        return dataclasses.replace(self, system=system)

    def jinja(self) -> str:
        """The same shape as a Hugging Face chat template, for a folder that other software loads.

        It writes no BOS at the start: the processor's tokenizer adds its own, as for the released LLaVA-1.5 folders.
        """
        quoted = self.system.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        return self.source.replace("%SYSTEM%", f"'{quoted}'")


def _segments(turn: Turn, weight: float = 0.0, around: tuple[str, str] | None = None) -> Rendered:
    """A turn's segments in place; a line break after each picture that something follows, as LLaVA writes it.

    Or each picture between the special tokens `around` it, and no line break.
    """
    if around is not None:
        first, last = (Piece(name, weight, special=True) for name in around)
        parts = [[Piece(s.text, weight)] if isinstance(s, Text) else [first, s, last] for s in turn.segments]
        return [piece for part in parts for piece in part]
    out: Rendered = []
    for index, segment in enumerate(turn.segments):
        if isinstance(segment, Text):
            out.append(Piece(segment.text, weight))
            continue
        out.append(segment)
        following = turn.segments[index + 1] if index + 1 < len(turn.segments) else None
        if isinstance(following, Shown) or (isinstance(following, Text) and not following.text.startswith("\n")):
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
    out += [s for s in turns[0].segments if isinstance(s, Shown)]
    if not generate:
        out += [s if isinstance(s, Shown) else Piece(s.text, 1.0) for s in turns[1].segments]
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


def _chatml(system: str, turns: Sequence[Turn], generate: bool, *, after: str, around: tuple | None = None) -> Rendered:
    """``<|im_start|>role\n{text}<|im_end|>`` and `after`; the answer and its <|im_end|> are learnt, `after` is not."""
    start, end, after_end = Piece("<|im_start|>", special=True), Piece("<|im_end|>", special=True), Piece(after)
    out: Rendered = [Piece(BOS, special=True)]
    if system:
        out += [start, Piece(f"system\n{system}"), end, after_end]
    for turn in turns:
        if turn.role == "user":
            said = _segments(turn, around=around)
            out += [start, Piece("user\n"), *said, end, after_end, start, Piece("assistant\n")]
        else:
            out += [*_segments(turn, 1.0, around), dataclasses.replace(end, weight=1.0), after_end]
    return out


def _inst(
    system: str, turns: Sequence[Turn], generate: bool, *, before: str, after: str, space: str, again: str
) -> Rendered:
    """``[INST] {system}{q} [/INST] {a}</s>``, the markers plain text; the system text is part of the first question.

    before, after: what stands around the system text. space: between an answer and its end. again: the special token
    that starts a later round, if any.
    """
    out: Rendered = [Piece(BOS, special=True)]
    for index, turn in enumerate(turns):
        if turn.role == "user":
            out += [Piece(again, special=True)] if again and index else []
            out += [Piece("[INST] "), Piece(before + system + after if system and not index else "")]
            out += [*_segments(turn), Piece(" [/INST]")]
        else:
            out += [Piece(" ", 1.0), *_segments(turn, 1.0), Piece(space, 1.0), Piece("</s>", 1.0, special=True)]
    return out


def _mistral_v3(system: str, turns: Sequence[Turn], generate: bool) -> Rendered:
    """``[INST] {system}\n\n{q}[/INST] {a}</s>``, the markers tokens of their own."""
    out: Rendered = [Piece(BOS, special=True)]
    for index, turn in enumerate(turns):
        if turn.role == "user":
            out += [Piece("[INST]", special=True), Piece(f" {system}\n\n" if system and not index else " ")]
            out += [*_segments(turn), Piece("[/INST]", special=True)]
        else:
            out += [Piece(" ", 1.0), *_segments(turn, 1.0), Piece("</s>", 1.0, special=True)]
    return out


def _llama_3(system: str, turns: Sequence[Turn], generate: bool) -> Rendered:
    """``<|start_header_id|>role<|end_header_id|>\n\n{text}<|eot_id|>``; the answer and its <|eot_id|> are learnt."""

    def head(role: str) -> Rendered:
        start, stop = Piece("<|start_header_id|>", special=True), Piece("<|end_header_id|>", special=True)
        return [start, Piece(role), stop, Piece("\n\n")]

    end = Piece("<|eot_id|>", special=True)
    out: Rendered = [Piece(BOS, special=True)]
    if system:
        out += [*head("system"), Piece(system), end]
    for turn in turns:
        if turn.role == "user":
            out += [*head("user"), *_segments(turn), end, *head("assistant")]
        else:
            out += [*_segments(turn, 1.0), dataclasses.replace(end, weight=1.0)]
    return out


def _gemma(system: str, turns: Sequence[Turn], generate: bool) -> Rendered:
    """``<start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n{a}<end_of_turn>\n``.

    The system text opens the first question, as Gemma 3 has it; the answer and its <end_of_turn> are learnt.
    """
    start, end, newline = Piece("<start_of_turn>", special=True), Piece("<end_of_turn>", special=True), Piece("\n")
    out: Rendered = [Piece(BOS, special=True)]
    for index, turn in enumerate(turns):
        if turn.role == "user":
            opening = Piece(f"{system}\n\n" if system and not index else "")
            out += [start, Piece("user\n"), opening, *_segments(turn), end, newline, start, Piece("model\n")]
        else:
            out += [*_segments(turn, 1.0), dataclasses.replace(end, weight=1.0), newline]
    return out


def _paligemma(system: str, turns: Sequence[Turn], generate: bool) -> Rendered:
    """``{pictures}<bos>{prefix}\n{suffix}<eos>``: the line break is tokenized by itself; suffix and end are learnt.

    Source: PaliGemma (arXiv 2407.07726), section 3.2.
    """
    if len(turns) > 2:
        raise ValueError(
            f"turns: the paligemma template takes one question and one answer, this conversation has {len(turns)} "
            "turns; split it, or use a chat template"
        )
    if system:
        raise ValueError("turns: the paligemma template has no place for a system text; put it into the question")
    out: Rendered = [s for s in turns[0].segments if isinstance(s, Shown)]
    out += [Piece("<bos>", special=True), Piece(plain_text(turns[0])), Piece("\n", alone=True)]
    if not generate:
        if any(isinstance(s, Shown) for s in turns[1].segments):
            raise ValueError("turn 1 (assistant): a picture in the answer, which the paligemma template cannot write")
        out += [Piece(plain_text(turns[1]), 1.0), Piece("<eos>", 1.0, special=True)]
    return out


def _cogvlm(system: str, turns: Sequence[Turn], generate: bool, *, form: chat_cogvlm.Form) -> Rendered:
    """CogVLM's pictures and running text."""
    if system:
        raise ValueError("turns: CogVLM's templates have no place for a system text; put it into the question")
    return chat_cogvlm.render(form, turns, generate)


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)


def _chatml_template(name: str, system: str, after: str, around: tuple[str, str] | None = None) -> Template:
    builder, source = functools.partial(_chatml, after=after, around=around), chat_jinja.chatml(after, around)
    return Template(name=name, system=system, builder=builder, stop=("<|im_end|>",), source=source)


def _inst_template(name: str, system: str, before: str, after: str, space: str, again: str = "") -> Template:
    builder = functools.partial(_inst, before=before, after=after, space=space, again=again)
    source = chat_jinja.inst(before, after, f"{space}</s>", again)
    return Template(name=name, system=system, builder=builder, stop=("</s>",), source=source)


def _llama_3_template(name: str, system: str) -> Template:
    return Template(name=name, system=system, builder=_llama_3, stop=("<|eot_id|>",), source=chat_jinja.LLAMA_3)


def _cogvlm_template(name: str, form: chat_cogvlm.Form) -> Template:
    source = chat_jinja.cogvlm(form.before, form.after, form.gap, form.again)
    builder = functools.partial(_cogvlm, form=form)
    return Template(name=name, system="", builder=builder, stop=("</s>",), source=source)


def _query_template(name: str, end: Piece, stop: tuple[str, ...], start: float = 0.0) -> Template:
    builder = functools.partial(pictures_first, name=name, end=end, start=start)
    source = chat_jinja.pictures_first("eos_token" if end.text == EOS else "'\\n'")
    return Template(name=name, system="", builder=builder, stop=stop, source=source)


def _human_template(name: str, system: str, gap: str, tag: str = "Img") -> Template:
    builder = functools.partial(chat_tagged.human, gap=gap, tag=tag)
    source = chat_tagged.human_jinja(chat_jinja.SYSTEM, gap, tag)
    return Template(name=name, system=system, builder=builder, stop=("###",), source=source)


def _tagged_inst_template(name: str, system: str, gap: str) -> Template:
    builder = functools.partial(chat_tagged.inst, gap=gap)
    source = chat_tagged.inst_jinja(chat_jinja.SYSTEM, gap)
    return Template(name=name, system=system, builder=builder, stop=("</s>",), source=source)


def _videochat_template(name: str, system: str, gap: str, behind: str) -> Template:
    builder = functools.partial(chat_tagged.videochat, gap=gap, behind=behind)
    source = chat_tagged.videochat_jinja(chat_jinja.SYSTEM, gap, behind)
    return Template(name=name, system=system, builder=builder, stop=("###",), source=source)


_LLAMA_2 = {"before": "<<SYS>>\n", "after": "\n<</SYS>>\n\n", "space": " "}

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(name="plain", system="", builder=_plain, stop=("\n",), source=chat_jinja.PLAIN),
        Template(name="vicuna_v1", system=VICUNA_SYSTEM, builder=_vicuna, stop=("</s>",), source=chat_jinja.VICUNA),
        _chatml_template("qwen_chatml", "You are a helpful assistant.", "\n"),
        _chatml_template("qwen2_vl", "You are a helpful assistant.", "\n", ("<|vision_start|>", "<|vision_end|>")),
        _chatml_template("qwen3_vl", "", "\n", ("<|vision_start|>", "<|vision_end|>")),
        _chatml_template("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face", "\n"),
        _chatml_template("chatml_direct", "Answer the questions.", ""),  # LLaVA-NeXT 34B
        _chatml_template("mpt", _MPT_SYSTEM, ""),  # LLaVA on MPT
        _inst_template("llama_2", _LLAMA_2_SYSTEM, **_LLAMA_2, again="<s>"),  # LLaVA on Llama-2-chat
        _inst_template("mistral_instruct", "", **_LLAMA_2),  # LLaVA-NeXT on Mistral-7B-Instruct-v0.2
        _inst_template("mistral", "", before="", after="\n\n", space=""),  # Mistral-7B-Instruct-v0.1 and v0.2
        Template(name="mistral_v3", system="", builder=_mistral_v3, stop=("</s>",), source=chat_jinja.MISTRAL_V3),
        _llama_3_template("llama_3", ""),
        _llama_3_template("llava_llama_3", _LLAMA_2_SYSTEM),  # LLaVA-NeXT on Llama-3-Instruct
        Template(name="gemma", system="", builder=_gemma, stop=("<end_of_turn>",), source=chat_jinja.GEMMA),
        Template(name="paligemma", system="", builder=_paligemma, stop=("<eos>",), source=chat_jinja.PALIGEMMA),
        _human_template("minigpt4", chat_tagged.MINIGPT4_SYSTEM, ""),  # MiniGPT-4 on Vicuna v0, asked
        _human_template("minigpt4_align", "", " "),  # and as it trains
        _tagged_inst_template("minigpt4_llama2", chat_tagged.MINIGPT4_SYSTEM, " "),  # MiniGPT-4 on Llama-2-chat
        _tagged_inst_template("minigpt4_llama2_align", "", " "),
        _tagged_inst_template("minigpt_v2", "", ""),
        _human_template("videochat_align", "", " ", ""),
        _videochat_template("videochat", "", "\n", ""),  # VideoChat, asked
        _videochat_template("videochat_instruct", "", " ", " "),  # and as it trains
        Template(
            name="document",
            system="",
            builder=chat_documents.document,
            stop=(),
            source=chat_jinja.DOCUMENT,
            order=chat_documents.document_order,
        ),
        Template(
            name="flamingo",
            system="",
            builder=chat_documents.flamingo,
            stop=("<|endofchunk|>",),
            source=chat_jinja.FLAMINGO,
            order=chat_documents.document_order,
            words=("<|endofchunk|>",),
        ),
        Template(
            name="idefics",
            system="",
            builder=chat_documents.idefics,
            stop=(),
            source=chat_jinja.IDEFICS,
            order=chat_documents.document_order,
            words=("<fake_token_around_image>",),
        ),
        *(_cogvlm_template(name, form) for name, form in chat_cogvlm.FORMS.items()),
        _query_template("blip2", Piece("\n", 1.0), ("\n",), start=1.0),  # BLIP-2 on OPT
        _query_template("instructblip", Piece(EOS, 1.0, special=True), ()),  # on Vicuna
        Template(  # BLIP-2 and InstructBLIP on Flan-T5
            name="blip2_t5",
            system="",
            builder=functools.partial(read_and_written, name="blip2_t5"),
            stop=(),
            source=chat_jinja.READ_AND_WRITTEN,
        ),
    )
}
"""Templates by name; `document`, `flamingo` and `idefics` are for running text with pictures between, all of an
assistant turn's text learnt (of the second from the first picture on)."""


def jinja(name: str) -> str:
    """The Hugging Face chat template of a registered template; ValueError lists the names."""
    if name not in TEMPLATES:
        raise ValueError(f"no chat template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name].jinja()
