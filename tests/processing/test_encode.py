"""Segments to ids, weights and picture positions: bad records, long records, and how they are shown."""

import numpy as np
import pytest

from lvlm_jax.processing.chat_templates import TEMPLATES, Piece, Template
from lvlm_jax.processing.encode import DataError, decode_view, encode
from lvlm_jax.processing.schema import Example, Image, Text, Turn
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.tokenizers_tiny import llama_tiny, qwen_tiny

Q = 4
PICTURE = Image("a.png")
VICUNA = TEMPLATES["vicuna_v1"].with_system("")
CHATML = TEMPLATES["qwen_chatml"]


@pytest.fixture(scope="module")
def llama():
    return Tokenizer(llama_tiny())


@pytest.fixture(scope="module")
def qwen():
    return Tokenizer(qwen_tiny())


def say(role, *parts):
    return Turn(role, tuple(Text(p) if isinstance(p, str) else p for p in parts))


def run(tokenizer, *turns, template=None, q=Q, **options):
    template = template or (CHATML if tokenizer.has_special("<|im_end|>") else VICUNA)
    return encode(
        Example(turns, origin="train.json:7"), template, tokenizer, q, tokenizer.special_id("<image>"), **options
    )


ASK, ANSWER = say("user", PICTURE, "What is the color?"), say("assistant", "a red circle")
MORE = (say("user", "Sure?"), say("assistant", "yes it is"))


@pytest.mark.parametrize(
    ("turns", "options", "message"),
    [
        ((ASK,), {}, "turns: there is no assistant turn, so nothing to learn from; add one or drop the record"),
        ((), {}, "turns: there is no assistant turn"),
        ((), {"generate": True}, "turns: there is no user turn to answer; add one"),
        ((ANSWER, ASK), {}, "turn 0: roles out of order, found 'assistant' where 'user' must speak; a conversation is"),
        ((ASK, ASK, ANSWER), {}, "turn 1: roles out of order, found 'user' where 'assistant' must speak"),
        ((ASK, say("system", "x"), ANSWER), {}, "turn 1: roles out of order, found 'system' where 'assistant'"),
        ((say("system", "x"), ANSWER), {}, "turn 1: roles out of order, found 'assistant' where 'user'"),
        ((say("system", PICTURE), ASK, ANSWER), {}, r"turn 0 \(system\): a picture in the system turn; move it"),
        ((ASK, ANSWER, say("user", "And?")), {}, "turn 2: the last user turn has no answer; add one or drop the turn"),
        (
            (ASK, ANSWER),
            {"embedding_size": 480},
            "token id 480 is outside the embedding of 480 rows; this tokenizer does",
        ),
    ],
)
def test_bad_record(llama, turns, options, message):
    with pytest.raises(DataError, match="^train.json:7: " + message):
        run(llama, *turns, **options)


def test_nothing_to_learn(llama):
    silent = Template(name="silent", system="", builder=lambda s, t, g: [Piece("a")], stop=(), source="")
    with pytest.raises(DataError, match=r"train\.json:7: turns: not one token to learn from; add the answer or drop"):
        run(llama, ASK, ANSWER, template=silent)


def test_an_error_without_origin_names_the_id(llama):
    with pytest.raises(DataError, match=r"^example '0042': turns: there is no assistant turn"):
        encode(Example((ASK,), id="0042"), VICUNA, llama, Q, 480)


def test_weights_are_those_of_the_last_character(llama):
    """Pieces that are joined inside a word: the token belongs to the piece that ends it."""
    pieces = [Piece("is", 0.0), Piece(" ", 0.5), Piece("the", 1.0), Piece(" image", 0.25), Piece("", 9.0)]
    template = Template(name="t", system="", builder=lambda s, t, g: pieces, stop=(), source="")
    result = run(llama, ASK, ANSWER, template=template)
    tokens = llama.hf.convert_ids_to_tokens(result.tokens.tolist())
    weights = dict(zip(tokens, result.weights.tolist()))
    assert weights["▁the"] == 1.0
    assert 0.5 not in result.weights
    assert weights["▁i"] == 0.0 or weights["▁is"] == 0.0
    assert result.weights[-1] == 0.25


def test_no_visual_tokens_take_no_position(llama):
    result = run(llama, ASK, ANSWER, q=0)
    assert (result.visual == -1).all()
    assert 480 not in result.tokens
    assert result.images == (PICTURE,)


