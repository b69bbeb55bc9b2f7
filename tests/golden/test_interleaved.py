"""Running text with pictures as OpenFlamingo and Idefics write it: ids, weights, and who sees which picture."""

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from lvlm_jax.nn import ranges as R
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import DataError, encode
from lvlm_jax.processing.schema import Example, Image
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.golden.test_templates import PICTURE, messages, say
from tests.tokenizers_tiny import llama_tiny

SPECIAL = {
    "flamingo": ("<|endofchunk|>", "<image>"),
    "idefics": ("<fake_token_around_image>", "<image>"),
}
PAGE = (say("assistant", "A cat. ", PICTURE, "It sits ", PICTURE, PICTURE, "on a mat."),)
SHOTS = (
    say("user", PICTURE, "Output:", "a dog."),
    say("user", "no picture. "),
    say("user", PICTURE, "Output:"),
    say("assistant", "a cat."),
)


def make(name, turns, generate=False, legacy=False):
    tokenizer = Tokenizer(llama_tiny(legacy=legacy, extra=SPECIAL[name]))
    example = Example(tuple(turns), origin="a.json:1")
    return tokenizer, encode(
        example, TEMPLATES[name], tokenizer, 1, tokenizer.special_id("<image>"), generate, embedding_size=512
    )


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("turns", [PAGE, SHOTS])
def test_ids_equal_the_chat_template(name, turns, legacy):
    for generate in (False, True) if turns is SHOTS else (False,):
        tokenizer, got = make(name, turns, generate, legacy)
        tokenizer.hf.chat_template = TEMPLATES[name].jinja()
        shown = messages(turns[:-1] if generate else turns)
        text = tokenizer.hf.apply_chat_template(shown, tokenize=False, add_generation_prompt=generate)
        assert got.tokens.tolist() == tokenizer.hf(text)["input_ids"]
        assert (got.visual >= 0).tolist() == (got.tokens == tokenizer.special_id("<image>")).tolist()


def text_of(tokenizer, ids):
    return "".join(tokenizer.hf.convert_ids_to_tokens(ids)).replace("▁", " ")


def test_open_flamingos_document():
    tokenizer, got = make("flamingo", PAGE)
    assert text_of(tokenizer, got.tokens) == (
        "<s> A cat. <image>It sits <|endofchunk|><image><|endofchunk|><image>on a mat.<|endofchunk|></s>"
    )
    # What stands before the first picture, and pictures, are not learnt; the end of each chunk is.
    assert text_of(tokenizer, got.tokens[got.weights > 0]) == (
        "It sits <|endofchunk|><|endofchunk|>on a mat.<|endofchunk|></s>"
    )
    assert got.weights.max() == 1


def test_open_flamingos_shots():
    tokenizer, got = make("flamingo", SHOTS)
    shots = "<s><image>Output:a dog.<|endofchunk|>no picture. <|endofchunk|><image>Output:"
    assert text_of(tokenizer, got.tokens) == f"{shots}a cat.<|endofchunk|></s>"
    assert text_of(tokenizer, got.tokens[got.weights > 0]) == "a cat.<|endofchunk|></s>"
    _, prompt = make("flamingo", SHOTS, generate=True)
    assert text_of(tokenizer, prompt.tokens) == shots


def test_a_document_without_a_picture_teaches_flamingo_nothing():
    with pytest.raises(DataError, match="not one token to learn from"):
        make("flamingo", (say("assistant", "words"),))
    assert make("idefics", (say("assistant", "words"),))[1].weights.any()


def test_idefics_document():
    tokenizer, got = make("idefics", PAGE)
    fake = "<fake_token_around_image>"
    assert text_of(tokenizer, got.tokens) == (
        f"<s> A cat. {fake}<image>{fake}It sits {fake}<image>{fake}<image>{fake}on a mat.</s>"
    )
    assert text_of(tokenizer, got.tokens[got.weights > 0]) == " A cat. It sits on a mat.</s>"


def test_idefics_processor_and_who_sees_what():
    """The torch library's processor: the same ids, and its mask is our ranges, one key a picture."""
    from transformers import IdeficsProcessor
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    picture = PIL.Image.fromarray(np.zeros((30, 40, 3), np.uint8))
    turns = (say("user", "Two:", PICTURE, PICTURE, "and", Image("b.png"), "?"),)
    tokenizer, got = make("idefics", turns, generate=True, legacy=True)  # as released
    tokenizer.hf.pad_token = "<unk>"
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=28), tokenizer.hf)
    theirs = processor(text=[["Two:", picture, picture, "and", picture, "?"]], return_tensors="pt")
    assert got.tokens.tolist() == theirs["input_ids"][0].tolist()
    number = np.where(got.visual >= 0, np.cumsum(got.visual >= 0) - 1, -1)[None]
    seen = R.media(jnp.ones_like(number), jnp.asarray(number), 1, "last").dense(3)
    np.testing.assert_array_equal(seen, theirs["image_attention_mask"].numpy().astype(bool))
    assert seen.any()
    assert not seen[0, :2].any()
