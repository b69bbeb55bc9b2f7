"""The zoo: whole systems by name, their config.json both ways, and configs we cannot run."""

import dataclasses

import pytest

from lvlm_jax import zoo
from lvlm_jax.connectors import LinearConfig
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.vision import clip
from lvlm_jax.zoo import dual, llava, minigpt4
from tests import tiny

# The hub's LLaVA-1.5-7B, shortened to what bears on the numbers.
HUB = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
AUTHORS = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}


def test_every_system_is_whole():
    for name, spec in zoo.SYSTEMS.items():
        assert spec.name == name
        assert spec.template in TEMPLATES
        tower = spec.config.vision
        # The position table of MiniGPT-v2's tower is that of smaller pictures.
        assert spec.image.size == tower.image_size or tower.resize != "none"
        assert spec.image.patch == tower.patch_size
        assert spec.image.patches == spec.config.vision.patches
        assert 0 <= spec.image_token_id < spec.config.vocab


def test_an_unknown_name_shows_the_nearest():
    with pytest.raises(ValueError, match=r"unknown system 'llava15-7b'; did you mean llava15_7b"):
        zoo.spec("llava15-7b")


def test_the_hubs_config_is_the_preset():
    config, image_id = llava.from_hf(HUB)
    assert (config, image_id) == (zoo.SYSTEMS["llava15_7b"].config, 32000)


def test_the_authors_config_is_the_preset_without_added_words():
    config = zoo.SYSTEMS["llava15_7b"].config
    plain = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab=32000))
    assert llava.from_original(AUTHORS) == plain
    v1 = {k: v for k, v in AUTHORS.items() if k != "mm_projector_type"} | {"mm_vision_tower": "clip-vit-large-patch14"}
    assert llava.from_original(v1).connector == LinearConfig()
    assert llava.from_original(v1).vision == clip.PRESETS["clip_l14"]
    kept = llava.from_original(AUTHORS | {"mm_vision_select_feature": "cls_patch"})
    assert kept.visual_tokens == 577


@pytest.mark.parametrize("config", [*tiny.SYSTEMS.values(), *(spec.config for spec in zoo.SYSTEMS.values())])
def test_configs_go_out_and_come_back(config):
    tiled = (s for s in zoo.SYSTEMS.values() if s.image.tiles and s.config.public == config.public)
    family, image = zoo.family_of(config), next((s.image for s in tiled), None)
    public = family.to_hf(config, 7, image)
    assert (public["model_type"] in zoo.FAMILIES) is family.fits(config)
    assert (public["model_type"] == "llava") is llava.fits(config)
    assert zoo.READS[public["model_type"]].from_hf(public) == (config, 7)


def test_capped_logits_have_no_public_class():
    """The torch library's LLaVA puts a head of its own on Gemma 2, and that head caps nothing."""
    capped = dataclasses.replace(tiny.SYSTEMS["llava15"], llm=tiny.GEMMA2)
    raw = llava.to_hf(capped, 98)
    assert raw["model_type"] == llava.OWN_TYPE
    assert llava.from_hf(raw) == (capped, 98)
    theirs, _ = llava.from_hf({**raw, "model_type": "llava"})
    assert (capped.llm.final_softcap, theirs.llm.final_softcap) == (3.0, None)
    assert llava.to_hf(theirs, 98)["model_type"] == "llava"


def test_no_two_families_hold_one_model():
    for spec in zoo.SYSTEMS.values():
        fitting = [name for name, family in zoo.FAMILIES.items() if family.fits(spec.config)]
        own = (
            type(spec.config.connector).__name__ in ("PerceiverConfig", "PixelShuffleConfig") and not spec.config.fusion
        )
        own &= spec.name not in minigpt4.SYSTEMS
        own |= spec.name in ("llava_7b", "llava_13b")  # one dense layer, which their public class has not
        assert len(fitting) == (0 if own else 1), spec.name


def test_a_dual_encoders_config_goes_out_and_comes_back():
    for name, config in dual.PRESETS.items():
        assert dual.from_hf(dual.to_hf(config)) == config, name
    # Old files repeat each tower, whole, under a second name.
    old = dual.to_hf(dual.PRESETS["clip_l14"])
    old = old | {"vision_config_dict": old["vision_config"], "vision_config": {}, "text_config_dict": None}
    assert dual.from_hf(old) == dual.PRESETS["clip_l14"]
    with pytest.raises(ValueError, match=r"model_type is 'blip'.*'clip', 'siglip'"):
        dual.from_hf({"model_type": "blip"})
    odd = dataclasses.replace(dual.PRESETS["clip_b32"], projection=None)
    with pytest.raises(ValueError, match="no public class holds a clip_vision_model with a clip_text_model"):
        dual.to_hf(odd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_next"}, r"model_type is 'llava_next'.*supported: 'llava'"),
        ({"text_config": None}, r"text_config is missing"),
        ({"text_config": {"model_type": "bloom"}}, r"text_config.model_type is 'bloom'.*'llama', 'mistral', 'qwen2'"),
        ({"vision_config": {"model_type": "vit"}}, r"vision_config.model_type is 'vit'.*'clip_vision_model'"),
        ({"multimodal_projector_bias": False}, r"multimodal_projector_bias is False.*supported: True"),
        ({"projector_hidden_act": "mish"}, r"projector_hidden_act is 'mish'"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\].*one layer from -25 to 24"),
        ({"vision_feature_layer": 40}, r"vision_feature_layer is 40"),
        ({"vision_feature_select_strategy": "cls"}, r"vision_feature_select_strategy is 'cls'.*'default', 'full'"),
        (
            {"vision_config": {"model_type": "siglip_vision_model"}},
            r"vision_feature_select_strategy is 'default'.*supported: 'full'",
        ),
    ],
)
def test_what_we_cannot_run_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        llava.from_hf(HUB | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_vision_tower": "eva-clip"}, r"mm_vision_tower is 'eva-clip'.*'clip-vit-large-patch14-336'"),
        ({"mm_projector_type": "mlp3x_gelu"}, r"mm_projector_type is 'mlp3x_gelu'.*'mlp2x_gelu'"),
        ({"mm_vision_select_feature": "cls"}, r"mm_vision_select_feature is 'cls'"),
    ],
)
def test_authors_configs_we_cannot_run(change, message):
    with pytest.raises(ValueError, match=message):
        llava.from_original(AUTHORS | change)


def test_layouts_that_do_not_exist():
    with pytest.raises(ValueError, match=r"unknown checkpoint layout 'hf-3'; the layouts are hf-4"):
        llava.rows(zoo.SYSTEMS["llava15_7b"].config, "hf-3")
    with pytest.raises(ValueError, match=r"in no known LLaVA layout"):
        llava.layout_of(["transformer.h.0.attn.weight"])


def test_a_file_without_its_tower():
    config = zoo.SYSTEMS["llava15_7b"].config
    rows = llava.rows(config, "llava-original", tower=False)
    assert not any("vision" in row.theirs for row in rows)
    assert llava.layout_of([row.theirs for row in rows]) == "llava-original"
