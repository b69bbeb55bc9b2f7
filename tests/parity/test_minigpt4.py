"""MiniGPT-4 and MiniGPT-v2 against BLIP-2's tower and Q-Former, one dense layer and LLaMA, put together in torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2VisionConfig, Blip2VisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from lvlm_jax import params as P
from lvlm_jax.connectors import qformer
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.vision import blip2_vit
from lvlm_jax.zoo import minigpt4
from tests import tiny
from tests.parity import compare
from tests.parity.test_decoders import SIZES
from tests.parity.test_qformer import QUERIES, WIDTH
from tests.parity.test_qformer import SIZES as QFORMER

I = tiny.IMAGE
ROWS = [[3, I, 4], [2, I, 1, I, 5], [9]]
TOWER = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWER |= {"image_size": 28, "patch_size": 7, "initializer_range": 0.02}
KINDS = ("qformer", "four of a row", "four of a row, interpolated")


class Reference(nn.Module):
    """A model of the authors' make; its parts are the torch library's."""

    def __init__(self, kind):
        super().__init__()
        self.vision_model = Blip2VisionModel(Blip2VisionConfig(**TOWER))
        self.larger = kind.endswith("interpolated")
        text = LlamaForCausalLM(LlamaConfig(**SIZES))
        if kind == "qformer":
            self.qformer = Blip2QFormerModel(Blip2QFormerConfig(**QFORMER))
            self.query_tokens = nn.Parameter(torch.randn(1, QUERIES, QFORMER["hidden_size"]))
        features = QFORMER["hidden_size"] if kind == "qformer" else 4 * WIDTH
        self.llama_proj, self.llama_model = nn.Linear(features, SIZES["hidden_size"]), text

    def pictures(self, pixels):
        """[n, 3, height, width] -> [n, Q, D]."""
        seen = self.vision_model(pixels, interpolate_pos_encoding=self.larger).last_hidden_state
        if hasattr(self, "qformer"):
            queries = self.query_tokens.expand(len(seen), -1, -1)
            seen = self.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        else:  # four that follow one another, side by side
            patches = seen[:, 1:]
            fours = [torch.cat([patches[:, i + j] for j in range(4)], -1) for i in range(0, patches.shape[1], 4)]
            seen = torch.stack(fours, 1)
        return self.llama_proj(seen)

    def forward(self, batch, pixels):
        x = self.llama_model.get_input_embeddings()(torch.tensor(batch.tokens, dtype=torch.long))
        tokens = self.pictures(torch.tensor(pixels)).flatten(0, 1)
        index = torch.tensor(batch.image_index, dtype=torch.long)
        x = torch.where((index >= 0)[..., None], tokens[index.clamp(min=0)], x)
        mask = torch.tensor((batch.segments > 0).astype(np.int64))
        places = torch.tensor(batch.positions, dtype=torch.long)
        return self.llama_model(inputs_embeds=x, attention_mask=mask, position_ids=places).logits


def make(kind):
    torch.manual_seed(0)
    model = compare.perturb(Reference(kind))
    tower = blip2_vit.from_hf(model.vision_model.config.to_dict())
    between = minigpt4.FOUR_OF_A_ROW
    if kind == "qformer":
        between = qformer.from_hf(model.qformer.config.to_dict(), QUERIES)
    else:
        tower = dataclasses.replace(tower, class_feature=False)
    if model.larger:
        tower = dataclasses.replace(tower, resize="cubic", max_patches=64)
    host = minigpt4.llm.llama.from_hf(model.llama_model.config.to_dict())
    config = LVLMConfig(vision=tower, connector=between, llm=host)
    assert minigpt4.fits(config)
    rows = [*blip2_vit.rows(tower), *minigpt4.projection_rows(), *minigpt4.host_rows(config)]
    rows += qformer.rows(between, "connector/qformer") if kind == "qformer" else []
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    return model, LVLM(config), rows, compare.load(rows, compare.tensors(model), shapes)


def batch_for(config, **options):
    """Pictures of twice the table's side where it is interpolated."""
    if config.vision.max_patches:
        side = 2 * config.vision.image_size
        seen = dataclasses.replace(config.vision, image_size=side, resize="none", max_patches=None)
        config = dataclasses.replace(config, vision=seen)
    return tiny.batch(config, ROWS, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model(kind):
    model, module, rows, params = make(kind)
    batch, pixels = batch_for(module.config, pad="left")
    expected = model(batch, pixels)
    run = tiny.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))
    shown, batch = batch.segments > 0, jax.tree.map(jnp.asarray, batch)
    compare.close(np.asarray(run(params, batch))[shown], expected.detach().numpy()[shown], f"MiniGPT-4, {kind}, logits")
    unread = compare.dead(lambda p: run(p, batch), params)
    assert {path for path in unread if not path.endswith("k/bias")} == set()  # shifts all scores of a query alike
    compare.same_gradients(expected, model, module, params, batch, tiny.logits, rows, (), f"MiniGPT-4, {kind}")


@pytest.mark.parametrize("kind", KINDS[::2])
def test_the_authors_names(kind):
    """A state under the authors' names, EVA's for the tower, is read, and written again byte for byte."""
    _, module, _, params = make(kind)
    flat = {path: np.asarray(leaf) for path, leaf in P.flatten(params).items()}
    bare = [path for path in flat if path.startswith("vision/") and path.endswith("/k/bias")]
    flat |= {path: np.zeros_like(flat[path]) for path in bare}
    rows = minigpt4.rows(module.config)
    theirs = {row.theirs: row.save({path: flat[path] for path in row.leaves}) for row in rows}
    names = {"visual_encoder.blocks.2.attn.q_bias", "ln_vision.weight", "llama_proj.bias"}
    names |= {"llama_model.model.layers.1.self_attn.q_proj.weight", "llama_model.lm_head.weight"}
    if kind == "qformer":
        names |= {"query_tokens", "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"}
    assert names <= theirs.keys()
    assert theirs["visual_encoder.blocks.0.attn.qkv.weight"].shape == (3 * WIDTH, WIDTH)
    back = compare.load(rows, theirs, params)
    for path, leaf in P.flatten(back).items():
        np.testing.assert_array_equal(leaf, flat[path], err_msg=path)
