"""nanoVLM's make, put together from the torch library's parts: SigLIP to its end, pixel shuffle, SmolLM2's decoder."""

import jax
import numpy as np
import torch
from transformers import Idefics3Config, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from lvlm_jax import llm, vision
from lvlm_jax.connectors import PixelShuffleConfig
from lvlm_jax.connectors import keys as connector_keys
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.zoo import nanovlm
from tests import tiny
from tests.parity import compare
from tests.parity.test_decoders import SIZES
from tests.parity.test_siglip import FACTOR, TOWER

I = tiny.IMAGE
ROWS = [[3, I, 4], [9], [2, I, 1, I, 5]]


def make():
    torch.manual_seed(0)
    tower = SiglipVisionModel(SiglipVisionConfig(**TOWER, vision_use_head=False))
    text = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    connector = Idefics3Connector(
        Idefics3Config(vision_config=TOWER, text_config={"model_type": "llama", **SIZES}, scale_factor=2)
    )
    parts = [compare.perturb(part, factor=FACTOR) for part in (tower, connector, text)]
    released = nanovlm.SYSTEMS["nanovlm_222m"].config.vision
    ends = {name: getattr(released, name) for name in ("feature_layer", "feature_norm")}
    sizes = vision.siglip.from_hf(tower.config.to_dict())
    config = LVLMConfig(
        vision=type(sizes)(**{**vars(sizes), **ends}),
        connector=PixelShuffleConfig(factor=2),
        llm=llm.smollm2.from_hf(text.config.to_dict()),
    )
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    rows = [
        *vision.siglip.rows(config.vision, "vision", "tower."),
        *connector_keys.rows(config.connector, "connector", "connector"),
        *llm.smollm2.rows(config.llm, "llm", "text.model.", "text.lm_head.weight"),
    ]
    theirs = {
        f"{name}.{key.removeprefix('vision_model.')}": value
        for name, part in zip(("tower", "connector", "text"), parts)
        for key, value in compare.tensors(part, ("lm_head.weight",)).items()
    }
    return parts, LVLM(config), compare.load(rows, theirs, shapes)


def test_logits():
    (tower, connector, text), module, params = make()
    batch, pictures = tiny.batch(module.config, ROWS)
    with torch.no_grad():
        seen = connector(tower(torch.tensor(pictures)).last_hidden_state)  # [pictures, Q, D]
        x = text.model.embed_tokens(torch.tensor(batch.tokens)).clone()
        x[torch.tensor(batch.image_index >= 0)] = seen.reshape(-1, seen.shape[-1])
        mask, places = torch.tensor(batch.segments > 0).long(), torch.tensor(batch.positions)
        expected = text(inputs_embeds=x, attention_mask=mask, position_ids=places).logits.numpy()
    ours = np.asarray(jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))(params, batch))
    shown = batch.segments > 0
    compare.close(ours[shown], expected[shown], "nanoVLM")
