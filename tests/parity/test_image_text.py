"""BLIP-2's retrieval model, whole; pre-training and the P-Former against small torch re-derivations."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertModel, Blip2Config, Blip2ForImageTextRetrieval

from lvlm_jax import params as P
from lvlm_jax.connectors import pformer, qformer
from lvlm_jax.evaluate.rerank import match_pairs
from lvlm_jax.keymap import TRANSPOSE, UNBATCHED, Row, dense, joined, layer_norm, patches
from lvlm_jax.models.image_text import ImageText, ImageTextConfig
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.schema import Batch
from lvlm_jax.train import losses, pformer_losses, qformer_losses
from lvlm_jax.vision.plain_vit import TOKEN
from lvlm_jax.vision.vit import ViTConfig, patchify
from lvlm_jax.zoo.image_text import bert_rows, joint_rows
from tests import tiny
from tests.parity import compare
from tests.parity.test_qformer import QUERIES, SIZES, WIDTH

pytestmark = pytest.mark.slow

# A trunk with BLIP-2's values: class token, biased patches, read whole behind its last norm.
VISION = ViTConfig(
    image_size=28,
    patch_size=7,
    width=WIDTH,
    depth=1,
    heads=4,
    mlp_dim=64,
    activation="gelu",
    norm_eps=1e-6,
    pre_norm=False,
    patch_bias=True,
    feature_layer=-1,
    class_feature=True,
    feature_norm=True,
    pool="token",
)
SEGMENTS = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3, [1] * 5 + [0]], np.int32)
START = 98


def tower_rows():
    emb = "vision_model.embeddings."
    out = [
        Row("vision/trunk/patch_embed/kernel", f"{emb}patch_embedding.weight", patches(7)),
        Row("vision/trunk/patch_embed/bias", f"{emb}patch_embedding.bias"),
        Row("vision/trunk/class_embed", f"{emb}class_embedding", TOKEN),
        Row("vision/trunk/position_embed", f"{emb}position_embedding", UNBATCHED),
        *layer_norm("vision/post_norm", "vision_model.post_layernorm"),
    ]
    for i in range(VISION.depth):
        a, b = f"vision/trunk/layers/{i}", f"vision_model.encoder.layers.{i}"
        heads = [f"{a}/attn/{x}" for x in "qkv"]
        out.append(Row(tuple(f"{x}/kernel" for x in heads), f"{b}.self_attn.qkv.weight", joined(3, TRANSPOSE)))
        out.append(Row(tuple(f"{x}/bias" for x in heads), f"{b}.self_attn.qkv.bias", joined(3)))
        for x, y in (("attn/o", "self_attn.projection"), ("mlp/up", "mlp.fc1"), ("mlp/down", "mlp.fc2")):
            out += dense(f"{a}/{x}", f"{b}.{y}", bias=True)
        out += layer_norm(f"{a}/norm1", f"{b}.layer_norm1") + layer_norm(f"{a}/norm2", f"{b}.layer_norm2")
    return out


WORDS = [
    *dense("word_head/dense", "word_head.dense", bias=True),
    *layer_norm("word_head/norm", "word_head.norm"),
    Row("word_head/bias", "word_head.bias"),
    Row("temperature", "temp"),
]


def inputs():
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(4, 28, 28, 3)).astype(np.float32)
    return pictures, rng.integers(1, 97, SEGMENTS.shape).astype(np.int32)


def batch():
    pictures, tokens = inputs()
    cut, places, shown = (x[:, None] for x in patchify(jnp.asarray(pictures), 7))
    tokens = jnp.asarray(tokens)
    return Batch(
        tokens=tokens,
        weights=jnp.zeros(tokens.shape),
        positions=tokens,
        segments=jnp.asarray(SEGMENTS),
        image_index=tokens,
        patches=cut,
        patch_positions=places,
        patch_segments=shown,
    )


@functools.cache
def reference(pretrains):
    torch.manual_seed(0)
    vision = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 7, "initializer_range": 0.02}
    sizes = SIZES | {"use_qformer_text_input": True, "num_hidden_layers": 2}
    config = Blip2Config(
        vision_config=vision, qformer_config=sizes, num_query_tokens=QUERIES, image_text_hidden_size=12
    )
    model = Blip2ForImageTextRetrieval(config)
    if pretrains:
        model.word_head = torch.nn.Module()
        model.word_head.dense, model.word_head.norm = torch.nn.Linear(24, 24), torch.nn.LayerNorm(24, 1e-12)
        model.word_head.bias = torch.nn.Parameter(torch.zeros(99))
        model.temp = torch.nn.Parameter(torch.tensor(0.5))
    return compare.perturb(model)


def ours(model, pretrains):
    sizes = qformer.from_hf(model.config.qformer_config.to_dict(), QUERIES)
    config = ImageTextConfig(vision=VISION, qformer=sizes, projection=12, pretrains=pretrains)
    module = ImageText(config)
    rows = tower_rows() + joint_rows(config) + (WORDS if pretrains else [])
    return module, compare.load(rows, compare.tensors(model), abstract(module, batch())[0]), rows


def pixels():
    return torch.tensor(inputs()[0].transpose(0, 3, 1, 2))


def test_retrieval():
    model = reference(False)
    module, params, _ = ours(model, False)
    given = {
        "pixel_values": pixels(),
        "input_ids": torch.tensor(inputs()[1]),
        "attention_mask": torch.tensor(SEGMENTS.astype(np.int64)),
    }
    with torch.no_grad():
        scores = model(**given).logits_per_image
        logits = model(**given, use_image_text_matching_head=True).logits_per_image
        others = {**given, "pixel_values": pixels().flip(0)}  # the pairs that are not on the diagonal, some of them
        turned = model(**others, use_image_text_matching_head=True).logits_per_image

    @tiny.jit
    def run(params, x):
        apply = functools.partial(module.apply, {"params": params})
        features = apply(x, method="features")
        matched = apply(features, x.tokens, x.segments, method="match")
        own = jnp.arange(4)
        pairs = jnp.stack([own, own[::-1]], 1), jnp.stack([own, own], 1)
        both = match_pairs(module, params, features, x.tokens, x.segments, *pairs)
        return qformer_losses.itc_scores(*apply(x)), matched, both

    got = run(params, batch())
    compare.close(got[0], scores, "BLIP-2's contrastive scores")
    compare.close(got[1], logits, "BLIP-2's matching logits")
    compare.close(got[2], torch.stack([logits[:, 1], turned[:, 1]], 1), "matching logits, pair by pair")


def derived(model, other_image, other_text):
    """The three losses as the paper and LAVIS state them, by the torch library's parts and its cross-entropy."""
    text, count = torch.tensor(inputs()[1]).long(), len(SEGMENTS)
    real = torch.tensor(SEGMENTS > 0)
    features = model.vision_model(pixel_values=pixels()).last_hidden_state

    def run(pictures, words, shown, causal=False):
        queries = None if pictures is None else model.query_tokens.expand(len(pictures), -1, -1)
        first = 0 if pictures is None else QUERIES
        keys = torch.cat([torch.ones(len(words), first, dtype=torch.bool), shown], 1)
        mask = keys[:, None, None].expand(-1, 1, keys.shape[1], -1).clone()
        if causal:
            mask[:, :, :first, first:] = False
            mask[:, :, first:, first:] &= torch.tril(torch.ones(words.shape[1], words.shape[1], dtype=torch.bool))
        return model.qformer(
            query_embeds=model.embeddings(input_ids=words, query_embeds=queries),
            query_length=first,
            attention_mask=mask,
            encoder_hidden_states=pictures,
        ).last_hidden_state

    alone = model.qformer(
        query_embeds=model.query_tokens.expand(count, -1, -1), encoder_hidden_states=features
    ).last_hidden_state
    image = F.normalize(model.vision_projection(alone), dim=-1)
    sentence = F.normalize(model.text_projection(run(None, text, real)[:, 0]), dim=-1)
    score = lambda a, b: torch.einsum("nqe,be->nbq", a, b).amax(-1) / model.temp  # noqa: E731
    to_text = score(image, sentence)
    own = torch.arange(count)
    itc = sum(F.cross_entropy(x, own, label_smoothing=0.1) for x in (to_text, to_text.T)) / 2

    pairs = run(
        torch.cat([features, features[other_image], features]),
        torch.cat([text, text, text[other_text]]),
        torch.cat([real, real, real[other_text]]),
    )
    labels = torch.tensor([1] * count + [0] * 2 * count)
    itm = F.cross_entropy(model.itm_head(pairs[:, :QUERIES]).mean(1), labels)

    written = text.clone()
    written[:, 0] = START
    states = run(features, written, real, causal=True)[:, QUERIES:]
    states = model.word_head.norm(F.gelu(model.word_head.dense(states)))
    words = states @ model.embeddings.word_embeddings.weight.T + model.word_head.bias
    labels = written.masked_fill(~real, -100)[:, 1:]
    itg = F.cross_entropy(words[:, :-1].transpose(1, 2), labels, label_smoothing=0.1)
    return itc, itm, itg, to_text.detach()


