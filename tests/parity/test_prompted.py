"""BLIText's stage 0 whole: a P-Former re-derived in torch before the torch library's OPT, loss and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lvlm_jax import params as P
from lvlm_jax.connectors import pformer
from lvlm_jax.kinds.pformer import KIND, Settings
from lvlm_jax.models.prompted import PromptedDecoder
from lvlm_jax.nn.linear import abstract
from tests import tiny
from tests.parity import compare
from tests.parity.test_decoders import make
from tests.parity.test_gpt import CASES
from tests.parity.test_image_text import SEGMENTS, Prompts, inputs

pytestmark = pytest.mark.slow

WROTE = np.array([[1] * 7, [1] * 5 + [0] * 2, [1] * 4 + [0] * 3, [1] * 6 + [0]], np.int32)


def texts():
    """(BERT's ids, 0 where a text is padded; the language model's)."""
    words = np.random.default_rng(4).integers(3, 99, WROTE.shape).astype(np.int32)
    return inputs()[1] * SEGMENTS, words * WROTE


def expected(model, opt):
    """What the authors add up, from their code."""
    read, wrote = (torch.tensor(x).long() for x in texts())
    prompt, sentence = model(read, torch.tensor(SEGMENTS))
    table = opt.get_input_embeddings().weight
    front = torch.ones(prompt.shape[:2], dtype=torch.long)
    out = opt(
        inputs_embeds=torch.cat([prompt, opt.get_input_embeddings()(wrote)], 1),
        attention_mask=torch.cat([front, torch.tensor(WROTE).long()], 1),
        labels=torch.cat([front * -100, wrote.masked_fill(torch.tensor(WROTE) == 0, -100)], 1),
    )
    taken = table[torch.cdist(prompt.flatten(0, 1), table).argmin(1)].view_as(prompt).detach()
    scores = sentence @ sentence.T / model.Pformer.temp
    told = F.cross_entropy(scores, torch.arange(len(scores)), label_smoothing=0.1)
    return torch.stack([out.loss, F.mse_loss(prompt, taken), told])


def test_the_losses_and_their_gradient():
    torch.manual_seed(0)
    model = compare.perturb(Prompts())
    opt, decoder, _, _, language = make("opt", CASES)
    opt.zero_grad()
    wanted = expected(model, opt)
    wanted.sum().backward()

    sizes = {"width": 24, "depth": 3, "heads": 4, "mlp_dim": 48, "vocab": 99, "context": 16}
    config, reads = pformer.PFormerConfig(prompt=5, contrast=8, **sizes), SEGMENTS.shape[1]
    module = PromptedDecoder(config, decoder.config, reads=reads)
    read, wrote = texts()
    tokens = np.concatenate([read, wrote], 1)
    batch = KIND.batch(None, len(tokens), tokens.shape[1], 0)
    batch = batch.replace(tokens=tokens, segments=np.concatenate([np.ones_like(read), WROTE], 1))
    shapes = abstract(module, jax.tree.map(jnp.asarray, batch))[0]
    rows = pformer.rows(config)
    own = compare.load(rows, compare.tensors(model), {"pformer": shapes["pformer"]})
    assert P.flatten(shapes).keys() == P.flatten({**own, "llm": language}).keys()
    loss = KIND.loss(module, Settings(mask=0.0), False, 1)

    def run(own, batch):
        total, weight, parts = loss({**own, "llm": language}, batch, jax.random.key(0))
        return total / weight, jnp.stack([parts[name] for name in ("language", "vocabulary", "sentence")])

    (total, parts), grads = tiny.jit(jax.value_and_grad(run, has_aux=True))(own, jax.tree.map(jnp.asarray, batch))
    compare.close(parts, wanted.detach(), "BLIText's stage 0, losses")
    np.testing.assert_allclose(total, wanted.sum().item(), rtol=1e-5)
    theirs, found = compare.gradients(model), P.flatten(grads)
    flat = {k: v for row in rows for k, v in row.load(theirs[row.theirs]).items()}
    both = [np.concatenate([np.asarray(x[k]).ravel() for k in sorted(flat)]) for x in (found, flat)]
    compare.close(*both, "BLIText's stage 0, gradients")


def test_hidden_words_are_drawn_by_the_key():
    """Another key hides other words; the same one the same."""
    decoder = make("opt", CASES)[1]
    config = pformer.PFormerConfig(prompt=5, contrast=8, width=24, depth=1, heads=4, mlp_dim=48, vocab=110, context=16)
    module = PromptedDecoder(config, decoder.config, reads=SEGMENTS.shape[1])
    read, wrote = texts()
    batch = dummy_batch_of(np.concatenate([read, wrote], 1))
    params = jax.tree.map(jnp.asarray, tiny.randomize(abstract(module, batch)[0]))
    loss = KIND.loss(module, Settings(mask=0.5), False, 1)
    run = tiny.jit(lambda seed: loss(params, batch, jax.random.key(seed))[0])
    assert run(0) == run(0)
    assert run(0) != run(1)


def dummy_batch_of(tokens):
    batch = KIND.batch(None, len(tokens), tokens.shape[1], 0)
    return jax.tree.map(jnp.asarray, batch.replace(tokens=tokens))
