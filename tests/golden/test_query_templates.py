"""Golden ids and weights of the templates whose pictures stand in front of all text, and of what a Q-Former reads."""

import numpy as np
import pytest

from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import encode
from lvlm_jax.processing.instruction import Instruction
from lvlm_jax.processing.schema import Example
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.golden.test_templates import PICTURE, messages, say, trained_text
from tests.tokenizers_tiny import bert_tiny, llama_tiny, opt_tiny, t5_tiny

Q = 3
PAIRS = {
    "opt": ("blip2", opt_tiny),
    "vicuna": ("instructblip", lambda: llama_tiny(legacy=True)),
    "t5": ("blip2_t5", t5_tiny),
}
ASKED = (say("user", PICTURE, "What is the color?"), say("assistant", "a red circle"))
SHOWN = (say("user", PICTURE), say("assistant", "a black cat"))


def encoded(turns, name, **options):
    tokenizer = Tokenizer(PAIRS[name][1]())
    image = tokenizer.special_id("<image>")
    example = Example(tuple(turns), origin="a.json:1")
    return encode(example, TEMPLATES[PAIRS[name][0]], tokenizer, Q, image, **options), tokenizer


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("turns", [ASKED, SHOWN])
def test_ids_are_the_processors(name, turns):
    """Theirs: the pictures' words, then the text as their tokenizer reads it; an encoder-decoder's answer is apart."""
    result, tokenizer = encoded(turns, name)
    picture = [tokenizer.special_id("<image>")] * Q
    tokenizer.hf.chat_template = TEMPLATES[PAIRS[name][0]].jinja()
    write = lambda turns, ask: tokenizer.hf.apply_chat_template(  # noqa: E731
        messages(turns), tokenize=False, add_generation_prompt=ask
    )
    prompt, _ = encoded(turns, name, generate=True)
    assert prompt.tokens.tolist() == picture + tokenizer.hf(write(turns[:1], True))["input_ids"]
    assert not prompt.weights.any()
    if name == "t5":
        answer = tokenizer.hf(turns[1].segments[0].text)["input_ids"]
        assert result.tokens.tolist() == prompt.tokens.tolist() + answer
    else:
        assert result.tokens.tolist() == picture + tokenizer.hf(write(turns, False))["input_ids"]
    assert result.visual.tolist()[:Q] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "asked", "shown"),
    [
        ("opt", " a red circle\n", "</s>a black cat\n"),  # the authors' loss takes in the start token of a caption
        ("vicuna", "a red circle</s>", "a black cat</s>"),
        ("t5", "a red circle</s>", "a black cat</s>"),
    ],
)
def test_what_is_learnt(name, asked, shown):
    for turns, wanted in ((ASKED, asked), (SHOWN, shown)):
        result, tokenizer = encoded(turns, name)
        assert [text.lstrip() for text in trained_text(result, tokenizer)] == [wanted.lstrip()]


def test_more_rounds():
    more = (say("user", "Sure?"), say("assistant", "yes"), say("user", PICTURE, "And? "), say("assistant", "no"))
    turns = (*ASKED, *more)
    result, tokenizer = encoded(turns, "opt")
    text = tokenizer.decode(result.tokens[2 * Q :], skip_special=False)
    assert text == "</s>What is the color? a red circle\nSure? yes\nAnd? no\n"
    assert result.visual.tolist()[: 2 * Q] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"a\.json:1: turns: the blip2_t5 template takes one question"):
        encoded(turns, "t5")
    with pytest.raises(ValueError, match="turns: the blip2 template has no place for a system text"):
        encoded((say("system", "Be brief."), *ASKED), "opt")
    with pytest.raises(ValueError, match=r"turn 1 \(assistant\): a picture in the answer"):
        encoded((say("user", "Draw"), say("assistant", PICTURE)), "vicuna")


def test_what_the_connector_reads():
    bert = Tokenizer(bert_tiny())
    turns = (*ASKED, say("user", PICTURE, "And [SEP]?"), say("assistant", "no"))
    result, _ = encoded(turns, "vicuna", instruction=Instruction(bert, 10))
    first, second = (ids.tolist() for ids in result.instructions)
    assert first == bert.hf("What is the color?")["input_ids"]
    # The name of a special token is text; of a text too long the end is kept.
    assert bert.hf.convert_ids_to_tokens(second) == ["[CLS]", "##n", "##d", "[", "s", "##e", "##p", "]", "?", "[SEP]"]
    assert all(ids.dtype == np.int32 for ids in result.instructions)
    with pytest.raises(ValueError, match=r"has neither \[CLS\] and \[SEP\] nor start and end tokens"):
        Instruction(Tokenizer(t5_tiny()), 8)
    with pytest.raises(ValueError, match="the connector's tokenizer has 64 ids, but the connector has vocab=63"):
        Instruction(bert, 8, 63)
