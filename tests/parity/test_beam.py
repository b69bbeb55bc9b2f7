"""Beam search of a decoder and of an encoder-decoder: every hypothesis and score of the torch library's generate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lvlm_jax import llm
from lvlm_jax.infer import generate
from lvlm_jax.infer.beam import Beams
from lvlm_jax.infer.encoder_decoder import write
from lvlm_jax.llm.decoder import Decoder
from lvlm_jax.models.lvlm import LVLM
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.linear import abstract
from tests import tiny
from tests.parity import compare, test_t5

NEW, FILL = 9, 98
NIGHTLY, SLOW = pytest.mark.nightly, pytest.mark.slow
CASES = [
    pytest.param("llama", 1, False, marks=NIGHTLY),
    pytest.param("llama", 3, False, marks=SLOW),
    pytest.param("llama", 5, True, marks=NIGHTLY),
    pytest.param("t5", 1, False, marks=NIGHTLY),
    pytest.param("t5", 3, "never", marks=SLOW),
    pytest.param("t5", 5, False, marks=NIGHTLY),
]
"""Model, beams and early stopping; each compiles a search."""

SETTINGS = [{"length_penalty": penalty} for penalty in (0.0, 1.0, -1.0)] + [{"min_new_tokens": 4}]


@functools.cache
def llama():
    """(their model and its inputs, our search of the same prompts): three of unlike length, padded on the left."""
    fields = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    theirs = compare.perturb(LlamaForCausalLM(LlamaConfig(**fields, **heads)), factor=4.0)
    with torch.no_grad():
        theirs.lm_head.weight.mul_(3.0)  # sharper, so that hypotheses differ in more than one word
    config = tiny.SYSTEMS["llava15"]
    assert config.llm == llm.llama.from_hf({**theirs.config.to_dict(), "rms_norm_eps": config.llm.norm_eps})
    theirs.config.rms_norm_eps = config.llm.norm_eps
    for module in theirs.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = config.llm.norm_eps
    shapes, _ = abstract(Decoder(config.llm), jnp.zeros((1, 2, 32)), jnp.zeros((1, 2), jnp.int32), R.causal(1, 2))
    params = tiny.weights(config) | {
        "llm": compare.load(llm.llama.rows(config.llm, ""), compare.tensors(theirs), shapes)
    }
    batch, _ = tiny.batch(config, [[5], [8], [6]], pad="left")
    shown = torch.tensor(batch.segments)
    given = {"input_ids": torch.tensor(batch.tokens).long(), "attention_mask": shown}

    def ours(beams, ends):
        static = (LVLM(config), None, beams.mode, ends, 16)
        return generate.search(*static, params, jax.tree.map(jnp.asarray, batch), beams.numbers, jnp.int32(NEW))

    return theirs, given, batch.tokens.shape[1], ours


@functools.cache
def t5():
    """The same of an encoder-decoder, whose answers begin with its start token."""
    theirs = test_t5.reference("flan_t5", num_decoder_layers=2)  # their cache has as many layers as their encoder
    with torch.no_grad():
        theirs.lm_head.weight.mul_(4.0)  # likewise
    module, _, _, params = test_t5.ours("flan_t5", theirs)
    read, shown, _, _ = test_t5.inputs()
    given = {"input_ids": torch.tensor(read).long(), "attention_mask": torch.tensor(shown)}
    x = module.apply({"params": params}, jnp.asarray(read), method="embed_tokens")

    def ours(beams, ends):
        return write(module, params, x, jnp.asarray(shown), max_new_tokens=NEW, ends=ends, beams=beams)

    return theirs, given, 1, ours


@pytest.mark.parametrize(("name", "count", "early"), CASES)
def test_every_hypothesis_and_score(name, count, early):
    theirs, given, prompt, ours = {"llama": llama, "t5": t5}[name]()
    common = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": FILL}
    ask = functools.partial(theirs.generate, **given, **common, return_dict_in_generate=True, output_scores=True)
    # Words of what they say when nothing ends them: so some answers end after few words, and others never.
    endless = ask(num_beams=5, num_return_sequences=5, eos_token_id=None).sequences[:, prompt:]
    ends = tuple(sorted({int(endless[0, 2]), int(endless[5, 4]), int(endless[-1, 6])}))
    lengths = []
    for setting in SETTINGS:
        found = jax.device_get(ours(Beams(count=count, early_stopping=early, **setting), ends))
        # With one beam theirs is greedy, and warns of what belongs to a search.
        more = setting | {"early_stopping": early, "num_return_sequences": count} if count > 1 else {}
        more |= {key: value for key, value in setting.items() if key == "min_new_tokens"}
        out = ask(num_beams=count, eos_token_id=list(ends), **more)
        wanted = np.pad(out.sequences[:, prompt:].numpy(), ((0, 0), (0, NEW)), constant_values=FILL)
        flat = zip(found.tokens.reshape(-1, found.tokens.shape[-1]), found.lengths.ravel(), wanted, strict=True)
        for tokens, length, reference in flat:
            assert tokens[:length].tolist() == reference[:length].tolist(), setting
            assert (reference[length:] == FILL).all(), setting
            lengths.append(int(length))
        if count > 1:
            np.testing.assert_allclose(found.scores.ravel(), out.sequences_scores, rtol=2e-5)
    assert count == 1 or min(lengths) <= 3 < max(lengths)  # some ended early
