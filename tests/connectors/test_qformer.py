"""The Q-Former: what its queries and texts see, its config both ways, the authors' names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.connectors import QFormer, QFormerConfig, pformer, qformer
from lvlm_jax.nn.linear import abstract
from lvlm_jax.recipe import load
from tests import tiny

CONFIG = QFormerConfig(queries=3, width=16, depth=4, heads=2, mlp_dim=24, vocab=20, context=8)
FEATURES = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
TEXT = np.random.default_rng(1).integers(0, 20, (2, 4)).astype(np.int32)


@tiny.jit
def states(params, features, text):
    return QFormer(CONFIG).apply({"params": params}, features, text, None, "causal")


def test_generating_queries_read_the_picture_and_no_text():
    params = tiny.randomize(abstract(QFormer(CONFIG), jnp.zeros((1, 2, 12)))[0])
    base = np.asarray(states(params, FEATURES, TEXT))
    moved = lambda *args: np.abs(np.asarray(states(params, *args)) - base).max(-1) > 1e-6  # noqa: E731
    text = TEXT.copy()
    text[0, 2] = (text[0, 2] + 1) % 20
    expected = np.zeros(base.shape[:2], bool)
    expected[0, 3 + 2 :] = True  # the third word and what follows
    np.testing.assert_array_equal(moved(FEATURES, text), expected)
    picture = FEATURES.copy()
    picture[1, 4] += 1
    expected[:] = [[False], [True]]  # every query, and through them every word
    np.testing.assert_array_equal(moved(picture, TEXT), expected)


@pytest.mark.parametrize(
    ("change", "features", "text", "message"),
    [
        ({}, True, TEXT[:, :1].repeat(9, 1), "9 tokens, but this Q-Former's texts have context=8 positions"),
        ({"vocab": None}, True, TEXT, "a text, but this Q-Former has no vocabulary"),
        ({}, False, None, "reads features, a text, or both; here neither is given"),
    ],
)
def test_what_it_cannot_read(change, features, text, message):
    module = QFormer(QFormerConfig(**{**vars(CONFIG), **change}))
    params = abstract(module, jnp.zeros((1, 2, 12)))[0]
    given = [None if x is None else jnp.asarray(x) for x in (FEATURES if features else None, text)]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: module.apply({"params": p}, *given), params)


def test_a_connector_that_reads_an_instruction_is_given_one():
    connector = CONFIG.build(32, jnp.float32)
    params = abstract(connector, jnp.zeros((1, 2, 12)))[0]
    run = lambda *args: jax.eval_shape(lambda p: connector.apply({"params": p}, *args), params)  # noqa: E731
    assert run(jnp.asarray(FEATURES), jnp.asarray(TEXT)).shape == (2, 3, 32)
    with pytest.raises(ValueError, match=r"reads an instruction beside the picture \(vocab=20\), and none is given"):
        run(jnp.asarray(FEATURES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "depth=3 does not divide into groups of cross_every=2 layers"),
        ({"cross_every": 0}, "depth=4 does not divide into groups of cross_every=0 layers"),
        ({"heads": 3}, "width=16 does not divide into heads=3"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        QFormerConfig(**{**vars(CONFIG), **change})
    if "heads" in change:
        with pytest.raises(ValueError, match=message):
            pformer.PFormerConfig(width=16, heads=3)


@pytest.mark.parametrize("kind", qformer.TYPES)
def test_config_goes_out_and_comes_back(kind):
    public = qformer.to_hf(CONFIG, 12, kind)
    assert (public["model_type"], public["encoder_hidden_size"]) == (kind, 12)
    assert qformer.from_hf(public, 3) == CONFIG
    silent = QFormerConfig(**{**vars(CONFIG), "vocab": None})
    if kind == "blip_2_qformer":
        assert qformer.from_hf(qformer.to_hf(silent, 12), 3) == silent
    else:
        with pytest.raises(ValueError, match=f"{kind} reads an instruction, and this Q-Former has no vocabulary"):
            qformer.to_hf(silent, 12, kind)


def test_configs_we_cannot_run():
    with pytest.raises(ValueError, match=r"qformer_config.model_type is 'bert'.*'blip_2_qformer'"):
        qformer.from_hf({"model_type": "bert"}, 32)
    with pytest.raises(ValueError, match="position_embedding_type is 'relative_key'"):
        qformer.from_hf({"position_embedding_type": "relative_key"}, 32)


def test_the_authors_names():
    """The keys of LAVIS's modules, spelled out for one layer with a picture and one without."""
    own = [f"attention.self.{x}" for x in ("query", "key", "value")] + ["attention.output.dense"]
    fed = ["intermediate.dense", "output.dense", "intermediate_query.dense", "output_query.dense"]
    norms = ["attention.output.LayerNorm", "output.LayerNorm", "output_query.LayerNorm"]
    layer = own + fed + norms
    cross = [re.sub("^attention", "crossattention", name) for name in (*own, norms[0])]
    expected = {"query_tokens"} | {f"Qformer.bert.embeddings.{x}_embeddings.weight" for x in ("word", "position")}
    expected |= {f"Qformer.bert.embeddings.LayerNorm.{x}" for x in ("weight", "bias")}
    for i, names in enumerate((layer + cross, layer) * 2):
        expected |= {f"Qformer.bert.encoder.layer.{i}.{name}.{x}" for name in names for x in ("weight", "bias")}
    assert {row.theirs for row in qformer.rows(CONFIG, layout="lavis")} == expected


def test_a_recipe_takes_one():
    found = load("llava15_align", ["--config.model.connector.kind=qformer", "--config.export=False"]).model.lvlm
    assert found.connector == QFormerConfig()
    assert found.visual_tokens == 32
