"""A Chameleon of the torch library in, out, and back; its tokenizers alone; and configs that cannot be run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import transformers as hf

from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.hub.safetensors_io import TensorFolder
from lvlm_jax.hub.verify import verify
from lvlm_jax.zoo import chameleon
from tests.hub import tiny
from tests.tiny import weights

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
    found = verify(folder)
    assert found.passed, str(found)
    assert [part.name for part in found.parts] == ["picture tokens", "hidden states", "logits"]
    assert verify(tmp_path / "out", folder).passed


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


def test_what_the_public_class_cannot_hold_is_written_in_our_own_words(tmp_path):
    """A model that writes pictures, with a decoder of them: the same keys, and a config.json that only we read."""
    plain = chameleon.from_hf(RAW | tiny.DECODER)
    vision = dataclasses.replace(plain.vision, decoder=True)
    writer = dataclasses.replace(plain, text_only=False, vision=vision)
    public = json.loads(json.dumps(chameleon.to_hf(writer)))
    assert public["model_type"] == chameleon.OWN_TYPE
    assert chameleon.from_hf(public) == writer
    with pytest.raises(ValueError, match=r"config\.json: decoder, end_id missing; was it written by lvlm_jax"):
        chameleon.from_hf({key: value for key, value in public.items() if key not in ("decoder", "end_id")})
    with pytest.raises(ValueError, match=r"config\.json\.vision\.codez: no such field \(did you mean 'codes'"):
        chameleon.from_hf(public | {"vq_config": public["vq_config"] | {"codez": 3}})
    params = weights(writer)
    export_folder(tmp_path / "own", writer, params)
    loaded = import_folder(tmp_path / "own")
    assert (loaded.kind, loaded.config) == ("unified", writer)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    with pytest.raises(CheckpointError, match="the torch library has no class for this model"):
        verify(tmp_path / "own")
