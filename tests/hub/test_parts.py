"""What a recipe starts from: a tower out of a release with its pooling head, a tokenizer without <image>."""

import dataclasses

import numpy as np
import pytest

from lvlm_jax import assemble
from lvlm_jax import params as P
from lvlm_jax.config import ConfigError
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.families import KINDS
from lvlm_jax.recipe import Start, model_of
from lvlm_jax.zoo import SYSTEMS
from tests.hub import tiny
from tests.tokenizers_tiny import qwen_tiny


@pytest.mark.parametrize("name", ["siglip", "siglip_vision"])
def test_a_tower_leaves_its_pooling_head_behind(tmp_path, name):
    folder = tiny.saved(tiny.perturbed(getattr(tiny, name)()), tmp_path / "in")
    whole = import_folder(folder, kind="vision")
    config = dataclasses.replace(whole.config, pool="none")
    found = assemble.public_parts(Start(hub=str(folder)), {"vision": KINDS["vision"].shapes(config, False)[0]}, None)[
        "vision"
    ]
    assert "head" in whole.params
    assert set(found) == set(whole.params) - {"head"}
    for path, leaf in P.flatten(found).items():
        np.testing.assert_array_equal(leaf, P.flatten(whole.params)[path])
    deeper = KINDS["vision"].shapes(dataclasses.replace(config, depth=4), False)[0]
    with pytest.raises(ConfigError, match="does not hold the recipe's"):
        assemble.public_parts(Start(hub=str(folder)), {"vision": deeper}, None)


def test_a_tokenizer_without_a_word_for_pictures_gets_one(tmp_path):
    plain = qwen_tiny(extra=())
    plain.save_pretrained(tmp_path)
    raw = model_of(SYSTEMS["llava_qwen3_0.6b"], str(tmp_path)).to_dict()
    model = assemble.recipes.build(assemble.Model, {**raw, "image_token_id": len(plain)})
    words = assemble.tokenizer_of(model)
    assert words.special_id("<image>") == len(plain)
    assert words.vocab_size == len(plain) + 1
    # Another id is somebody's own word: nothing is added behind its back.
    other = assemble.recipes.build(assemble.Model, {**raw, "image_token_id": 7})
    assert assemble.tokenizer_of(other).vocab_size == len(plain)
