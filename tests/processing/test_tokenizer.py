"""Tokenizer: text is text, special tokens are names, ids equal the library's."""

import pickle
from itertools import product

import numpy as np
import pytest

from lvlm_jax.processing.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizers_tiny import llama_tiny, qwen_tiny, tiny_bpe


def library_class(name, kind, **options):
    """The library's own class of that family over the tiny vocabulary."""
    import transformers

    vocab, merges = tiny_bpe(kind)
    return getattr(transformers, name)(vocab=vocab, merges=merges, extra_special_tokens=["<image>"], **options)


MAKERS = {
    "legacy": lambda: llama_tiny(legacy=True),
    "metaspace": lambda: llama_tiny(legacy=False),
    "qwen": qwen_tiny,
    "LlamaTokenizer-legacy": lambda: library_class("LlamaTokenizer", "llama", legacy=True),
    "LlamaTokenizer": lambda: library_class("LlamaTokenizer", "llama", legacy=False),
    "Qwen2Tokenizer": lambda: library_class("Qwen2Tokenizer", "qwen"),
}
TEXTS = ["a", "What is this?", "\nWhat is é 你?", " two  spaces ", "", "1234 don't\n\n", "😀😀", "ＡＢ e\u0301"]
TYPED = ["<image>", "</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>", "a <image>\nb</s>c", "<|endoftext|>"]


@pytest.fixture(params=MAKERS)
def hf(request):
    return MAKERS[request.param]()


@pytest.fixture
def tokenizer(hf):
    return Tokenizer(hf)


@pytest.mark.parametrize("text", TEXTS)
def test_text_equals_the_library(tokenizer, text):
    ids, spans = tokenizer.encode_text(text, first=True)
    assert ids.tolist() == tokenizer.hf.encode(text, add_special_tokens=False)
    assert ids.dtype == np.int32
    assert len(spans) == len(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_text_after_a_special_token_equals_the_library(tokenizer, text):
    ids, _ = tokenizer.encode_text(text, first=False)
    joint = tokenizer.hf.encode("<image>" + text, add_special_tokens=False)
    assert [tokenizer.special_id("<image>"), *ids.tolist()] == joint


def test_the_prefix_space_differs_only_in_the_metaspace_form():
    starts = {}
    for name in ("legacy", "metaspace", "qwen"):
        tokenizer = Tokenizer(MAKERS[name]())
        starts[name] = [
            tokenizer.hf.convert_ids_to_tokens(tokenizer.encode_text("a", f)[0].tolist()) for f in (True, False)
        ]
    assert starts == {"legacy": [["▁a"], ["▁a"]], "metaspace": [["▁a"], ["a"]], "qwen": [["a"], ["a"]]}


@pytest.mark.parametrize(("typed", "first"), list(product(TYPED, (True, False))))
def test_typed_markup_stays_characters(tokenizer, typed, first):
    ids, spans = tokenizer.encode_text(typed, first)
    specials = {i for i, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
    assert not specials & set(ids.tolist())
    assert tokenizer.decode(ids) == typed
    assert spans[-1][1] == len(typed)


def test_the_library_itself_would_have_made_a_special_token(tokenizer):
    """Without this the tests above would prove nothing."""
    assert tokenizer.special_id("<image>") in tokenizer.hf.encode("what is <image>?")


def test_unmarked_markup_is_reserved_and_ordinary_added_tokens_are_not():
    from tokenizers import AddedToken

    hf = qwen_tiny(extra=())
    hf.add_tokens([AddedToken("<image>", special=False), AddedToken("<|box|>", special=False), AddedToken("<h1>")])
    tokenizer = Tokenizer(hf)
    ids = tokenizer.encode_text("<image> <|box|> <h1>")[0].tolist()
    assert tokenizer.special_id("<image>") not in ids
    assert tokenizer.special_id("<|box|>") not in ids
    assert hf.convert_tokens_to_ids("<h1>") in ids


def test_spans_point_at_the_characters(tokenizer):
    text = "How many dogs? 你 é"
    _, spans = tokenizer.encode_text(text)
    covered = {i for start, stop in spans for i in range(start, stop)}
    assert covered >= {i for i, c in enumerate(text) if c != " "}
    assert all(0 <= a <= b <= len(text) for a, b in spans)


def test_ids_of_the_llama_shape():
    tokenizer = Tokenizer(llama_tiny())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.adds_bos) == (1, 2, 2, True)
    assert tokenizer.vocab_size == 481
    assert tokenizer.special_id("<image>") == 480


def test_ids_of_the_qwen_shape():
    tokenizer = Tokenizer(qwen_tiny())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.adds_bos) == (None, 482, 480, False)
    assert tokenizer.special_id("<|im_start|>") == 481


def test_unknown_special_token_names_close_ones():
    with pytest.raises(ValueError, match=r"no special token '<\|im_end\|' \(close: '<\|im_end\|>'"):
        Tokenizer(qwen_tiny()).special_id("<|im_end|")
    assert not Tokenizer(llama_tiny()).has_special("<|im_end|>")


def test_added_special_token_gets_an_id_and_is_never_read_from_text():
    tokenizer = Tokenizer(llama_tiny(extra=()))
    assert tokenizer.add_special(["<image>", "<im_start>"]) == [480, 481]
    assert tokenizer.vocab_size == 482
    assert tokenizer.add_special(["<image>"]) == [480]
    assert 480 not in tokenizer.encode_text("<image>")[0]


def test_save_and_load_keep_every_id(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.vocab_size == tokenizer.vocab_size
    for text, first in product([*TEXTS, *TYPED], (True, False)):
        assert again.encode_text(text, first)[0].tolist() == tokenizer.encode_text(text, first)[0].tolist()


def test_it_travels_to_a_worker_process(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    for text, first in product([*TEXTS, *TYPED], (True, False)):
        assert again.encode_text(text, first)[0].tolist() == tokenizer.encode_text(text, first)[0].tolist()


def test_missing_tokenizer_says_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer there. Give a folder with tokenizer.json"):
        load_tokenizer(tmp_path)


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        Tokenizer(Slow())


def test_punctuation_that_serves_as_padding_is_still_text():
    hf = qwen_tiny()
    hf.pad_token = "!"
    tokenizer = Tokenizer(hf)
    assert tokenizer.decode(tokenizer.encode_text("a cat!")[0], skip_special=False) == "a cat!"


def test_a_model_that_spells_markup_is_refused():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordLevel({"a": 0, "<image>": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=["<image>"]))
    with pytest.raises(ValueError, match="plain text became the special token '<image>'"):
        tokenizer.encode_text("a <image> a")
