"""Every family of decoders: its parts, rotary scalings, tied heads, padding, packing; gradients of every weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

from lvlm_jax import params as P
from lvlm_jax.keymap import check
from lvlm_jax.llm import FAMILIES, family_of
from lvlm_jax.llm.decoder import Decoder
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.linear import abstract
from tests.parity import compare

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "truncate": True,
}
# The reference computes no gradient for the embedding of a padding token, and Gemma's default is token 0.
GEMMA = {"head_dim": 16, "pad_token_id": None}
# Windows that most positions of a row reach past, and caps that bend most scores.
GEMMA2 = {
    **GEMMA,
    "num_hidden_layers": 3,
    "sliding_window": 7,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = {
    **GEMMA,
    "num_hidden_layers": 3,
    "sliding_window": 7,
    "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
UPPER = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
CASES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, one kv head a head": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "llama, head width set": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16, "rms_norm_eps": 1e-5}),
    "llama, linear scaling": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LINEAR}),
    "llama, llama3 scaling": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama, yarn scaling": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN, "head_dim": 16}),
    "llama, tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "gemma": (GemmaForCausalLM, GemmaConfig, GEMMA | {"num_key_value_heads": 1}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 7}),
    "mistral, no window": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen3, tied, windows above": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"tie_word_embeddings": True, "head_dim": 16} | UPPER,
    ),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GEMMA3),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA2),
    "gemma2, no caps": (
        Gemma2ForCausalLM,
        Gemma2Config,
        GEMMA2
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": ["full_attention"] * 3},
    ),
}


def make(case, cases=CASES):
    torch.manual_seed(0)
    model, config, changes = cases[case]
    model = compare.perturb(model(config(**SIZES | changes)))
    public = model.config.to_dict()
    config = FAMILIES[public["model_type"]].from_hf(public)
    decoder = Decoder(config)
    shapes, _ = abstract(decoder, jnp.zeros((1, 4), jnp.int32), *plain(1, 4), method=scores)
    # GPT-NeoX's head has another name on disk.
    rows = FAMILIES[family_of(config)].rows(config, "", head="lm_head.weight")
    # In memory a tied head is listed twice.
    unused = ("lm_head.weight",) if config.tied else ()
    return model, decoder, rows, unused, compare.load(rows, compare.tensors(model, unused), shapes)


def scores(decoder, tokens, positions, ranges):
    return decoder.logits(decoder(decoder.embed_tokens(tokens), positions, ranges)[0])


def plain(rows, length):
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)), R.causal(rows, length)


def tokens(rows=2, length=24):
    return np.random.default_rng(0).integers(0, 99, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    model, decoder, _, _, params = make(case)
    ids = tokens()
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits
    run = jax.jit(lambda p: decoder.apply({"params": p}, jnp.asarray(ids), *plain(*ids.shape), method=scores))
    compare.close(run(params), expected, case)
    assert compare.dead(run, params) == set()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "gemma3"])
def test_padding(case, side):
    model, decoder, _, _, params = make(case)
    ids, mask = tokens(3, 12), np.ones((3, 12), np.int32)
    for row, gap in enumerate((0, 3, 7)):
        mask[row, slice(0, gap) if side == "left" else slice(12 - gap, 12)] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids), torch.tensor(mask), position_ids=torch.tensor(positions)).logits
    ours = decoder.apply(
        {"params": params}, jnp.asarray(ids), jnp.asarray(positions), R.packed_causal(jnp.asarray(mask)), method=scores
    )
    shown = mask > 0
    compare.close(np.asarray(ours)[shown], expected.numpy()[shown], f"{case}, padded on the {side}")


@pytest.mark.parametrize("case", ["qwen2", "qwen3, tied, windows above", "mistral", "gemma2", "gemma3"])
def test_packing(case):
    """Three examples a row; the reference finds their borders where positions begin anew."""
    model, decoder, _, _, params = make(case)
    ids = tokens(2, 24)
    lengths = [[9, 13, 2], [3, 1, 20]]
    positions = np.array([[i for n in row for i in range(n)] for row in lengths], np.int32)
    segments = np.array([[k + 1 for k, n in enumerate(row) for _ in range(n)] for row in lengths], np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids), position_ids=torch.tensor(positions), use_cache=False).logits
    ranges = R.packed_causal(jnp.asarray(segments))
    ours = decoder.apply({"params": params}, jnp.asarray(ids), jnp.asarray(positions), ranges, method=scores)
    compare.close(ours, expected, f"{case}, packed")


@pytest.mark.parametrize("length", [5, 12])
def test_pictures_that_see_themselves_whole(length):
    """Gemma 3's blocks amid causal text, shorter and longer than the window of its local layers."""
    torch.manual_seed(0)
    text = Gemma3TextConfig(**SIZES | GEMMA3)
    tower = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=7
    )
    words = {"image_token_index": 98, "boi_token_index": 97, "eoi_token_index": 96}
    whole = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, **words)
    model = compare.perturb(Gemma3ForConditionalGeneration(whole))
    config = FAMILIES["gemma3_text"].from_hf(text.to_dict())
    rows = FAMILIES["gemma3_text"].rows(config, "", "model.language_model.")
    theirs = compare.tensors(model)
    flat = {path: leaf for row in rows for path, leaf in row.load(theirs[row.theirs]).items()}
    params = jax.tree.map(jnp.asarray, P.unflatten(flat))
    ids = np.random.default_rng(0).integers(1, 96, (2, 24)).astype(np.int32)
    blocks = np.zeros((2, 24), np.int32)
    blocks[0, 3 : 3 + length] = 1
    blocks[1, 1 : 1 + length], blocks[1, 16:20] = 1, 2
    kinds = torch.tensor((blocks > 0).astype(np.int64))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids), token_type_ids=kinds).logits
    positions, _ = plain(2, 24)
    ranges = R.packed_blocks(jnp.ones((2, 24), jnp.int32), jnp.asarray(blocks))
    ours = Decoder(config).apply({"params": params}, jnp.asarray(ids), positions, ranges, method=scores)
    compare.close(ours, expected, f"gemma3, blocks of {length}")


