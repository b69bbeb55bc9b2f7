"""A Chameleon of the torch library in, out, and back; its tokenizers alone; and configs that cannot be run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import transformers as hf

from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.hub.safetensors_io import TensorFolder
from lvlm_jax.hub.verify import verify
from lvlm_jax.zoo import chameleon
from tests.hub import tiny

torch = tiny.torch
VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "num_embeddings": 12,
    "embed_dim": 6,
    "latent_channels": 8,
}
WORDS = {chameleon.code_name(code): 30 - code for code in range(12)}
WORDS |= {"<image>": 7, "<racm3:break>": 5, "<eoss>": 6, "word": 9}


def whole():
    vision = {**VQ, "resolution": 8}
    return hf.ChameleonForConditionalGeneration(
        hf.ChameleonConfig(**tiny.DECODER, vq_config=vision, vocabulary_map=WORDS, swin_norm=True)
    )


def chameleon_vq():
    return hf.ChameleonVQVAE(hf.ChameleonVQVAEConfig(**VQ, resolution=8))


def janus_vq():
    from transformers import JanusVQVAE, JanusVQVAEConfig

    return JanusVQVAE(JanusVQVAEConfig(**VQ, num_patches=4))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "kind"), [(whole, "unified"), (chameleon_vq, "vq"), (janus_vq, "vq")])
def test_in_and_out(tmp_path, make, kind):
    torch.manual_seed(0)
    model = tiny.perturbed(make())
    folder = tiny.saved(model, tmp_path / "in")
    loaded = import_folder(folder)
    assert (loaded.kind, loaded.layout) == (kind, "hf")
    export_folder(tmp_path / "out", loaded.config, loaded.params)
    one, other = TensorFolder(folder), TensorFolder(tmp_path / "out")
    assert set(one) == set(other)
    assert all(one[key].tobytes() == other[key].tobytes() for key in one)
    again = import_folder(tmp_path / "out")
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    theirs, said = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if kind == "vq":
        return
    tokens = torch.tensor([[1, 40, 9, 33]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, theirs.eval()(tokens).logits)
    with pytest.raises(ValueError, match="of kind 'unified'; this command compares lvlm, decoder"):
        verify(folder)


RAW = {"model_type": "chameleon", "vq_config": {**VQ, "resolution": 8}, "vocab_size": 512, "vocabulary_map": WORDS}


def test_the_words_of_a_picture():
    config = chameleon.from_hf(RAW)
    assert config.code_ids == tuple(30 - code for code in range(12))
    assert (config.image_id, config.begin_id, config.end_id) == (7, 5, 6)
    assert [chameleon.code_name(code) for code in (0, 10, 8191)] == ["IMGIMGAZ", "IMGIMGBAZ", "IMGIMGIBJBZ"]
    public = json.loads(json.dumps(chameleon.to_hf(config)))
    assert chameleon.from_hf(public) == config
    assert public["vocabulary_map"] == {name: token for name, token in WORDS.items() if name != "word"}


def test_the_released_sizes():
    for config in chameleon.PRESETS.values():
        assert chameleon.from_hf(chameleon.to_hf(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary_map": None}, "vocabulary_map has no '<image>', '<racm3:break>', '<eoss>'"),
        ({"vocabulary_map": {**WORDS, "IMGIMGQZ": 2}}, "vocabulary_map has 'IMGIMGQZ', which is not supported"),
        ({"vocabulary_map": {**WORDS, "IMGIMGBCZ": 2}}, "names 13 picture tokens, but vq_config has 12 codes"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, which is not supported; supported: 1e-05"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"vq_config": {**VQ, "resolution": 8, "double_latent": True}}, "double_latent is True"),
        ({"vq_config": {**VQ, "resolution": 8, "attn_type": "linear"}}, "attn_type is 'linear'"),
    ],
)
def test_what_cannot_be_run(change, message):
    with pytest.raises(ValueError, match=message):
        chameleon.from_hf(RAW | change)


def test_what_the_public_class_cannot_hold():
    writer = dataclasses.replace(chameleon.from_hf(RAW), text_only=False)
    with pytest.raises(ValueError, match=r"holds no model with text_only=False.*Set text_only=True"):
        chameleon.to_hf(writer)
