"""Models whose code the torch library lacks: a class of its own that computes the same, or a second one of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lvlm_jax.llm import chatglm, chatglm_6b, family_of, palm, qwen
from lvlm_jax.llm.decoder import Decoder, dummy_inputs
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.linear import abstract
from tests.parity import compare
from tests.parity.chatglm_reference import ChatGLM
from tests.parity.palm_reference import PaLM
from tests.parity.test_decoders import plain, scores, tokens

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": None,
}


def check(model, theirs, family, public, what):
    """Their tensors under their names, through our table, give the reference's numbers with every weight read."""
    config = family.from_hf(public)
    assert family_of(config) == public["model_type"]
    assert family.from_hf(family.to_hf(config)) == config
    decoder = Decoder(config)
    shapes, _ = abstract(decoder, jnp.zeros((1, 4), jnp.int32), *plain(1, 4), method=scores)
    params = compare.load(family.rows(config, ""), theirs, shapes)
    ids = tokens()
    with torch.no_grad():
        out = model(torch.tensor(ids))
    run = jax.jit(lambda p: decoder.apply({"params": p}, jnp.asarray(ids), *plain(*ids.shape), method=scores))
    compare.close(run(params), getattr(out, "logits", out), what)
    assert compare.dead(run, params) == set()


def renamed(state, names):
    """The tensors of `state` under other names, several of them one after the other; none is left out."""
    out = {new: np.concatenate([state.pop(old) for old in olds]) for new, olds in names.items()}
    assert not state
    return out


@pytest.mark.parametrize("groups", [1, 2])
def test_chatglm2_and_3(groups):
    torch.manual_seed(0)
    config = GlmConfig(**SIZES, num_key_value_heads=groups, head_dim=16, rms_norm_eps=1e-5)
    model = compare.perturb(GlmForCausalLM(config))
    names = {
        "transformer.embedding.word_embeddings.weight": ["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": ["model.norm.weight"],
        "transformer.output_layer.weight": ["lm_head.weight"],
    }
    for i in range(2):
        new, old = f"transformer.encoder.layers.{i}", f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[f"{new}.{norm}.weight"] = [f"{old}.{norm}.weight"]
        for kind in ("weight", "bias"):
            three = [f"{old}.self_attn.{x}_proj.{kind}" for x in "qkv"]
            names[f"{new}.self_attention.query_key_value.{kind}"] = three
        names[f"{new}.self_attention.dense.weight"] = [f"{old}.self_attn.o_proj.weight"]
        names[f"{new}.mlp.dense_h_to_4h.weight"] = [f"{old}.mlp.gate_up_proj.weight"]
        names[f"{new}.mlp.dense_4h_to_h.weight"] = [f"{old}.mlp.down_proj.weight"]
    public = {
        "model_type": "chatglm",
        "padded_vocab_size": 99,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_layers": 2,
        "num_attention_heads": 4,
        "multi_query_attention": True,
        "multi_query_group_num": groups,
        "kv_channels": 16,
        "seq_length": 40,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
    }
    check(model, renamed(compare.tensors(model), names), chatglm, public, f"ChatGLM2, {groups} groups")


def test_qwen():
    torch.manual_seed(0)
    model = compare.perturb(Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=4)))
    names = {"transformer.wte.weight": ["model.embed_tokens.weight"], "transformer.ln_f.weight": ["model.norm.weight"]}
    names["lm_head.weight"] = ["lm_head.weight"]
    for i in range(2):
        new, old = f"transformer.h.{i}", f"model.layers.{i}"
        for kind in ("weight", "bias"):
            names[f"{new}.attn.c_attn.{kind}"] = [f"{old}.self_attn.{x}_proj.{kind}" for x in "qkv"]
        pairs = {
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "mlp.w1": "mlp.up_proj",
            "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj",
        }
        names |= {f"{new}.{x}.weight": [f"{old}.{y}.weight"] for x, y in pairs.items()}
    public = {
        "model_type": "qwen",
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "seq_length": 40,
        "layer_norm_epsilon": model.config.rms_norm_eps,
    }
    check(model, renamed(compare.tensors(model), names), qwen, public, "Qwen v1")


def test_palm():
    torch.manual_seed(0)
    sizes = {"num_tokens": 99, "dim": 32, "depth": 2, "heads": 3, "dim_head": 16, "ff_mult": 2}
    model = compare.perturb(PaLM(**sizes))
    check(model, compare.tensors(model), palm, {"model_type": "palm", "max_seq_len": 40, **sizes}, "PaLM")


def first_chatglm():
    """(reference, our decoder, its parameters)."""
    torch.manual_seed(0)
    model = compare.perturb(ChatGLM(vocab=99, width=32, layers=3, heads=2, hidden=48), factor=3.0)
    config = chatglm.from_hf(
        {
            "model_type": "chatglm",
            "position_encoding_2d": True,
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 3,
            "num_attention_heads": 2,
            "inner_hidden_size": 48,
            "max_sequence_length": 40,
        }
    )
    assert family_of(config) == "chatglm_6b"
    decoder = Decoder(config)
    _, *rest = dummy_inputs(config)
    shapes, _ = abstract(decoder, jnp.zeros((1, 2), jnp.int32), *rest, method=scores)
    return model, decoder, compare.load(chatglm_6b.rows(config, ""), compare.tensors(model), shapes)


LENGTH, CONTEXT, MASK = 20, np.array([7, 12]), np.array([6, 4])
"""Two rows; what follows the first context is written at its end, what follows the second for a place inside it."""


def counted():
    places = np.broadcast_to(np.arange(LENGTH), (2, LENGTH))
    positions = chatglm_6b.count(jnp.asarray(places), jnp.asarray(CONTEXT)[:, None], jnp.asarray(MASK)[:, None])
    seen = R.packed_prefix(jnp.ones((2, LENGTH), jnp.int32), jnp.asarray(places < CONTEXT[:, None]))
    return positions, seen


def test_the_first_chatglm():
    model, decoder, params = first_chatglm()
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        expected = model(torch.tensor(ids), CONTEXT.tolist(), MASK.tolist())
    run = jax.jit(lambda p: decoder.apply({"params": p}, jnp.asarray(ids), *counted(), method=scores))
    compare.close(run(params), expected, "ChatGLM-6B")
    assert compare.dead(run, params) == set()


def test_positions_counted_once_are_refused():
    _, decoder, params = first_chatglm()
    with pytest.raises(ValueError, match=r"positions of shape \(1, 4\): this decoder .*'halves'.* takes \[B, T, 2\]"):
        decoder.apply({"params": params}, jnp.zeros((1, 4, 32)), *plain(1, 4))