def test_which_side_of_the_contrast_gets_a_gradient():
    """On more than one device LAVIS compares with what it gathered, and a gather has no backward pass."""
    rng = np.random.default_rng(2)
    unit = lambda *shape: F.normalize(torch.tensor(rng.normal(size=shape), dtype=torch.float32), dim=-1)  # noqa: E731
    given = unit(4, 3, 5), unit(4, 5)
    loss = lambda image, text, gathered: qformer_losses.itc_loss(image, text, 0.2, gathered=gathered)[0] / 4  # noqa: E731
    run = tiny.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    for gathered in (True, False):
        image, text = (x.clone().requires_grad_() for x in given)
        far = (lambda x: x) if gathered else torch.Tensor.detach
        score = lambda a, b: torch.einsum("nqe,be->nbq", a, b).amax(-1) / 0.2  # noqa: E731
        both = score(image, far(text)), score(far(image), text).T
        (sum(F.cross_entropy(x, torch.arange(4), label_smoothing=0.1) for x in both) / 2).backward()
        got = run(*(jnp.asarray(x.numpy()) for x in given), gathered)
        compare.close(got[0], image.grad, f"gradient of the pictures, gathered={gathered}")
        compare.close(got[1], text.grad, f"gradient of the texts, gathered={gathered}")


