"""Models with named senses as folders, and one pair alone: out, in, and on top of a model that lacks it."""

import dataclasses
import json

import numpy as np
import pytest

from lvlm_jax import params as P
from lvlm_jax import zoo
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.export import export_folder
from lvlm_jax.hub.senses import add, part_of
from lvlm_jax.models.senses import NamedSense
from tests import tiny

CONFIG = tiny.SENSED


@pytest.fixture(scope="module")
def params():
    return tiny.weights(CONFIG)


def same(got, wanted):
    got, wanted = P.flatten(got), P.flatten(wanted)
    assert got.keys() == wanted.keys()
    for path, leaf in got.items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)


@pytest.mark.parametrize("base", ["llava15", "paligemma", "flamingo", "minigpt4"])
def test_a_whole_model(base, tmp_path):
    config = dataclasses.replace(tiny.SYSTEMS[base], senses=CONFIG.senses)
    params = tiny.weights(config)
    if base == "minigpt4":  # the authors' files have no bias of keys, which no score feels
        flat = P.flatten(params)
        params = P.unflatten({path: 0 * leaf if path.endswith("/k/bias") else leaf for path, leaf in flat.items()})
    export_folder(tmp_path / "x", config, params, image_token_id=98)
    raw = json.loads((tmp_path / "x" / "config.json").read_text())
    assert raw["model_type"] == zoo.senses.MODEL_TYPE  # a name at which other software stops
    found = import_folder(tmp_path / "x")
    assert (found.kind, found.config, found.image_token_id) == ("lvlm", config, 98)
    assert found.layout == "senses"
    same(found.params, params)


def test_videos_are_read_as_without_them():
    plain = zoo.SYSTEMS["llava_onevision_7b_ov"].config
    found = zoo.video_of(dataclasses.replace(plain, senses=CONFIG.senses))
    assert found == zoo.video_of(plain)
    assert found.pool == "bilinear"


@pytest.mark.parametrize("name", ["audio", "depth"])
def test_a_pair_alone(name, params, tmp_path):
    sense, own = part_of(CONFIG, params, f"senses/{name}")
    assert sense == NamedSense(name=name, sense=dict(CONFIG.senses)[name], width=32)
    export_folder(tmp_path / name, sense, own)
    found = import_folder(tmp_path / name, kind="sense")
    assert (found.kind, found.config) == ("sense", sense)
    same(found.params, own)

    rest = tuple(pair for pair in CONFIG.senses if pair[0] != name)
    plain = dataclasses.replace(CONFIG, senses=rest)
    before = {**params, "senses": {other: params["senses"][other] for other, _ in rest}}
    config, grown = add(plain, before, tmp_path / name)
    assert dict(config.senses) == dict(CONFIG.senses)
    same(grown, params)
    assert all(grown[part] is before[part] for part in before if part != "senses")
    renamed, _ = add(CONFIG, params, tmp_path / name, name="other")
    assert [one for one, _ in renamed.senses] == ["audio", "depth", "other"]


def test_what_does_not_fit(params, tmp_path):
    sense, own = part_of(CONFIG, params, "senses/audio")
    export_folder(tmp_path / "audio", sense, own)
    with pytest.raises(CheckpointError, match=r"the model has a sense 'audio' already; give the pair another name"):
        add(CONFIG, params, tmp_path / "audio")
    wide = dataclasses.replace(CONFIG, senses=(), llm=dataclasses.replace(CONFIG.llm, width=48))
    message = r"audio: its connector gives tokens of 32 values \(decoder_width of its config.json\), but the "
    with pytest.raises(CheckpointError, match=message + r"language model is 48 wide \(llm\.width of the model\)"):
        add(wide, {}, tmp_path / "audio")
    with pytest.raises(CheckpointError, match=r"holds a model of kind 'sense', not 'lvlm'"):
        import_folder(tmp_path / "audio", kind="lvlm")
    with pytest.raises(ValueError, match=r"part 'connector': this model's parts that stand alone are vision, llm, "):
        part_of(CONFIG, params, "connector")
    raw = json.loads((tmp_path / "audio" / "config.json").read_text())
    raw["encoder"] = None
    (tmp_path / "audio" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"this pair: encoder or connector is missing"):
        import_folder(tmp_path / "audio")


def test_the_word_of_a_picture_is_the_base_s(tmp_path):
    """CogVLM's files know none: an id that they say stands there, whatever senses stand beside."""
    config = dataclasses.replace(tiny.SYSTEMS["cogvlm"], senses=CONFIG.senses)
    out = export_folder(tmp_path / "x", config, tiny.weights(config))
    found = import_folder(out)
    assert (found.config.senses, found.image_token_id) == (config.senses, zoo.cogvlm.PICTURE)
    with pytest.raises(ValueError, match="give the tokenizer, or image_token_id="):
        export_folder(tmp_path / "y", CONFIG, tiny.weights(CONFIG))
