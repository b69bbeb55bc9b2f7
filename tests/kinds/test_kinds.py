"""Kinds of stages: their tables, what they refuse, and rows of words that their models read."""

import dataclasses

import numpy as np
import pytest

from lvlm_jax import config, recipe
from lvlm_jax.config import ConfigError
from lvlm_jax.kinds import KINDS, SECTIONS, image_text, pformer, unified, vq
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example, Image, Text, Turn, Video
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.infer.tiny import tiny_system
from tests.tokenizers_tiny import bert_tiny

CAPTION = Example((Turn("user", (Image("a.png"),)), Turn("assistant", (Text("A black cat!  (it sits)"),))), id="x/1")


def values(name, **changes):
    """A recipe's values with some changed, by path."""
    found = config.load(name, schema=recipe.Recipe).to_dict()
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = found
        for key in parents:
            node = node[key]
        node[last] = value
    return found


BAD = [
    ("qwen2_5_vl_finetune", {"model__video__pool": "bilinear"}, r"model: video\.pool='bilinear', .*own resolution"),
    (
        "instructblip",
        {"model__instruction__length": 513},
        r"model: instruction\.length=513 is beyond connector\.context=512",
    ),
    ("unified_emoji", {"stages__vq__data__pictures": 8}, r"kind 'vq' takes one picture and one text a row"),
    ("unified_emoji", {"stages__unified__data__length": 400}, r"data\.length=400 is beyond model\.llm\.context=304"),
    ("unified_emoji", {"stages__vq__settings": {"distance": "l3"}}, r"settings\.distance='l3'.*\['l1', 'l2'\]"),
    ("unified_emoji", {"stages__vq__evaluate": ("after",)}, r"kind 'vq' trains no model that could answer"),
    ("unified_emoji", {"stages__vq__matmul": "int8"}, r"stages\.vq\.matmul='int8': a stage of kind 'vq' multi"),
    (
        "unified_emoji",
        {"stages__vq__data__senses": {"audio": 0}},
        r"names \['audio'\]; the senses of config\.model are \[\]",
    ),
    ("unified_emoji", {"run": ("vq",)}, r"config\.export: stages\.vq of kind 'vq' trains no whole model"),
    ("unified_emoji", {"model__first_code": 4}, r"share an id; each must have one of its own"),
    ("unified_emoji", {"model__image__patch": 8}, r"image\.size=32, image\.patch=8 do not fit"),
    ("blip2_stage1", {"stages__qformer__settings__start_id": 40000}, r"start_id=40000 is outside the vocabulary"),
    ("blip2_stage1", {"stages__qformer__data__length": 600}, r"length=600 is beyond model\.qformer\.context=512"),
    ("blip2_stage1", {"stages__qformer__settings__align": 1.0}, r"align=1\.0 with model\.pformer None"),
    ("blip2_stage1", {"stages__qformer__accumulate": 2}, r"kind 'image_text' couples all rows"),
    ("pformer_pretrain", {"stages__pformer__data__length": 32}, r"data\.length=32: from 33 to 2048, model\.reads=32"),
    ("pformer_pretrain", {"stages__pformer__data__pack": True}, r"it needs pack=False and pictures=0; here pack=True"),
    ("pformer_pretrain", {"stages__pformer__settings__mask": 1.0}, r"mask=1\.0: an id of the vocabulary, and a share"),
    ("pformer_pretrain", {"model__reads": 2}, r"reads=2: from 3 to pformer\.context=512"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD, ids=[f"{n} {' '.join(c)}" for n, c, _ in BAD])
def test_what_is_refused(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe.resolve(values(name, **changes))


def test_every_section_is_found_by_its_fields():
    """A recipe says which model it has by the fields alone."""
    found = {name: type(recipe.load(name).model) for name in ("quickstart", "unified_emoji", "blip2_stage1")}
    found["pformer_pretrain"] = type(recipe.load("pformer_pretrain").model)
    assert list(found.values()) == [recipe.Model, *SECTIONS]
    assert all(kind.section in (None, *SECTIONS) for kind in KINDS.values())
    with pytest.raises(ConfigError, match=r"config\.model\.first_cod: no such field \(did you mean 'first_code'"):
        recipe.resolve(values("unified_emoji", model__first_cod=7))


def test_pictures_and_names_as_one_run():
    tokenizer = tiny_system().tokenizer
    ids = {"begin_id": 440, "end_id": 441, "image_id": 442, "count": 2}
    run = unified.written(CAPTION, tokenizer, 99, **ids)
    assert run.tokens[:5].tolist() == [tokenizer.bos_id, 440, 442, 442, 441]
    assert run.tokens[-1] == tokenizer.eos_id
    assert run.weights.tolist() == [0.0] + [1.0] * (len(run.tokens) - 1)
    turned = dataclasses.replace(CAPTION, turns=CAPTION.turns[::-1])
    assert unified.written(turned, tokenizer, 99, **ids).tokens[-5:].tolist() == [440, 442, 442, 441, tokenizer.eos_id]
    with pytest.raises(DataError, match=r"x/1'?: .* tokens do not fit max_length 5, and a picture of 2 tokens"):
        unified.written(CAPTION, tokenizer, 5, **ids)
    film = Example((Turn("user", (Video("a.mp4"),)), CAPTION.turns[1]), id="x/1")
    with pytest.raises(DataError, match="a video, but this model's pictures are runs of tokens"):
        unified.written(film, tokenizer, 99, **ids)


def test_a_picture_alone():
    alone = vq.picture_alone(CAPTION)
    assert (len(alone.tokens), alone.images, alone.sizes) == (1, CAPTION.images, (0,))
    with pytest.raises(DataError, match="no picture, and a picture tokenizer learns from nothing else"):
        vq.picture_alone(Example(CAPTION.turns[1:], id="x/1"))


def test_what_a_named_sense_reads_is_no_picture():
    heard = Example((Turn("user", (Image("a.png", sense="depth"),)), CAPTION.turns[1]), id="x/1")
    with pytest.raises(DataError, match=r"x/1'?: a record for a named sense, and this model has none"):
        vq.picture_alone(heard)


def test_a_caption_in_berts_words():
    tokenizer = Tokenizer(bert_tiny())
    plain = image_text.written(CAPTION, tokenizer, 32, 512)
    assert tokenizer.decode(plain.tokens) == "a black cat it sits"
    assert (plain.tokens[0], plain.tokens[-1]) == (tokenizer.hf.cls_token_id, tokenizer.hf.sep_token_id)
    cut = image_text.written(CAPTION, tokenizer, 4, 512)
    assert (len(cut.tokens), cut.tokens[-1], cut.images) == (4, tokenizer.hf.sep_token_id, CAPTION.images)
    with pytest.raises(DataError, match="is outside the vocabulary of 6; is it BERT's tokenizer"):
        image_text.written(CAPTION, tokenizer, 32, 6)
    with pytest.raises(DataError, match="no cls_token or no sep_token"):
        image_text.written(CAPTION, tiny_system().tokenizer, 32, 512)
    silent = Example((CAPTION.turns[0], Turn("assistant", (Text("(!)"),))), id="x/1")
    with pytest.raises(DataError, match="no caption: the assistant says nothing"):
        image_text.written(silent, tokenizer, 32, 512)


def test_a_sentence_twice():
    reader, writer = Tokenizer(bert_tiny()), tiny_system().tokenizer
    options = {"reads": 24, "max_length": 60, "ends": "\n", "sizes": (512, 512)}
    both = pformer.written(CAPTION, reader, writer, **options)
    assert reader.decode(both.tokens[:24]) == "a black cat it sits"
    assert both.tokens[23] == reader.pad_id
    assert both.tokens[24] == writer.bos_id
    assert writer.decode(both.tokens[24:]) == "a black cat it sits\n"
    assert both.images == ()
    assert len(pformer.written(CAPTION, reader, writer, **options | {"max_length": 26}).tokens) == 26
    with pytest.raises(DataError, match="outside the 9 words of the language model"):
        pformer.written(CAPTION, reader, writer, **options | {"sizes": (512, 9)})


def test_only_what_is_berts_begins_as_bert():
    rows = pformer.bert_rows(recipe.load("pformer_pretrain:tiny").model.pformer)
    ours = {path.split("/")[1] for row in rows for path in row.leaves}
    assert ours == set(pformer.BERT_PARTS)
    assert {row.theirs.split(".")[0] for row in rows} == {"bert"}


def test_a_batch_without_pictures_has_none():
    batch = KINDS["pformer"].batch(recipe.load("pformer_pretrain:tiny"), rows=3)
    assert batch.patches.size == 0
    np.testing.assert_array_equal(batch.tokens.shape, (3, 14))
