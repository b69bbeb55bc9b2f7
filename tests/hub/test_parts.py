"""What a recipe starts from: a tower out of a release with its pooling head, a tokenizer without <image>."""

import dataclasses

import numpy as np
import pytest

from lvlm_jax import assemble
from lvlm_jax import params as P
from lvlm_jax.config import ConfigError
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.families import KINDS
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.recipe import Start
from lvlm_jax.recipe_model import model_of
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


@pytest.mark.parametrize("scan", [False, True])
def test_a_tower_leaves_its_last_block_behind(tmp_path, capsys, scan):
    folder = tiny.saved(tiny.perturbed(tiny.siglip_vision()), tmp_path / "in")
    whole = P.flatten(import_folder(folder, kind="vision", scan=scan).params)
    config = dataclasses.replace(import_folder(folder, kind="vision").config, pool="none", depth=2)
    like = KINDS["vision"].shapes(config, scan)[0]
    found = P.flatten(assemble.public_parts(Start(hub=str(folder)), {"vision": like}, None)["vision"])
    assert "the last of its 3 blocks is left out, as the recipe's tower has 2" in capsys.readouterr().err
    for path, leaf in found.items():
        stacked = scan and "layers/" in path
        np.testing.assert_array_equal(leaf, whole[path][:2] if stacked else whole[path], err_msg=path)
    fewer = KINDS["vision"].shapes(dataclasses.replace(config, depth=1), scan)[0]
    with pytest.raises(ConfigError, match=r"does not hold the recipe's|the recipe's model wants"):
        assemble.public_parts(Start(hub=str(folder)), {"vision": fewer}, None)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_a_visual_expert_begins_as_a_copy_of_the_language_model(tmp_path, scan):
    folder = tiny.saved(tiny.perturbed(tiny.llama()), tmp_path / "in")
    plain = P.flatten(import_folder(folder, scan=scan).params)
    sizes = dataclasses.replace(SYSTEMS["llava15_7b"].config, expert=True, llm=import_folder(folder).config)
    like = abstract(LVLM(sizes, scan=scan), dummy_batch(sizes))[0]["llm"]
    found = P.flatten(assemble.public_parts(Start(hub=str(folder)), {"llm": like}, None)["llm"])
    assert found.keys() == P.flatten(like).keys()
    copied = [path for path in found if "/expert_" in path]
    assert len(copied) == 7 * (1 if scan else sizes.llm.depth)
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, plain[path.replace("/expert_", "/")], err_msg=path)
    for path in copied:  # both are donated to one step
        own = found[path.replace("/expert_", "/")]
        assert leaf is not own and found[path].unsafe_buffer_pointer() != own.unsafe_buffer_pointer()  # noqa: PT018


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


def test_a_templates_own_words_come_before_the_pictures(tmp_path):
    plain = qwen_tiny(extra=())
    plain.save_pretrained(tmp_path)
    raw = model_of(SYSTEMS["open_flamingo_3b"], str(tmp_path)).to_dict()
    words = assemble.tokenizer_of(assemble.recipes.build(assemble.Model, {**raw, "image_token_id": len(plain) + 1}))
    assert [words.special_id(word) for word in ("<|endofchunk|>", "<image>")] == [len(plain), len(plain) + 1]


def test_rows_that_no_word_reaches_are_cut(tmp_path):
    folder = tiny.saved(tiny.perturbed(tiny.llama()), tmp_path / "in")
    whole = import_folder(folder)
    shorter = KINDS["decoder"].shapes(dataclasses.replace(whole.config, vocab=500), False)[0]
    found = assemble.public_parts(Start(hub=str(folder)), {"llm": shorter}, None)["llm"]
    np.testing.assert_array_equal(found["embed"]["table"], whole.params["embed"]["table"][:500])
    np.testing.assert_array_equal(found["head"]["kernel"], whole.params["head"]["kernel"][:, :500])
