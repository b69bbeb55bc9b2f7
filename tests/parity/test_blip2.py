"""BLIP-2 and InstructBLIP, whole, on a decoder and on an encoder-decoder: logits, loss, gradients, five beams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from lvlm_jax import params as P
from lvlm_jax.infer import steps
from lvlm_jax.infer.beam import Beams
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.train.losses import language_loss
from lvlm_jax.zoo import blip2, instructblip
from tests import tiny
from tests.parity import compare

IMAGE_ID = 98
I = tiny.IMAGE
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "initializer_range": 0.02,  # the class's own, 1e-10, leaves nothing to compare
}
QFORMER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QFORMER |= {"vocab_size": 99, "max_position_embeddings": 16}
HIDDEN = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# The reference computes no gradient for the embedding of a padding token, and OPT's default is token 1.
OPT = {**HIDDEN, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": None}
LLAMA = {**HIDDEN, "intermediate_size": 48, "max_position_embeddings": 64}
T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,  # so that rows of twenty reach every bucket
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",
    "tie_word_embeddings": False,
}
BLIP2 = Blip2ForConditionalGeneration, Blip2Config, blip2
INSTRUCT = InstructBlipForConditionalGeneration, InstructBlipConfig, instructblip
CASES = {
    "blip2, opt": (*BLIP2, OPTConfig, OPT),
    "blip2, t5": (*BLIP2, T5Config, T5),
    "instructblip, llama": (*INSTRUCT, LlamaConfig, LLAMA),
    "instructblip, t5": (*INSTRUCT, T5Config, T5),
}
EACH = [pytest.param(name, marks=pytest.mark.slow if name == "instructblip, t5" else ()) for name in CASES]
ROWS = [[2, I, 3, I, 4], [5, 4], [4, I, 2], [I, 3, 6]]
"""Two pictures in a row, none, one behind a text, one in front of it."""


def build(case, image_id=IMAGE_ID, **change):
    """(their perturbed model, its config as a dict), with another language model's sizes."""
    model_type, config_type, _, text_type, text = CASES[case]
    torch.manual_seed(0)
    model = model_type(
        config_type(
            vision_config=dict(VISION),
            qformer_config=dict(QFORMER),
            text_config=text_type(**text | change),
            num_query_tokens=6,
            image_token_index=image_id,
        )
    )
    raw, t5, generator = model.config.to_dict(), "t5" in case, torch.Generator().manual_seed(7)
    if t5:  # its config ties every head (version 5), so that an untied one is put in by hand
        raw["text_config"]["tie_word_embeddings"] = False
        head = torch.randn(model.language_model.shared.weight.shape, generator=generator) * 0.05
        model.language_model.lm_head.weight = torch.nn.Parameter(head)
    for child in model.children():
        # T5's scores have no scale, so that larger matrices would make every softmax a choice of one key.
        compare.perturb(child, factor=1.5 if t5 and child is model.language_model else 5.0)
    with torch.no_grad():
        model.query_tokens.copy_(torch.randn(model.query_tokens.shape, generator=generator))
    return model.eval(), raw


@functools.cache
def make(case):
    model, raw = build(case)
    family = CASES[case][2]
    config, image_id = family.from_hf(raw)
    assert image_id == IMAGE_ID
    assert family.fits(config)
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    unused = (*blip2.UNUSED, *((blip2.HEAD,) if config.llm.tied else ()))
    rows = family.rows(config)
    return model, LVLM(config), rows, unused, compare.load(rows, compare.tensors(model, unused), shapes)


def given(batch, pictures):
    """The pictures as their classes take them, and what their Q-Former reads."""
    out = {"pixel_values": torch.tensor(pictures)}
    if batch.instruction is not None:
        said = batch.instruction[0]
        out["qformer_input_ids"] = torch.tensor(np.maximum(said, 0)).long()
        out["qformer_attention_mask"] = torch.tensor((said >= 0).astype(np.int64))
    return out


def written(batch):
    """(where each row's answer begins, where it ends)."""
    return [(int(np.flatnonzero(w)[0]), int(np.flatnonzero(w)[-1]) + 1) for w in batch.weights]


def filled(rows, fill):
    """Rows of unlike lengths as one tensor."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows]).long()


def reference(model, batch, pictures):
    """(mean loss, logits that predict each row's answer, row after row)."""
    ends, tokens = written(batch), batch.tokens.tolist()
    if model.config.use_decoder_only_language_model:
        labels = np.where(batch.weights > 0, batch.tokens, -100)
        out = model(
            input_ids=torch.tensor(batch.tokens).long(),
            attention_mask=torch.tensor((batch.segments > 0).astype(np.int64)),
            labels=torch.tensor(labels).long(),
            **given(batch, pictures),
        )
        return out.loss, torch.cat([out.logits[b, start - 1 : stop - 1] for b, (start, stop) in enumerate(ends)])
    first = [int(np.flatnonzero(segments)[0]) for segments in batch.segments]
    read = [row[at:start] for row, at, (start, _) in zip(tokens, first, ends)]
    out = model(
        input_ids=filled(read, 0),
        attention_mask=filled([[1] * len(row) for row in read], 0),
        labels=filled([row[start:stop] for row, (start, stop) in zip(tokens, ends)], -100),
        **given(batch, pictures),
    )
    return out.loss, torch.cat([out.logits[b, : stop - start] for b, (start, stop) in enumerate(ends)])


def loss_of(params, module, batch):
    """(mean loss, logits of every position)."""
    hidden, _ = module.apply({"params": params}, batch)
    kernel = module.apply({"params": params}, method="head_kernel")
    total, count, _ = language_loss(hidden, kernel, batch.tokens, batch.weights)
    return total / count, module.apply({"params": params}, hidden, method="logits")


run = tiny.jit(loss_of, static_argnums=1)
grad = tiny.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=1)