def test_pretraining():
    """Each loss, and the gradient of their sum by every weight."""
    model = reference(True)
    module, params, rows = ours(model, True)
    key = jax.random.key(3)
    keys = jax.random.split(key)
    with torch.no_grad():
        scores = derived(model, torch.arange(4), torch.arange(4))[3].numpy()
    draw = tiny.jit(lambda key, scores: qformer_losses.hard_negatives(key, scores)[0])
    drawn = [torch.tensor(np.asarray(draw(k, s))).long() for k, s in zip(keys, (scores.T, scores))]
    expected = derived(model, *drawn)[:3]
    (100 * sum(expected)).backward()  # of a size that a comparison sees

    def total(params, x):
        found = qformer_losses.pretraining_losses(module, params, x, key, start_id=START)
        return 100 * losses.total(*found.values()), jnp.stack([part[0] / part[1] for part in found.values()])

    (_, each), grads = tiny.jit(jax.value_and_grad(total, has_aux=True))(params, batch())
    compare.close(each, torch.stack(expected).detach(), "contrast, matching, generation")
    theirs = compare.gradients(model)
    wanted = P.flatten(P.unflatten({k: v for row in rows for k, v in row.load(theirs[row.theirs]).items()}))
    found = P.flatten(grads)
    joint = ("vision_projection", "text_projection", "temperature")
    for parts in (("vision",), ("qformer",), joint, ("match_head", "word_head")):
        keys = [path for path in wanted if path.split("/")[0] in parts]
        both = [np.concatenate([np.asarray(x[path]).ravel() for path in keys]) for x in (found, wanted)]
        compare.close(*both, f"gradients of {', '.join(parts)}")


