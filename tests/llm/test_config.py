"""Public config.json files of decoders: old and new forms, and what we cannot run."""

import dataclasses

import pytest

from lvlm_jax import llm
from lvlm_jax.llm import (
    chatglm,
    gemma,
    gemma2,
    gemma3,
    glm,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mpt,
    opt,
    palm,
    qwen,
    qwen2,
    qwen3,
)
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.nn.positions import RopeScaling

OLD = {"model_type": "llama", "rope_theta": 500000.0}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


FAMILY = {name: kind for kind, family in reversed(llm.FAMILIES.items()) for name in family.PRESETS}
FAMILY |= dict.fromkeys(llm.smollm2.PRESETS, "llama")
"""The public ``model_type`` of every preset."""


@pytest.mark.parametrize("name", llm.PRESETS)
def test_presets_go_out_and_come_back(name):
    config, family = llm.PRESETS[name], llm.FAMILIES[FAMILY[name]]
    public = family.to_hf(config)
    assert llm.family_of(config) == FAMILY[name]
    assert public["model_type"] == {"chatglm_6b": "chatglm"}.get(FAMILY[name], FAMILY[name])
    back = llm.FAMILIES[public["model_type"]].from_hf(public)
    assert back == config or back == DecoderConfig(**{**vars(config), "head_dim": None})
    assert back.head_width == config.head_width


