"""Key tables of BLIP-2's image-text models: all of the model, and the names of both sources."""

import dataclasses

import pytest

from lvlm_jax import keymap
from lvlm_jax import params as P
from lvlm_jax.models.image_text import ImageText, ImageTextConfig
from lvlm_jax.models.lvlm import dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.zoo import image_text
from tests import tiny

# CLIP's tower, which the authors' smaller model has.
CONFIG = ImageTextConfig(
    vision=dataclasses.replace(tiny.CLIP, class_feature=True),
    qformer=dataclasses.replace(tiny.QFORMER, vocab=40, context=8),
    projection=16,
)


def paths(config):
    batch = dummy_batch(tiny.SYSTEMS["llava15"], length=4)
    return set(P.flatten(abstract(ImageText(config), batch)[0]))


def test_every_weight_has_a_key():
    everything = paths(CONFIG)
    bare = dataclasses.replace(CONFIG, pretrains=False)
    less = {path for path in everything if not path.startswith(("word_head", "temperature"))}
    rows = image_text.rows(bare)
    keymap.check(rows, less, [row.theirs for row in rows], "the retrieval class")
    assert {"query_tokens", "embeddings.word_embeddings.weight", "itm_head.bias"} <= {row.theirs for row in rows}
    # What the authors keep: of the tower its last norm alone.
    rows = image_text.lavis_rows(CONFIG)
    kept = {path for path in everything if not path.startswith("vision/trunk/")}
    keymap.check(rows, kept, [row.theirs for row in rows], "LAVIS")
    named = {row.theirs for row in rows}
    assert {"temp", "Qformer.cls.predictions.bias", "ln_vision.weight", "text_proj.bias", "query_tokens"} <= named
    assert {row.theirs for row in image_text.lavis_rows(bare)} < named


def test_models_that_have_no_such_checkpoint():
    with pytest.raises(ValueError, match="pretrains=True, but the torch library's retrieval class has no word head"):
        image_text.rows(CONFIG)
    with pytest.raises(ValueError, match=r"qformer.vocab=None: a Q-Former that is scored against texts reads them"):
        dataclasses.replace(CONFIG, qformer=tiny.QFORMER)