class Prompts(torch.nn.Module):
    """BLIText's P-Former, re-derived: the torch library's BERT without its pooler, and the authors' heads."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = BertConfig(**sizes, vocab_size=99, max_position_embeddings=16)
        bert = self.Pformer = BertModel(config, add_pooling_layer=False)
        bert.cls_proj, bert.pooler = torch.nn.Linear(24, 5 * 24), torch.nn.Sequential(torch.nn.Linear(24, 24))
        bert.text_proj, bert.opt_proj = torch.nn.Linear(24, 8), torch.nn.Linear(24, 32)
        bert.temp = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, tokens, mask):
        bert = self.Pformer
        out = bert.encoder(bert.embeddings(input_ids=tokens), attention_mask=mask[:, None, None].bool())
        first = out.last_hidden_state[:, 0]
        prompt = bert.opt_proj(torch.tanh(bert.pooler(bert.cls_proj(first).unflatten(1, (5, 24)))))
        return prompt, F.normalize(bert.text_proj(first), dim=-1)


def test_pformer():
    """Prompt and sentence, the two losses that are its own, and their gradients."""
    torch.manual_seed(0)
    model = compare.perturb(Prompts())
    tokens, table = inputs()[1], np.random.default_rng(5).normal(size=(50, 32)).astype(np.float32)
    sizes = {"width": 24, "depth": 3, "heads": 4, "mlp_dim": 48, "vocab": 99, "context": 16}
    config = pformer.PFormerConfig(prompt=5, contrast=8, **sizes)
    module, rows = pformer.PFormer(config, width=32), pformer.rows(config)
    shapes, _ = abstract(module, jnp.asarray(tokens), jnp.asarray(SEGMENTS))
    params = compare.load(rows, compare.tensors(model), {"pformer": shapes})
    prompt, sentence = model(torch.tensor(tokens).long(), torch.tensor(SEGMENTS))
    words = torch.tensor(table)
    taken = words[torch.cdist(prompt.flatten(0, 1), words).argmin(1)].view_as(prompt)
    scores = sentence @ sentence.T / model.Pformer.temp
    expected = F.mse_loss(prompt, taken), F.cross_entropy(scores, torch.arange(4), label_smoothing=0.1)
    sum(expected).backward()

    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, tokens, segments):
        own = params["pformer"]
        prompt, sentence = module.apply({"params": own}, tokens, segments)
        parts = (
            pformer_losses.vocabulary_loss(prompt, jnp.asarray(table)),
            pformer_losses.sentence_loss(sentence, own["temperature"]),
        )
        means = jnp.stack([part[0] / part[1] for part in parts])
        return losses.total(*parts), SimpleNamespace(prompt=prompt, sentence=sentence, means=means).__dict__

    (_, got), grads = tiny.jit(run)(params, jnp.asarray(tokens), jnp.asarray(SEGMENTS))
    compare.close(got["prompt"], prompt.detach(), "P-Former, prompt")
    compare.close(got["sentence"], sentence.detach(), "P-Former, sentence")
    compare.close(got["means"], torch.stack(expected).detach(), "P-Former, losses")
    theirs = compare.gradients(model)
    wanted = {k: v for row in rows for k, v in row.load(theirs[row.theirs]).items()}
    flat = P.flatten(grads)
    both = [np.concatenate([np.asarray(x[k]).ravel() for k in sorted(wanted)]) for x in (flat, wanted)]
    compare.close(*both, "P-Former, gradients")


def test_pretraining_begins_as_bert():
    """Words alone, all of them shown: what BERT says of them, less its token types; queries begin with its layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = compare.perturb(BertForMaskedLM(BertConfig(**sizes, vocab_size=98, max_position_embeddings=16)))
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.zero_()
        text = torch.tensor(inputs()[1]).long()
        out = model(text, attention_mask=torch.tensor(SEGMENTS), output_hidden_states=True)
    config = ImageTextConfig(
        vision=VISION,
        qformer=qformer.QFormerConfig(queries=QUERIES, width=24, depth=2, heads=4, mlp_dim=48, vocab=99, context=16),
    )
    module = ImageText(config)
    shapes = abstract(module, batch())[0]
    theirs = compare.tensors(model)
    loaded = {k: np.asarray(v) for row in bert_rows(config) for k, v in row.load(theirs[row.theirs]).items()}
    flat = {k: np.zeros(v.shape, np.float32) for k, v in P.flatten(shapes).items()}
    assert {k: v.shape for k, v in loaded.items()} == {k: flat[k].shape for k in loaded}
    begun = ("cross", "queries", "projection", "match_head", "temperature", "vision/")
    assert {k for k in flat if k not in loaded} == {k for k in flat if any(part in k for part in begun)}
    np.testing.assert_allclose(loaded["word_head/bias"][98], loaded["word_head/bias"][:98].mean(), rtol=1e-5)
    for path in (path for path in loaded if "/query_mlp" in path):
        np.testing.assert_array_equal(loaded[path], loaded[path.replace("query_mlp", "mlp")])

    def words(module, tokens, segments):
        states = module.qformer(None, tokens, segments)
        hidden, kernel = module.word_head(states, module.qformer.head_kernel())
        return states, hidden @ kernel

    run = tiny.jit(lambda p, *args: module.apply({"params": p}, *args, method=words))
    states, scores = run(P.unflatten(flat | loaded), jnp.asarray(inputs()[1]), jnp.asarray(SEGMENTS))
    shown = SEGMENTS > 0
    compare.close(states[shown], out.hidden_states[-1][torch.tensor(shown)], "a Q-Former that begins as BERT")
    compare.close(scores[shown][:, :98], out.logits[torch.tensor(shown)], "the words of one")