def answers(logits, batch):
    """Of every position's logits those that predict an answer."""
    return np.concatenate([np.asarray(logits)[b, a - 1 : z - 1] for b, (a, z) in enumerate(written(batch))])


@pytest.mark.parametrize("case", EACH)
def test_logits_loss_and_gradients(case):
    model, module, rows, unused, params = make(case)
    batch, pictures = tiny.batch(module.config, ROWS, image_id=IMAGE_ID)
    model.zero_grad()
    expected, scores = reference(model, batch, pictures)
    expected.backward()
    (loss, logits), grads = grad(params, module, batch)
    compare.close(answers(logits, batch), scores, case)
    np.testing.assert_allclose(loss, expected.item(), rtol=compare.TOLERANCE)
    theirs, ours = compare.gradients(model, unused), P.flatten(grads)
    wanted = P.flatten(P.unflatten({k: v for row in rows for k, v in row.load(theirs[row.theirs]).items()}))
    for part in ("vision", "connector", "llm"):
        keys = sorted(key for key in ours if key.startswith(f"{part}/"))
        got, want = (np.concatenate([np.asarray(flat[key]).ravel() for key in keys]) for flat in (ours, wanted))
        scale = np.abs(want).max()  # of a mean over so many words they are small
        compare.close(got / scale, want / scale, f"{case}, gradients of {part}")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_padded_on_the_left_and_every_weight_is_read(case):
    model, module, _, _, params = make(case)
    batch, pictures = tiny.batch(module.config, ROWS, pad="left", image_id=IMAGE_ID)
    with torch.no_grad():
        expected = reference(model, batch, pictures)[1]
    compare.close(answers(run(params, module, batch)[1], batch), expected, f"{case}, padded on the left")
    unread = compare.dead(lambda p: run(p, module, batch)[1], params)
    # Behind the last layer the queries alone are read, and not what its feed-forward made of the instruction.
    expected = {path for path in P.flatten(params) if path.startswith("connector/qformer/layers/0/layer1/mlp")}
    # Biases of keys without rotary positions shift all scores of a query alike.
    assert {path for path in unread if not path.endswith("/k/bias")} == expected


NEW, FILL = 8, 97


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_captions_of_five_beams(case):
    """Every hypothesis and score of their generate, about pictures with and without a text."""
    model, module, _, _, params = make(case)
    batch, pictures = tiny.batch(module.config, [[I, 3], [I, 5], [I, 1]], pad="left", image_id=IMAGE_ID)
    batch = batch.replace(weights=np.zeros_like(batch.weights))
    common = {"num_beams": 5, "num_return_sequences": 5, "do_sample": False, "pad_token_id": FILL}
    ask = functools.partial(
        model.generate,
        input_ids=torch.tensor(batch.tokens).long(),
        attention_mask=torch.tensor((batch.segments > 0).astype(np.int64)),
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        **common,
        **given(batch, pictures),
    )
    endless = ask(eos_token_id=None).sequences
    before = endless.shape[1] - NEW  # the prompt, or the start token
    endless = endless[:, before:]
    ends = tuple(sorted({int(endless[0, 2]), int(endless[5, 4])}))
    out, beams = ask(eos_token_id=list(ends)), Beams(count=5)
    static = (module, None, beams.mode, ends, NEW)
    arrays = jax.tree.map(jnp.asarray, batch)
    found = jax.device_get(steps.search(*static, params, arrays, beams.numbers, jnp.int32(NEW)))
    wanted = np.pad(out.sequences[:, before:].numpy(), ((0, 0), (0, NEW)), constant_values=FILL)
    for tokens, count, theirs in zip(found.tokens.reshape(-1, NEW), found.lengths.ravel(), wanted, strict=True):
        assert tokens[:count].tolist() == theirs[:count].tolist()
        assert (theirs[count:] == FILL).all()
    np.testing.assert_allclose(found.scores.ravel(), out.sequences_scores, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_fresh_save_is_in_the_one_layout(case, tmp_path):
    from safetensors.numpy import load_file

    model, module, rows, _, params = make(case)
    model.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    assert {row.theirs for row in rows} == set(theirs)
    compare.load(rows, theirs, params, str(tmp_path))
    assert module.config.visual_tokens == 6
