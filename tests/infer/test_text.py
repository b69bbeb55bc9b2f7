import numpy as np
import pytest

from lvlm_jax.infer.text import TextStream, whole_text
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.tokenizers_tiny import llama_tiny, qwen_tiny

WORDS = ["It is a red circle.", "日本語 and ünï¢ödé 🙂🙃 done", " leading space", "a  b\n\nc", "👩‍👩‍👧"]


def pieces_of(stream, ids):
    out = []
    for token in ids:
        out.append(stream.feed(int(token)))
        if stream.stopped:
            return out
    return [*out, stream.finish()]


@pytest.mark.parametrize("make", [llama_tiny, qwen_tiny])
@pytest.mark.parametrize("text", WORDS)
def test_pieces_are_whole_characters_and_join_to_the_text(make, text):
    tokenizer = Tokenizer(make())
    ids, _ = tokenizer.encode_text(text)
    pieces = pieces_of(TextStream(tokenizer.decode), ids)
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [llama_tiny, qwen_tiny])
@pytest.mark.parametrize("stop", ["circle", "le.", "ed ci", "\n", "🙃"])
@pytest.mark.parametrize("text", ["It is a red circle. And\nmore", "so 🙂🙃 it is", "no end here"])
def test_a_stop_string_ends_the_text_wherever_token_borders_are(make, stop, text):
    tokenizer = Tokenizer(make())
    ids, _ = tokenizer.encode_text(text)
    stream = TextStream(tokenizer.decode, ["never", stop])
    pieces = pieces_of(stream, ids)
    whole = tokenizer.decode(ids)
    assert "".join(pieces) == whole.split(stop)[0]
    assert stream.stopped == (stop in whole)


def test_the_beginning_of_a_stop_string_is_held_back_and_given_out_at_the_end():
    stream = TextStream(lambda ids: "".join(chr(i) for i in ids), ["STOP"])
    assert [stream.feed(ord(c)) for c in "aSTx ST"] == ["a", "", "", "STx", " ", "", ""]
    assert stream.finish() == "ST"


def test_the_first_of_several_stop_strings_wins():
    stream = TextStream(lambda ids: "ab END cd ###"[: len(ids) * 13], ["###", "END"])
    assert stream.feed(0) == "ab "
    assert stream.stopped
    assert stream.finish() == ""


def test_bytes_that_never_become_a_character_come_out_at_the_end():
    tokenizer = Tokenizer(llama_tiny())
    first = tokenizer.hf.convert_tokens_to_ids("<0xF0>")
    stream = TextStream(tokenizer.decode)
    assert stream.feed(first) == ""
    assert stream.finish() == "\ufffd"


def test_a_whole_answer_reads_as_its_stream_even_where_bytes_are_broken():
    tokenizer = Tokenizer(llama_tiny())
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(3, 480, 20).tolist()
        assert "".join(pieces_of(TextStream(tokenizer.decode), ids)) == whole_text(tokenizer.decode, ids)
