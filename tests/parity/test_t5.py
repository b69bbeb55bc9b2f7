"""T5 in every form of its parts: logits, loss, gradients of every weight, padding and packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from lvlm_jax import params as P
from lvlm_jax.llm import t5
from lvlm_jax.llm.encoder_decoder import EncoderDecoder
from lvlm_jax.nn.linear import abstract
from lvlm_jax.nn.relative import distance_buckets
from lvlm_jax.train.losses import language_loss
from tests import tiny
from tests.parity import compare

SIZES = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,  # so that rows of twenty reach every bucket
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CASES = {
    "t5": {"tie_word_embeddings": True},
    "flan_t5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "flan_t5 as BLIP-2 runs it": {
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",
        "tie_word_embeddings": False,
    },
    "tied without scale": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
}
TIED = ("t5", "tied without scale")


def reference(name, **sizes):
    """A perturbed model. Its config ties every head (version 5), so that an untied one is put in by hand."""
    torch.manual_seed(0)
    config = T5Config(**SIZES | sizes, **CASES[name])
    model = T5ForConditionalGeneration(config)
    if name not in TIED:
        generator = torch.Generator().manual_seed(7)
        model.lm_head.weight = torch.nn.Parameter(torch.randn(99, 32, generator=generator) * 0.05)
    # Scores have no scale, so that larger matrices would make every softmax a choice of one key.
    compare.perturb(model, factor=1.5)
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(8.0)
    return model


def ours(name, model):
    raw = model.config.to_dict() | {"tie_word_embeddings": name in TIED}
    config = t5.from_hf(raw)
    text = jnp.zeros((1, 2), jnp.int32)
    shapes, _ = abstract(EncoderDecoder(config), jnp.zeros((1, 2, config.width)), text, text, text)
    unused = t5.UNUSED + (("lm_head.weight",) if config.tied else ())
    rows = t5.rows(config, "")
    return EncoderDecoder(config, scan=True), rows, unused, compare.load(rows, compare.tensors(model, unused), shapes)


def inputs():
    """Two rows to read, one padded on the right and one on the left, and their answers, of two lengths."""
    rng = np.random.default_rng(0)
    read = rng.integers(2, 99, (2, 20)).astype(np.int32)
    shown = np.ones((2, 20), np.int32)
    shown[0, 15:], shown[1, :6] = 0, 0
    labels = rng.integers(1, 99, (2, 13)).astype(np.int32)
    given = np.ones((2, 13), np.int32)
    given[1, 9:] = 0
    return read, shown, labels, given


def loss_of(params, module, x, shown, tokens, segments, weights):
    """(mean loss, logits): rows begin with the start token, so that theirs is the plain loss of the next token."""
    run = lambda method, *args: module.apply({"params": params}, *args, method=method)  # noqa: E731
    embeddings = run("embed_tokens", x) if x.ndim == 2 else x
    hidden = run("__call__", embeddings, shown, tokens, segments)
    total, count, _ = language_loss(hidden, run("head_kernel"), tokens, weights)
    return total / count, run("logits", hidden)


plain = tiny.jit(loss_of, static_argnums=1)
grad = tiny.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name):
    """Gradients of every weight of the two released forms."""
    model = reference(name)
    module, rows, unused, params = ours(name, model)
    read, shown, labels, given = inputs()
    out = model(
        input_ids=torch.tensor(read).long(),
        attention_mask=torch.tensor(shown),
        labels=torch.tensor(np.where(given, labels, -100)).long(),
    )
    start = np.zeros((2, 1), np.int32)
    tokens, segments = np.concatenate([start, labels], 1), np.concatenate([start + 1, given], 1)
    weights = np.concatenate([start, given], 1).astype(np.float32)
    args = (P.stack_layers(params), module, *map(jnp.asarray, (read, shown, tokens, segments, weights)))
    if name not in ("t5", "flan_t5"):
        loss, logits = plain(*args)
    else:
        (loss, logits), grads = grad(*args)
        out.loss.backward()
        theirs = compare.gradients(model, unused)
        wanted = P.flatten(P.unflatten({k: v for row in rows for k, v in row.load(theirs[row.theirs]).items()}))
        grads = P.flatten(P.unstack_layers(grads))
        assert all(np.abs(leaf).max() > 0 for leaf in wanted.values())  # nothing is dead, no bucket and no branch
        for part in sorted({key.split("/")[0] for key in wanted}):
            keys = sorted(key for key in wanted if key.startswith(f"{part}/"))
            together = [np.concatenate([np.ravel(flat[key]) for key in keys]) for flat in (grads, wanted)]
            compare.close(*together, f"{name}, gradients of {part}")
    real = given > 0
    compare.close(logits[:, :-1][real], out.logits.detach()[torch.tensor(real)], f"{name}, logits")
    np.testing.assert_allclose(loss, out.loss.item(), rtol=2e-6)


@pytest.mark.slow
def test_embeddings_stand_in_for_tokens_and_packed_rows_equal_rows_alone():
    """What BLIP-2 feeds it; and two examples in one row, as theirs one by one."""
    name = "flan_t5 as BLIP-2 runs it"
    model = reference(name)
    module, _, _, params = ours(name, model)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 9, 32)).astype(np.float32)
    labels = rng.integers(1, 99, (2, 6)).astype(np.int32)
    with torch.no_grad():
        alone = model(inputs_embeds=torch.tensor(x), labels=torch.tensor(labels).long()).logits
    tokens = np.pad(labels[:, :-1], ((0, 0), (1, 0)))
    numbers = lambda each: np.repeat([[1, 2]], each, axis=1)  # noqa: E731
    pad = ((0, 0), (0, 3))
    packed = np.pad(x.reshape(1, 18, 32), (*pad, (0, 0))), np.pad(numbers(9), pad)
    written = np.pad(tokens.reshape(1, 12), pad), np.pad(numbers(6), pad)
    args = [jnp.asarray(a) for a in (*packed, *written, np.ones((1, 15), np.float32))]
    logits = plain(P.stack_layers(params), module, *args)[1]
    compare.close(logits[0, :12].reshape(2, 6, 99), alone, "packed soft tokens, logits")


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 12), (64, 100)])
def test_every_distance_falls_into_their_bucket(buckets, furthest):
    distance = np.arange(furthest + 40)
    for both in (True, False):
        theirs = T5Attention._relative_position_bucket(-torch.tensor(distance), both, buckets, furthest)
        table = distance_buckets(buckets // (1 + both), furthest)
        np.testing.assert_array_equal(table[np.minimum(distance, furthest)], theirs)


@pytest.mark.parametrize("name", CASES)
def test_config_goes_out_and_comes_back(name):
    """Through their class, which fills in what it assumes."""
    public = T5Config(**SIZES, **CASES[name]).to_dict()
    config = t5.from_hf(public | {"tie_word_embeddings": name in TIED})
    assert (config.tied, config.scale_output) == (name in TIED, name == "t5")
    assert t5.from_hf(t5.to_hf(config)) == config
    theirs = T5Config.from_dict(t5.to_hf(config))
    assert (theirs.dense_act_fn, theirs.is_gated_act) == (public["dense_act_fn"], public["is_gated_act"])
    assert theirs.scale_decoder_outputs == config.scale_output
    assert dataclasses.replace(config, tied=True) == t5.from_hf(theirs.to_dict())