@pytest.mark.parametrize("case", ["llama, llama3 scaling", "qwen2, tied", "gemma2", "gemma3"])
def test_gradients(case):
    model, decoder, rows, unused, params = make(case)
    ids = tokens()
    pull = np.random.default_rng(1).normal(size=(*ids.shape, 99)).astype(np.float32)
    (model(torch.tensor(ids)).logits * torch.tensor(pull)).sum().backward()
    expected = P.unflatten(
        {k: v for row in rows for k, v in row.load(compare.gradients(model, unused)[row.theirs]).items()}
    )

    def loss(p):
        return (decoder.apply({"params": p}, jnp.asarray(ids), *plain(*ids.shape), method=scores) * pull).sum()

    ours, expected = P.flatten(jax.jit(jax.grad(loss))(params)), P.flatten(expected)
    together = lambda flat: np.concatenate([np.asarray(flat[k]).ravel() for k in sorted(flat)])  # noqa: E731
    compare.close(together(ours), together(expected), f"{case}, gradients of all weights")


def test_a_config_goes_out_and_comes_back():
    for case, (_, config, changes) in CASES.items():
        public = config(**SIZES | changes).to_dict()
        family = FAMILIES[public["model_type"]]
        ours = family.from_hf(public)
        assert family.from_hf(family.to_hf(ours)) == ours, case
        theirs = config(**family.to_hf(ours))
        for name in (*SIZES, "rms_norm_eps", "tie_word_embeddings", "rope_parameters"):
            assert getattr(theirs, name) == getattr(config(**SIZES | changes), name), (case, name)


def test_a_table_for_another_size_lists_what_is_missing():
    _, decoder, _, _, _ = make("llama")
    deeper = dataclasses.replace(decoder.config, depth=3)
    shapes, _ = abstract(Decoder(deeper), jnp.zeros((1, 4), jnp.int32), *plain(1, 4), method=scores)
    rows = FAMILIES["llama"].rows(deeper, "")
    small = [row.theirs for row in FAMILIES["llama"].rows(decoder.config, "")]
    with pytest.raises(ValueError, match=r"model\.layers\.2\.input_layernorm\.weight"):
        check(rows, P.flatten(shapes), small, "folder")
