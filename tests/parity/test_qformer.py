"""The Q-Former against BLIP-2's and InstructBLIP's, under each of its three masks."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from lvlm_jax.connectors import QFormer, qformer
from lvlm_jax.nn.linear import abstract
from tests import tiny
from tests.parity import compare

pytestmark = pytest.mark.slow

QUERIES, WIDTH = 6, 32
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "encoder_hidden_size": WIDTH,
    "vocab_size": 99,
    "max_position_embeddings": 16,
}
SEGMENTS = np.array([[1] * 7, [1] * 4 + [0] * 3, [1] * 1 + [0] * 6], np.int32)
"""Texts of 7, 4 and 1 tokens, padded on the right."""


def inputs():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 17, WIDTH)).astype(np.float32)
    return features, rng.integers(1, 99, SEGMENTS.shape).astype(np.int32), rng.normal(size=(1, QUERIES, 24))


class Reference(torch.nn.Module):
    """The torch library's Q-Former with the query tokens that its models keep outside, and BLIP-2's embeddings."""

    def __init__(self, model, queries, embeddings=None):
        super().__init__()
        self.qformer, self.query_tokens = model, torch.nn.Parameter(torch.tensor(queries, dtype=torch.float32))
        if embeddings is not None:
            self.embeddings = embeddings


def reference(kind):
    torch.manual_seed(0)
    queries = inputs()[2]
    if kind == "instructblip":
        model = InstructBlipQFormerModel(InstructBlipQFormerConfig(**SIZES))
        return compare.perturb(Reference(model, queries))
    sizes = SIZES | ({"num_hidden_layers": 2, "use_qformer_text_input": True} if kind == "text" else {})
    config = Blip2QFormerConfig(**sizes)
    embeddings = None
    if kind == "text":
        embeddings = torch.nn.Module()
        embeddings.word_embeddings = torch.nn.Embedding(99, 24)
        embeddings.position_embeddings = torch.nn.Embedding(16, 24)
    return compare.perturb(Reference(Blip2QFormerModel(config), queries, embeddings))


def ours(model, layout):
    config = qformer.from_hf(model.qformer.config.to_dict(), QUERIES)
    module = QFormer(config)
    shapes, _ = abstract(module, jnp.zeros((1, 2, WIDTH)))
    return module, compare.load(
        qformer.rows(config, "qformer", "", layout), compare.tensors(model), {"qformer": shapes}
    )


def check(model, layout, what, expected, shown, *args, pattern="together"):
    """Values at the shown positions; returns the weights and what runs them."""
    module, params = ours(model, layout)
    run = tiny.jit(lambda p: module.apply({"params": p["qformer"]}, *args, pattern=pattern)[shown])
    compare.close(run(params), expected[torch.tensor(shown)], what)
    return run, params


def test_queries_alone():
    model, (features, _, _) = reference("blip_2"), inputs()
    with torch.no_grad():
        queries = model.query_tokens.expand(3, -1, -1)
        expected = model.qformer(query_embeds=queries, encoder_hidden_states=torch.tensor(features)).last_hidden_state
    check(model, "blip_2", "BLIP-2's Q-Former", expected, np.ones((3, QUERIES), bool), jnp.asarray(features))


def test_an_instruction_beside_the_queries():
    model, (features, text, _) = reference("instructblip"), inputs()
    shown = np.concatenate([np.ones((3, QUERIES), bool), SEGMENTS > 0], 1)
    with torch.no_grad():
        expected = model.qformer(
            input_ids=torch.tensor(text),
            attention_mask=torch.tensor(shown.astype(np.int64)),
            query_embeds=model.query_tokens.expand(3, -1, -1),
            encoder_hidden_states=torch.tensor(features),
        ).last_hidden_state
    args = (jnp.asarray(features), jnp.asarray(text), jnp.asarray(SEGMENTS))
    run, params = check(model, "instructblip", "InstructBLIP's Q-Former", expected, shown, *args)
    unread = compare.dead(run, params)
    assert {path for path in unread if not path.endswith("k/bias")} == set()  # shifts all scores of a query alike


def masks(pattern):
    """Who sees whom [B, S, S], written position by position."""
    real = np.concatenate([np.ones((3, QUERIES), int), SEGMENTS], 1)
    mask = np.zeros((3, real.shape[1], real.shape[1]), bool)
    for b, t, s in np.ndindex(mask.shape):
        query, key = t < QUERIES, s < QUERIES
        rule = {"apart": query == key, "together": True, "causal": key or (not query and s <= t)}
        mask[b, t, s] = real[b, s] and rule[pattern]
    return mask, real > 0


@pytest.mark.parametrize("pattern", qformer.PATTERNS)
def test_queries_and_text_under_each_mask(pattern):
    model, (features, text, _) = reference("text"), inputs()
    mask, shown = masks(pattern)
    with torch.no_grad():
        words = model.embeddings.word_embeddings(torch.tensor(text)) + model.embeddings.position_embeddings.weight[:7]
        expected = model.qformer(
            query_embeds=torch.cat([model.query_tokens.expand(3, -1, -1), words], 1),
            query_length=QUERIES,
            attention_mask=torch.tensor(mask[:, None]),
            encoder_hidden_states=torch.tensor(features),
        ).last_hidden_state
    args = (jnp.asarray(features), jnp.asarray(text), jnp.asarray(SEGMENTS))
    check(model, "blip_2", f"Q-Former, {pattern}", expected, shown, *args, pattern=pattern)


def test_a_text_alone():
    model, (_, text, _) = reference("text"), inputs()
    with torch.no_grad():
        words = model.embeddings.word_embeddings(torch.tensor(text)) + model.embeddings.position_embeddings.weight[:7]
        expected = model.qformer(
            query_embeds=words, query_length=0, attention_mask=torch.tensor(SEGMENTS.astype(np.int64))
        ).last_hidden_state
    check(model, "blip_2", "a text alone", expected, SEGMENTS > 0, None, jnp.asarray(text), jnp.asarray(SEGMENTS))
