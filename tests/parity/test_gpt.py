"""OPT, GPT-2, GPT-NeoX, MPT, GLM-4: learned positions, ALiBi, parallel branches, both orders of norms; every weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from lvlm_jax import params as P
from lvlm_jax.llm import FAMILIES
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.positions import alibi
from tests.parity import compare
from tests.parity.test_decoders import make, plain, scores, tokens

pytestmark = pytest.mark.slow

HIDDEN = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# The reference computes no gradient for the embedding of a padding token, and OPT's default is token 1.
OPT = {**HIDDEN, "ffn_dim": 48, "max_position_embeddings": 40, "pad_token_id": None}
NEOX = {**HIDDEN, "intermediate_size": 48, "max_position_embeddings": 40}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
MPT = {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 40}
GLM = {**NEOX, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e3, "partial_rotary_factor": 0.75}
CASES = {
    "opt": (OPTForCausalLM, OPTConfig, OPT),
    "opt, 350m's order and table": (
        OPTForCausalLM,
        OPTConfig,
        {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "opt, old, untied": (
        OPTForCausalLM,
        OPTConfig,
        {**OPT, "_remove_final_layer_norm": True, "tie_word_embeddings": False, "activation_function": "gelu"},
    ),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, NEOX),
    "gpt_neox, one after the other": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        {**NEOX, "use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_fast"},
    ),
    "gpt_neox, scaled": (GPTNeoXForCausalLM, GPTNeoXConfig, {**NEOX, "rope_parameters": LINEAR}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "gpt2, untied, narrow feed-forward": (
        GPT2LMHeadModel,
        GPT2Config,
        {**GPT2, "n_inner": 48, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    ),
    "mpt": (MptForCausalLM, MptConfig, MPT),
    "mpt, six heads, clipped": (
        MptForCausalLM,
        MptConfig,
        {**MPT, "d_model": 48, "n_heads": 6, "attn_config": {"clip_qkv": 0.9}},
    ),
    "glm": (GlmForCausalLM, GlmConfig, GLM),
    "glm, no biases, tied": (
        GlmForCausalLM,
        GlmConfig,
        {**GLM, "attention_bias": False, "tie_word_embeddings": True, "partial_rotary_factor": 0.25},
    ),
    "glm4": (Glm4ForCausalLM, Glm4Config, GLM),
}


@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    model, decoder, _, _, params = make(case, CASES)
    ids = tokens()
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits
    run = jax.jit(lambda p: decoder.apply({"params": p}, jnp.asarray(ids), *plain(*ids.shape), method=scores))
    compare.close(run(params), expected, case)
    assert compare.dead(run, params) == set()


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "case", ["opt", "opt, 350m's order and table", "gpt_neox", "gpt2", "mpt, six heads, clipped", "glm4"]
)
def test_padding(case, side):
    model, decoder, _, _, params = make(case, CASES)
    ids, mask = tokens(3, 12), np.ones((3, 12), np.int32)
    for row, gap in enumerate((0, 3, 7)):
        mask[row, slice(0, gap) if side == "left" else slice(12 - gap, 12)] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions))
    inputs = jnp.asarray(ids), jnp.asarray(positions), R.packed_causal(jnp.asarray(mask))
    ours = jax.jit(lambda p: decoder.apply({"params": p}, *inputs, method=scores))(params)
    shown = mask > 0
    compare.close(np.asarray(ours)[shown], expected.logits.numpy()[shown], f"{case}, padded on the {side}")


@pytest.mark.parametrize(
    "case", ["gpt2", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gpt_neox", "glm"))]
)
def test_packing(case):
    """Three examples a row; the reference finds their borders where positions begin anew."""
    model, decoder, _, _, params = make(case, CASES)
    ids = tokens(2, 24)
    lengths = [[9, 13, 2], [3, 1, 20]]
    positions = np.array([[i for n in row for i in range(n)] for row in lengths], np.int32)
    segments = np.array([[k + 1 for k, n in enumerate(row) for _ in range(n)] for row in lengths], np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids), position_ids=torch.tensor(positions), use_cache=False).logits
    inputs = jnp.asarray(ids), jnp.asarray(positions), R.packed_causal(jnp.asarray(segments))
    ours = jax.jit(lambda p: decoder.apply({"params": p}, *inputs, method=scores))(params)
    compare.close(ours, expected, f"{case}, packed")


@pytest.mark.nightly
@pytest.mark.parametrize("case", ["opt, 350m's order and table", "gpt_neox", "gpt2", "mpt, six heads, clipped", "glm4"])
def test_gradients(case):
    model, decoder, rows, unused, params = make(case, CASES)
    ids = tokens()
    pull = np.random.default_rng(1).normal(size=(*ids.shape, 99)).astype(np.float32)
    (model(torch.tensor(ids)).logits * torch.tensor(pull)).sum().backward()
    theirs = compare.gradients(model, unused)
    expected = P.flatten(P.unflatten({k: v for row in rows for k, v in row.load(theirs[row.theirs]).items()}))

    def loss(p):
        return (decoder.apply({"params": p}, jnp.asarray(ids), *plain(*ids.shape), method=scores) * pull).sum()

    ours = P.flatten(jax.jit(jax.grad(loss))(params))
    together = lambda flat: np.concatenate([np.asarray(flat[k]).ravel() for k in sorted(flat)])  # noqa: E731
    compare.close(together(ours), together(expected), f"{case}, gradients of all weights")


@pytest.mark.parametrize("case", CASES)
def test_a_config_goes_out_and_comes_back(case):
    _, config, changes = CASES[case]
    theirs = config(**changes)
    family = FAMILIES[theirs.model_type]
    ours = family.from_hf(theirs.to_dict())
    public = family.to_hf(ours)
    assert family.from_hf(public) == ours
    again = config(**public).to_dict()
    # Other words for the same: the tanh form of GELU, what is half of a nested value, the default of a width.
    words = ("hidden_act", "activation_function", "n_inner", "architectures")
    for name, value in theirs.to_dict().items():
        assert name in words or name not in public or again[name] == value, name


@pytest.mark.parametrize("top", [4, 8, 16])
@pytest.mark.parametrize("heads", [4, 6, 16, 25])
def test_slopes(heads, top):
    """The reference's biases of all keys for one query; its class itself takes 8 whatever the config says."""
    expected = build_mpt_alibi_tensor(heads, 20, top)
    ours = alibi(jnp.array([19]), 20, heads, float(top))
    compare.close(ours, expected, f"ALiBi of {heads} heads to {top}")
