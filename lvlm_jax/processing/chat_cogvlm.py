"""CogVLM's prompts: the pictures, then question and answer as running text; no system text.

The hub's code and the authors' training tokenize the prompt behind a picture as a text of its own, and the answer as
another, each with the dummy space of LLaMA's tokenizer. Earlier rounds stand in the prompt, their answers without an
end; here those are learnt, too, which theirs, who train on one round, are not.
Source: modeling_cogvlm.py of THUDM/cogvlm-chat-hf, and utils/utils/language.py of github.com/THUDM/CogVLM.
"""

import dataclasses
from collections.abc import Sequence

from lvlm_jax.processing.pieces import BOS, EOS, Piece, Rendered, plain_text
from lvlm_jax.processing.schema import Shown, Turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """One way to ask: `before` and `after` a question, `gap` before an earlier answer, `again` before the next one.

    rounds: the most that a conversation may have.
    """

    before: str = ""
    after: str = ""
    gap: str = " "
    again: str = "\n"
    rounds: int | None = None


FORMS: dict[str, Form] = {
    "cogvlm_base": Form(rounds=1),
    "cogvlm_chat": Form(before="Question: ", after=" Answer:", again="\nQuestion: "),
    "cogvlm_vqa": Form(before="Question: ", after=" Short answer:", again="\nQuestion: "),
    # CogAgent's, and the first CogVLM-chat's
    "cogvlm_inst": Form(before=" [INST] ", after=" [/INST] ", gap="", again=" [INST] "),
}
"""By the name of the template; the hub's code calls the second and third "chat" and "vqa"."""


def render(form: Form, turns: Sequence[Turn], generate: bool) -> Rendered:
    """``{pictures}Question: {q} Answer: {a}\\nQuestion: {q} Answer:{a}</s>``, with the words of `form`.

    Raises:
      ValueError: more rounds than the form has, or a picture in an answer.
    """
    if form.rounds is not None and len(turns) > 2 * form.rounds:
        raise ValueError(
            f"turns: the cogvlm_base template takes one question and one answer, this conversation has {len(turns)} "
            "turns; use cogvlm_chat"
        )
    out: Rendered = [Piece(BOS, special=True)]
    for index, turn in enumerate(turns):
        pictures = [s for s in turn.segments if isinstance(s, Shown)]
        if turn.role == "user":
            begins = bool(pictures) or not index
            out += [*pictures, Piece((form.before if begins else form.again) + plain_text(turn), fresh=begins)]
            out.append(Piece(form.after))
        elif pictures:
            raise ValueError(
                f"turn {index} (assistant): a picture in the answer, which CogVLM's templates cannot write"
            )
        elif index + 1 < len(turns):
            out += [Piece(form.gap), Piece(plain_text(turn), 1.0)]
        else:
            out += [Piece(plain_text(turn), 1.0, fresh=True), Piece(EOS, 1.0, special=True)]
    return out
