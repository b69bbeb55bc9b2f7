"""CogVLM's folders in and out, and what their config.json says."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lvlm_jax import api, zoo
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.configs import describe
from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.hub.safetensors_io import TensorFolder, write_folder
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.zoo import cogvlm
from tests import tiny as models
from tests.parity import compare
from tests.parity import test_cogvlm as parity
from tests.tokenizers_tiny import llama_tiny

# As the release at 490 pixels has it; it names no model_type.
HUB = {
    "architectures": ["CogVLMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_cogvlm.CogVLMConfig",
        "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
    },
    "vision_config": {
        "dropout_prob": 0.0,
        "hidden_act": "gelu",
        "in_channels": 3,
        "num_hidden_layers": 63,
        "hidden_size": 1792,
        "patch_size": 14,
        "num_heads": 16,
        "intermediate_size": 15360,
        "layer_norm_eps": 1e-06,
        "num_positions": 1226,
        "image_size": 490,
    },
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "template_version": "chat",
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "vocab_size": 32000,
    "num_hidden_layers": 32,
    "hidden_act": "silu",
    "use_cache": True,
}


def test_the_hubs_config_is_the_preset(tmp_path):
    found = describe(HUB, tmp_path)
    assert (found.kind, found.config, found.image_token_id) == ("lvlm", zoo.SYSTEMS["cogvlm_chat"].config, 0)
    small = {**HUB["vision_config"], "image_size": 224, "num_positions": 257}
    assert describe({**HUB, "vision_config": small}, tmp_path).config == zoo.SYSTEMS["cogvlm_base_224"].config
    assert zoo.SYSTEMS["cogvlm_base_490"].config.visual_tokens == 1227


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_multi_query_heads": 8}, r"num_multi_query_heads \(CogVLM2 has some\) is 8"),
        ({"cross_hidden_size": 1024}, r"cross_hidden_size \(CogAgent has one\) is 1024"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*supported: 'silu'"),
        (
            {"vision_config": {**HUB["vision_config"], "num_positions": 257}},
            "vision_config.num_positions is 257, which is not supported; supported: 1226",
        ),
    ],
)
def test_what_we_cannot_run_is_an_error(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        describe({**HUB, **change}, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model as the hub writes it: no model_type, no tokenizer, tables of rotation among the weights."""
    path = tmp_path_factory.mktemp("cogvlm") / "in"
    state = compare.tensors(parity.references())
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    write_folder(path, state.items())
    raw = {k: v for k, v in cogvlm.to_hf(parity.CONFIG, cogvlm.PICTURE).items() if k not in ("model_type", "auto_map")}
    (path / "config.json").write_text(json.dumps(raw))
    return path


def test_there_and_back(folder, tmp_path):
    loaded = import_folder(folder)
    assert (loaded.kind, loaded.layout, loaded.image_token_id) == ("lvlm", "cogvlm", 0)
    assert loaded.config == parity.CONFIG
    out = export_folder(tmp_path / "out", loaded.config, loaded.params)
    theirs, ours = TensorFolder(folder), TensorFolder(out)
    assert set(ours) == {key for key in theirs if not key.endswith("inv_freq")}
    for key in ours:
        assert (ours.shape(key), ours[key].tobytes()) == (theirs.shape(key), theirs[key].tobytes()), key
    again = import_folder(out)
    assert (again.config, again.image_token_id) == (loaded.config, 0)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.slow
def test_a_folder_that_answers(tmp_path):
    """A tokenizer without a word for a picture will do; the folder brings its prompt."""
    config = models.SYSTEMS["cogvlm"]
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab=480))
    tokenizer = Tokenizer(llama_tiny(extra=()))
    spec = dataclasses.replace(zoo.SYSTEMS["cogvlm_chat"].image, size=28, patch=7)
    out = export_folder(tmp_path / "out", config, models.weights(config), tokenizer, spec, "cogvlm_vqa")
    system = api.load(out)
    assert (system.template.name, system.image_token_id, system.spec) == ("cogvlm_vqa", 0, spec)
    picture = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    said = system.generate("What is the color?", images=picture, max_new_tokens=4)
    chat = system.chat()
    assert chat.ask("What is the color?", images=picture, max_new_tokens=4) == said
    assert isinstance(chat.ask("Sure?", max_new_tokens=2), str)