def test_hub_configs_of_gpts():
    """As the releases' files have them: what is no difference from the class defaults is often left out."""
    pythia = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    pythia |= {"vocab_size": 50304, "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True}
    assert gpt_neox.from_hf(pythia) == gpt_neox.PRESETS["pythia_70m"]
    assert gpt_neox.from_hf({"hidden_act": "gelu_fast"}) == gpt_neox.PRESETS["gpt_neox_20b"]
    assert gpt_neox.from_hf({**pythia, "rotary_emb_base": 500}).rope_theta == 500
    assert opt.from_hf({"_remove_final_layer_norm": False, "prefix": "</s>"}) == opt.PRESETS["opt_125m"]
    assert gpt2.from_hf({"n_ctx": 1024, "task_specific_params": {}}) == gpt2.PRESETS["gpt2"]
    story = {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6, "prefix_lm": False, "softmax_scale": None}
    sizes = {"d_model": 4096, "n_heads": 32, "n_layers": 32, "max_seq_len": 65536, "vocab_size": 50432}
    assert mpt.from_hf({**sizes, "attn_config": story}) == mpt.PRESETS["mpt_7b_storywriter"]


def test_hub_configs_of_glm_and_qwen():
    released = {"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "original_rope": True}
    assert chatglm.from_hf({**released, "seq_length": 32768}) == chatglm.PRESETS["chatglm2_6b"]
    assert chatglm.from_hf({**released, "seq_length": 8192}) == chatglm.PRESETS["chatglm3_6b"]
    first = {"position_encoding_2d": True, "inner_hidden_size": 16384, "bos_token_id": 130004, "vocab_size": 130528}
    assert chatglm.from_hf(first) == llm.PRESETS["chatglm_6b"]
    # GLM-4 under its first name is the GLM-4 of the torch library.
    sizes = {"num_layers": 40, "padded_vocab_size": 151552, "rope_ratio": 500, "layernorm_epsilon": 1.5625e-7}
    first = chatglm.from_hf({**released, **sizes, "seq_length": 131072})
    assert dataclasses.replace(first, public=None) == glm.PRESETS["glm4_9b_chat"]
    assert glm.from_hf({"rope_theta": 5e6}) == glm.PRESETS["glm4_9b_chat"]
    assert glm.from_hf({"partial_rotary_factor": 0.25}).rotary_fraction == 0.25
    assert qwen.from_hf({"seq_length": 8192, "use_dynamic_ntk": True}) == qwen.PRESETS["qwen_7b"]
    assert llm.family_of(dataclasses.replace(qwen.PRESETS["qwen_7b"], public=None)) == "qwen2"


@pytest.mark.parametrize("name", ["opt_350m", "gpt2", "pythia_70m", "mpt_7b"])
def test_what_a_public_class_cannot_hold(name):
    """Each of these differs from a released decoder in what its class has no field for."""
    config = llm.PRESETS[name]
    for change in ({"kv_heads": 1}, {"scale_embeddings": True}, {"mlp": "gated"}, {"norm": "rms"}):
        with pytest.raises(ValueError, match="no public family"):
            llm.family_of(dataclasses.replace(config, **change))


def test_the_old_and_the_new_form_of_rotary_settings_are_one():
    scaling = RopeScaling(kind="llama3", factor=8.0)
    forms = [
        OLD | {"rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
        OLD | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "rope_scaling": LLAMA3},
    ]
    for form in forms:
        config = llama.from_hf(form)
        assert (config.rope_theta, config.rope_scaling) == (500000.0, scaling)
    linear = llama.from_hf({"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (linear.rope_theta, linear.rope_scaling) == (10000.0, RopeScaling(kind="linear", factor=2.0))
    assert llama.from_hf(OLD | {"rope_scaling": None}).rope_scaling is None
    assert llama.from_hf({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}).rope_theta == 5.0


def test_what_a_config_leaves_out_is_what_the_public_class_assumes():
    # The text part of the hub's LLaVA-1.5-7B, whole.
    config = llama.from_hf(
        {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    )
    assert config == DecoderConfig(**{**vars(llama.PRESETS["vicuna15_7b"]), "vocab": 32064})


def test_the_text_parts_of_hub_configs():
    """Written as differences from the class defaults: PaliGemma 1 and 2 at 3B."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1}
    config = gemma.from_hf({"model_type": "gemma", **sizes, "intermediate_size": 16384, "vocab_size": 257216})
    assert config == dataclasses.replace(gemma.PRESETS["gemma_2b"], vocab=257216)
    assert gemma.from_hf({"hidden_act": "gelu", "hidden_activation": None}) == gemma.PRESETS["gemma_7b"]
    assert gemma2.from_hf({"vocab_size": 256000}) == gemma2.PRESETS["gemma2_2b"]
    # Null is a value here: no cap at all.
    capless = gemma2.from_hf({"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (capless.attn_softcap, capless.final_softcap) == (None, None)


def test_the_text_part_of_gemma3_in_its_old_and_its_new_form():
    sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    linear = {"rope_type": "linear", "factor": 8.0}
    old = gemma3.from_hf({**sizes, "rope_scaling": linear})
    nested = {
        "full_attention": {**linear, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    types = [("full" if (i + 1) % 6 == 0 else "sliding") + "_attention" for i in range(34)]
    assert old == gemma3.from_hf({**sizes, "rope_parameters": nested, "layer_types": types})
    assert old == gemma3.PRESETS["gemma3_4b"]
    assert gemma3.to_hf(old)["sliding_window_pattern"] == 6


def test_windows_of_mistral_and_qwen3():
    assert (
        mistral.from_hf({"rms_norm_eps": 1e-5, "max_position_embeddings": 32768}) == mistral.PRESETS["mistral_7b_v01"]
    )
    assert mistral.from_hf({"sliding_window": None}).window is None
    upper = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3, "num_hidden_layers": 5}
    config = qwen3.from_hf(upper)
    assert (config.window, config.pattern) == (64, ("global",) * 3 + ("local",) * 2)
    assert qwen3.from_hf(qwen3.to_hf(config)) == config
    assert qwen3.from_hf({**upper, "use_sliding_window": False}).pattern == ("global",)


def test_mistral_without_a_window_stays_mistral():
    """Its values are LLaMA's; only its name tells which class to write."""
    config = mistral.PRESETS["mistral_7b_v03"]
    assert llm.family_of(config) == "mistral"
    assert llm.family_of(dataclasses.replace(config, public=None)) == "llama"
    with pytest.raises(ValueError, match=r"no public family \(mistral\) holds a decoder with qkv_bias=True"):
        llm.family_of(dataclasses.replace(config, qkv_bias=True))


def test_yarn_as_public_configs_write_it():
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = qwen3.from_hf({"rope_theta": 1e6, "rope_scaling": given})
    assert config.rope_scaling == RopeScaling(kind="yarn", factor=4.0, original_context=32768)
    assert config.rope_scaling.magnitude == pytest.approx(1.1386294361)
    weighed = qwen3.from_hf({"rope_scaling": {**given, "mscale": 2.0, "mscale_all_dim": 1.0}})
    assert weighed.rope_scaling.magnitude == pytest.approx(1.2772588722 / 1.1386294361)
    fixed = qwen3.from_hf({"rope_scaling": {**given, "attention_factor": 1.0, "truncate": False, "beta_fast": 16}})
    assert (fixed.rope_scaling.magnitude, fixed.rope_scaling.truncate, fixed.rope_scaling.beta_fast) == (1.0, False, 16)
    for each in (config, weighed, fixed):
        assert qwen3.from_hf(qwen3.to_hf(each)) == each


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (llama, {"attention_bias": True}, r"attention_bias is True.*supported: False"),
        (llama, {"mlp_bias": True}, r"mlp_bias is True.*supported: False"),
        (llama, {"hidden_act": "gelu"}, r"hidden_act is 'gelu'.*supported: 'silu'"),
        (llama, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling.rope_type is 'dynamic'.*'linear'"),
        (llama, {"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters.rope_type is 'longrope'"),
        (
            qwen3,
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            r"'yarn' lacks original_max_position_embeddings",
        ),
        (llama, {"rope_scaling": {"type": "linear"}}, r"rope_scaling of type 'linear' lacks factor"),
        (llama, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"lacks low_freq_factor, high_freq_factor"),
        (llama, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5.*supported: 1.0"),
        (qwen2, {"use_sliding_window": True}, r"use_sliding_window is True.*supported: False"),
        (qwen2, {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types is 'sliding_attention'"),
        (gemma, {"hidden_act": "silu"}, r"hidden_act is 'silu'.*supported: 'gelu_pytorch_tanh', 'gelu'"),
        (gemma, {"use_bidirectional_attention": True}, r"use_bidirectional_attention is True.*supported: False"),
        (gemma2, {"hidden_activation": "gelu"}, r"hidden_activation is 'gelu'.*supported: 'gelu_pytorch_tanh'"),
        (gemma2, {"layer_types": ["full_attention"]}, r"layer_types names 1 layers, but num_hidden_layers is 26"),
        (gemma3, {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50.0.*supported: None"),
        (gemma3, {"rope_parameters": {"rope_theta": 1e6}}, r"rope_parameters has \['rope_theta'\]; Gemma 3 nests it"),
        (
            gemma3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            r"sliding_attention.rope_type is 'linear'.*supported: 'default'",
        ),
        (qwen3, {"attention_bias": True}, r"attention_bias is True.*supported: False"),
        (qwen3, {"layer_types": ["sliding_attention"] * 32}, r"layer_types has sliding_attention, but use_sliding_win"),
        (
            mistral,
            {"layer_types": ["full_attention"]},
            r"layer_types is 'full_attention'.*supported: 'sliding_attention'",
        ),
        (opt, {"enable_bias": False}, r"enable_bias is False.*supported: True"),
        (opt, {"layer_norm_elementwise_affine": False}, r"layer_norm_elementwise_affine is False.*supported: True"),
        (opt, {"activation_function": "mish"}, r"activation_function is 'mish'.*'relu'"),
        (gpt2, {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx is True"),
        (gpt2, {"add_cross_attention": True}, r"add_cross_attention is True.*supported: False"),
        (gpt_neox, {"attention_bias": False}, r"attention_bias is False.*supported: True"),
        (gpt_neox, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling.rope_type is 'dynamic'"),
        (mpt, {"attn_config": {"qk_ln": True}}, r"attn_config.qk_ln is True.*supported: False"),
        (mpt, {"attn_config": {"alibi": False}}, r"attn_config.alibi is False.*supported: True"),
        (mpt, {"no_bias": False}, r"no_bias is False.*supported: True"),
        (mpt, {"expansion_ratio": 2}, r"expansion_ratio is 2.*supported: 4"),
        (mpt, {"logit_scale": "inv_sqrt_d_model"}, r"logit_scale is 'inv_sqrt_d_model'.*supported: None"),
        (glm, {"hidden_act": "gelu"}, r"hidden_act is 'gelu'.*supported: 'silu'"),
        (chatglm, {"position_encoding_2d": True, "pre_seq_len": 128}, r"pre_seq_len is 128.*supported: None"),
        (chatglm, {"inner_hidden_size": 8, "quantization_bit": 4}, r"quantization_bit is 4.*supported: 0"),
        (chatglm, {"rmsnorm": False}, r"rmsnorm is False.*supported: True"),
        (chatglm, {"rope_ratio": 50}, r"rope_ratio is 50.*supported: 1"),
        (qwen, {"no_bias": False}, r"no_bias is False.*supported: True"),
        (qwen, {"kv_channels": 64}, r"kv_channels is 64.*supported: 128"),
        (palm, {"dim": 512, "depth": 2}, r"config.json of a PaLM lacks num_tokens"),
        (gemma2, {"layer_types": ["chunked_attention"] * 26}, r"layer_types is 'chunked_attention'.*'full_attention'"),
    ],
)
def test_what_we_cannot_run_is_an_error(family, change, message):
    with pytest.raises(ValueError, match=message):
        family.from_hf(change)


def test_a_decoder_no_public_class_holds():
    sizes = {"vocab": 9, "width": 8, "depth": 1, "heads": 2, "kv_heads": 2, "mlp_dim": 8}
    with pytest.raises(ValueError, match=r"no public family .*qkv_bias=True and 2 heads of 16"):
        llm.family_of(DecoderConfig(**sizes, qkv_bias=True, head_dim=16))
    with pytest.raises(ValueError, match=r"no public family .*norm='offset_rms' and 2 heads of 4"):
        llm.family_of(DecoderConfig(**sizes, norm="offset_rms"))
    with pytest.raises(ValueError, match=r"public='gemma7' is no public family.*llama, mistral, qwen2"):
        llm.family_of(DecoderConfig(**sizes, public="gemma7"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": ("local",)}, r"pattern=\('local',\) and window=None: local layers, and only they"),
        ({"window": 4}, r"pattern=\('global',\) and window=4"),
        ({"pattern": ()}, r"pattern=\(\): a tuple of 'global' and 'local'"),
        ({"pattern": ("sliding",), "window": 4}, r"pattern=\('sliding',\): a tuple of"),
        ({"pattern": ("local",), "window": 0}, r"window=0: a local layer sees at least its own position"),
        ({"local_theta": 1e4}, r"local_theta=10000.0 rotates local layers, and pattern=\('global',\) has none"),
        ({"rotary_fraction": 0.3}, r"rotary_fraction=0.3 rotates 1 of 4 values of a head"),
        ({"positions": "learned", "rotary_fraction": 0.5}, r"positions='learned': only 'rotary' ones have rotary_frac"),
        ({"position_offset": 2}, r"positions='rotary': only 'learned' ones have position_offset"),
        ({"order": "parallel", "post_norms": True}, r"post_norms=True with order='parallel': only order='pre'"),
        ({"residual_scale": 2.0}, r"residual_scale=2.0 with order='pre': only 'normed' scales sums"),
        ({"rotary_pairs": "halves", "rotary_fraction": 0.5}, r"rotary_pairs='halves' with rotary_fraction=0.5"),
        ({"clip_qkv": 0.0}, r"clip_qkv=0.0: values are cut to \[-clip, clip\]; None leaves them"),
        ({"final_softcap": 0.0}, r"final_softcap=0.0: scores are bent into .*None leaves them"),
    ],
)
def test_values_that_cannot_go_together(change, message):
    sizes = {"vocab": 9, "width": 8, "depth": 1, "heads": 2, "kv_heads": 2, "mlp_dim": 8}
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**sizes, **change)


def test_a_word_that_is_none_of_the_choices():
    """The tests check annotations and would stop it earlier; nothing else does."""
    config = DecoderConfig(vocab=9, width=8, depth=1, heads=2, kv_heads=2, mlp_dim=8)
    object.__setattr__(config, "order", "paralel")
    with pytest.raises(ValueError, match="order='paralel' is none of pre, post, normed, parallel, parallel_shared"):
        config.__post_init__()


def test_a_tied_head_has_no_row_and_biases_have():
    tied, plain = llama.PRESETS["llama32_1b"], llama.PRESETS["llama3_8b"]
    assert "lm_head.weight" not in {row.theirs for row in llama.rows(tied)}
    assert "lm_head.weight" in {row.theirs for row in llama.rows(plain)}
    assert "model.layers.3.self_attn.k_proj.bias" in {row.theirs for row in qwen2.rows(qwen2.PRESETS["qwen2_7b"])}
    assert not any(row.theirs.endswith(".bias") for row in llama.rows(plain))