def test_types(qwen):
    result = run(qwen, ASK, ANSWER)
    assert (result.tokens.dtype, result.weights.dtype, result.visual.dtype) == (np.int32, np.float32, np.int32)
    assert len(result.tokens) == len(result.weights) == len(result.visual)


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_prompt_is_the_start_of_the_training_text(name, request):
    tokenizer = request.getfixturevalue(name)
    whole = run(tokenizer, ASK, ANSWER, *MORE)
    prompt = run(tokenizer, ASK, ANSWER, *MORE[:1], generate=True)
    np.testing.assert_array_equal(prompt.tokens, whole.tokens[: len(prompt.tokens)])
    np.testing.assert_array_equal(prompt.tokens, run(tokenizer, ASK, ANSWER, *MORE, generate=True).tokens)
    assert whole.weights[len(prompt.tokens)] == 1
    assert not prompt.weights.any()


def test_a_picture_that_only_the_dropped_answer_shows_is_not_in_the_prompt(llama):
    prompt = run(llama, say("user", "Draw"), say("assistant", PICTURE, "here"), generate=True)
    assert prompt.images == ()


def test_long_text_is_cut_after_a_whole_answer(llama):
    first = run(llama, ASK, ANSWER)
    whole = run(llama, ASK, ANSWER, *MORE)
    for length in (len(first.tokens), len(first.tokens) + 1, len(whole.tokens) - 1):
        cut = run(llama, ASK, ANSWER, *MORE, max_length=length)
        np.testing.assert_array_equal(cut.tokens, first.tokens)
        np.testing.assert_array_equal(cut.weights, first.weights)
        assert cut.images == first.images
    assert len(run(llama, ASK, ANSWER, *MORE, max_length=len(whole.tokens)).tokens) == len(whole.tokens)


def test_one_answer_too_long_is_cut_within(llama):
    whole = run(llama, ASK, ANSWER)
    cut = run(llama, ASK, ANSWER, max_length=len(whole.tokens) - 2)
    np.testing.assert_array_equal(cut.tokens, whole.tokens[:-2])
    assert cut.weights.sum() == whole.weights.sum() - 2


def test_overflow_that_would_cut_a_picture_in_half(llama):
    whole = run(llama, ASK, ANSWER)
    start = int(np.flatnonzero(whole.visual >= 0)[0])
    for length in range(start + 1, start + Q):
        message = (
            rf"^train\.json:7: {len(whole.tokens)} tokens do not fit max_length {length}: the context overflow would "
            rf"cut a picture in half \(image 0 of 1 fills positions {start} to {start + Q - 1}\); raise max_length "
            rf"above {start + Q}, split the conversation or use fewer pictures$"
        )
        with pytest.raises(DataError, match=message):
            run(llama, ASK, ANSWER, max_length=length)


def test_overflow_that_would_lose_a_picture(llama):
    turns = (ASK, ANSWER, say("user", PICTURE, "And this?"), say("assistant", "a blue one"))
    with pytest.raises(DataError, match=r"would lose a picture \(image 1 of 2 fills positions"):
        run(llama, *turns, max_length=len(run(llama, ASK, ANSWER).tokens))


def test_overflow_before_the_first_answer(llama):
    whole = run(llama, ASK, ANSWER)
    length = int(np.flatnonzero(whole.weights)[0])
    with pytest.raises(
        DataError, match="the first answer begins beyond it, so no token to learn from would be left; raise"
    ):
        run(llama, ASK, ANSWER, max_length=length)


def test_a_prompt_is_never_cut(llama):
    with pytest.raises(
        DataError, match="a prompt cannot be cut without losing the question; shorten it or raise max_le"
    ):
        run(llama, ASK, generate=True, max_length=8)


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_view_shows_every_token_with_its_weight(name, request):
    tokenizer = request.getfixturevalue(name)
    turns = (say("user", PICTURE, PICTURE, "What is é 你? 😀\ufffd"), say("assistant", "a red </s> 你 circle"), *MORE)
    result = run(tokenizer, *turns)
    view = decode_view(result, tokenizer)
    assert [text for text, _, image in view if image] == [f"[image 0: {Q} tokens]", f"[image 1: {Q} tokens]"]
    assert [weight for _, weight, image in view if not image] == result.weights[result.visual < 0].tolist()
    text = "".join(text for text, _, _ in view)
    for part in ("What is é 你? 😀\ufffd", "a red </s> 你 circle", "yes it is"):
        assert part in text
    trained = "".join(text for text, weight, _ in view if weight)
    end = "<|im_end|>" if name == "qwen" else "</s>"
    assert trained.replace(" ", "") == f"ared</s>你circle{end}yesitis{end}"


def test_view_keeps_adjacent_pictures_apart_and_ends_with_one(qwen):
    view = decode_view(run(qwen, say("user", "a", PICTURE), generate=True, template=TEMPLATES["plain"]), qwen)
    assert view == [(f"[image 0: {Q} tokens]", 0.0, True)]
