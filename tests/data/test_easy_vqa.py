import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from lvlm_jax.data.easy_vqa import EasyVqa, attributes, word_tokenizer
from lvlm_jax.data.sources import Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Image, Text
from lvlm_jax.processing.tokenizer import Tokenizer


def pairs(example):
    """((picture or None), [(question, answer), ...]) of an example."""
    texts = [" ".join(s.text for s in turn.segments if isinstance(s, Text)) for turn in example.turns]
    return example.images, list(zip(texts[::2], texts[1::2], strict=True))


def test_the_splits_are_the_published_ones_and_share_no_picture():
    train, validation, test = (EasyVqa(split) for split in ("train", "validation", "test"))
    assert isinstance(train, Source)
    assert len(train) + len(validation) == 38575
    assert len(test) == 9673
    sources = (train, validation, test)
    numbers = [{int(re.search(r"(\d+)\.png", s.origin(i))[1]) for i in range(len(s))} for s in sources]
    assert numbers == [set(range(3600)), set(range(3600, 4000)), set(range(1000))]
    folders = [Path(s[0].images[0].source).parts[-3] for s in sources]
    assert folders == ["train", "train", "test"]
    assert len(EasyVqa("train", holdout=0)) == 38575
    yes_no = [pairs(test[i])[1][0][1] in ("yes", "no") for i in range(0, len(test), 5)]
    assert abs(sum(yes_no) / len(yes_no) - 0.74) < 0.02


def test_conversations_use_each_question_once_and_follow_the_seed():
    single, many = EasyVqa("validation"), EasyVqa("validation", turns=4, seed=5)
    assert len(many) < len(single) / 3

    def asked(source):
        return Counter((e.images[0].source, *pair) for e in source for pair in pairs(e)[1])

    assert asked(many) == asked(single)
    assert max(len(pairs(e)[1]) for e in many) == 4
    assert all(isinstance(e.turns[0].segments[0], Image) and len(e.images) == 1 for e in many)
    again, other = EasyVqa("validation", turns=4, seed=5), EasyVqa("validation", turns=4, seed=6)
    assert [e.turns for e in again] == [e.turns for e in many]
    assert [e.turns for e in other] != [e.turns for e in many]
    assert repr(again) == repr(many) != repr(other)


def test_captions_follow_from_the_questions():
    full = EasyVqa("train", "captions", holdout=0)
    assert len(full) == 3578
    captions = Counter(pairs(e)[1][0][1] for e in full)
    assert len(captions) == 24
    assert {len(c.split()) for c in captions} == {3}
    partial = EasyVqa("train", "partial_captions", holdout=0)
    assert len(partial) == 4000 - 29
    assert {"a triangle", "a blue shape"} <= set(partial.captions.values())
    assert all(len(e.images) == 1 and pairs(e)[1][0][0] == "" for e in full)


def test_text_puts_the_caption_where_the_picture_was():
    text = EasyVqa("validation", "text")
    captions = EasyVqa("validation", "partial_captions").captions
    assert all(not e.images for e in text)
    said = [pairs(e)[1][0] for e in text]
    assert Counter(answer for question, answer in said if question == answer) == Counter(captions.values())
    asked = next(pair for pair in said if pair[0] != pair[1])
    assert asked[0].startswith(captions[3600] + " ")
    assert asked[0].endswith("?")


def test_attributes_of_a_picture():
    assert attributes([("what is the blue shape?", "rectangle")]) == ("blue", "rectangle")
    assert attributes([("is there not a circle?", "yes"), ("is no triangle present?", "yes")]) == (None, "rectangle")
    assert attributes([("is a teal shape present?", "yes")]) == ("teal", None)
    assert attributes([("is there a red shape?", "no")]) == (None, None)
    with pytest.raises(
        DataError, match=r"7\.png: the questions contradict one another on colour at 'is a red shape pre"
    ):
        attributes([("what color is the shape?", "blue"), ("is a red shape present?", "yes")], "7.png")


def test_bad_arguments_and_a_missing_package(monkeypatch):
    with pytest.raises(DataError, match="unknown split 'val'; valid: 'train', 'validation', 'test'"):
        EasyVqa("val")
    with pytest.raises(DataError, match="unknown kind 'vqa'; valid: 'questions', 'captions', 'partial_captions', 'te"):
        EasyVqa("test", "vqa")
    with pytest.raises(DataError, match="turns=2 with kind='captions'"):
        EasyVqa("train", "captions", turns=2)
    with pytest.raises(DataError, match="holdout=5000: there are 4000 training pictures"):
        EasyVqa("train", holdout=5000)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'lvlm-jax\[quickstart\]'"):
        EasyVqa("test")


def test_word_tokenizer_is_the_same_every_time_and_keeps_markup_out():
    hf = word_tokenizer()
    assert hf.get_vocab() == word_tokenizer().get_vocab()
    assert len(hf) == 35
    first = "<pad> <s> </s> <unk> <image> USER: ASSISTANT: ?"
    assert hf.convert_ids_to_tokens(range(8)) == first.split()
    assert hf.decode(hf("a red circle")["input_ids"], skip_special_tokens=True) == "a red circle"
    assert hf.tokenize("is there a red shape?")[-2:] == ["shape", "?"]
    tokenizer = Tokenizer(hf)
    assert tokenizer.adds_bos
    typed, _ = tokenizer.encode_text("what <image> </s> is <s>")
    reserved = [hf.convert_tokens_to_ids(t) for t in ("<pad>", "<s>", "</s>", "<image>")]
    assert not set(typed.tolist()) & set(reserved)
    for source in (EasyVqa("test"), EasyVqa("validation", "text")):
        for index in range(0, len(source), 97):
            for question, answer in pairs(source[index])[1]:
                assert hf.unk_token_id not in tokenizer.encode_text(f"{question} {answer}")[0]
