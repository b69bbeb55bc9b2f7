"""Model FLOPs against the counts that everyone quotes."""

import dataclasses
import math

import jax
import pytest

from lvlm_jax import llm
from lvlm_jax import params as trees
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn import lora
from lvlm_jax.nn.linear import abstract
from lvlm_jax.nn.lora import Lora
from lvlm_jax.train.flops import decoder_flops, factors, step_flops
from lvlm_jax.train.optim import OptimizerConfig
from lvlm_jax.train.stages import Stage
from lvlm_jax.zoo import SYSTEMS
from tests import tiny


def test_frozen_parts_cost_two_before_and_four_after_a_trained_one():
    assert factors({"vision": False, "connector": True, "llm": False}) == {"vision": 2, "connector": 6, "llm": 4}
    assert factors({"vision": True, "connector": True, "llm": True}) == {"vision": 6, "connector": 6, "llm": 6}
    assert factors({"vision": False, "connector": False, "llm": True}) == {"vision": 2, "connector": 2, "llm": 6}


def mask(shapes, *parts):
    return {part: jax.tree.map(lambda _, on=part in parts: on, tree) for part, tree in shapes.items()}


def test_llama_7b_is_six_times_its_weights_plus_attention():
    config = SYSTEMS["llava15_7b"].config
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    full = mask(shapes, "vision", "connector", "llm")
    got = step_flops(config, shapes, full, rows=1, length=4096, pictures=0)
    # One LLaMA-7B layer at 4,096 tokens: 5.39 TF (6N and causal attention); 32 of them, and the head of 32,064 words.
    head = 6 * 4096 * 4096 * 32064
    assert got == pytest.approx(32 * 5.39e12 + head, rel=0.005)


def test_alignment_costs_four_sixths_of_the_full_step_in_the_language_model():
    config = SYSTEMS["llava15_7b"].config
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    sizes = {"rows": 2, "length": 2048, "pictures": 0}
    full = step_flops(config, shapes, mask(shapes, "vision", "connector", "llm"), **sizes)
    align = step_flops(config, shapes, mask(shapes, "connector"), **sizes)
    assert align / full == pytest.approx(4 / 6)


@pytest.mark.parametrize("length", [2048, 8192])
def test_attention_costs_what_a_window_lets_it_see(length):
    near = 4096
    wide = dataclasses.replace(SYSTEMS["llava15_7b"].config, llm=llm.PRESETS["mistral_7b_v02"])
    narrow = dataclasses.replace(wide, llm=dataclasses.replace(wide.llm, window=near, pattern=("local", "global")))
    shapes, _ = abstract(LVLM(wide), dummy_batch(wide))
    whole = mask(shapes, "vision", "connector", "llm")
    saved = [step_flops(c, shapes, whole, rows=1, length=length, pictures=0) for c in (wide, narrow)]
    hidden = sum(max(0, t + 1 - near) for t in range(length))  # pairs beyond the window, in one of its 16 layers
    assert saved[0] - saved[1] == pytest.approx(3 * 16 * 4 * 4096 * hidden, rel=1e-3)


def test_adapters_cost_six_and_the_kernels_under_them_four():
    config = SYSTEMS["llava15_7b"].config
    shapes, axes = abstract(LVLM(config), dummy_batch(config))
    sizes = {"rows": 2, "length": 2048, "pictures": 0}
    stage = Stage(
        name="x", trains=(), steps=1, optimizer=OptimizerConfig(learning_rate=1e-4), lora=Lora(targets=("llm/**",))
    )
    grown, _ = lora.add_shapes(shapes, axes, stage.lora)
    got = step_flops(config, grown, stage.mask(grown), **sizes)
    full = step_flops(config, shapes, mask(shapes, "llm"), **sizes)
    kernels = sum(math.prod(x.shape) for p, x in trees.flatten(shapes["llm"]).items() if p.endswith("kernel"))
    extra = sum(math.prod(x.shape) for p, x in trees.flatten(grown).items() if p.endswith((lora.A, lora.B)))
    assert got == pytest.approx(full + 2 * 2048 * (6 * extra - 2 * kernels))


@pytest.mark.parametrize("name", ["llava15", "clip_llama3"])
def test_a_decoder_alone_costs_what_it_does_in_a_larger_model(name):
    config = tiny.SYSTEMS[name]
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    for on in (True, False):
        whole = mask(shapes, *(["llm"] if on else []))
        got = decoder_flops(config.llm, shapes["llm"], whole["llm"], rows=3, length=16)
        assert got == step_flops(config, shapes, whole, rows=3, length=16, pictures=0)


def test_a_visual_expert_costs_what_pictures_bring():
    config, got = tiny.SYSTEMS["visual_expert"], []
    for one in (dataclasses.replace(config, expert=False), config):
        shapes, _ = abstract(LVLM(one), dummy_batch(one))
        whole = jax.tree.map(lambda _: True, shapes)
        got.append([step_flops(one, shapes, whole, rows=1, length=64, pictures=n) for n in (0, 3)])
    assert got[0][0] == got[1][0]
    weights = sum(leaf.size for path, leaf in trees.flatten(shapes).items() if "/expert_" in path)
    connector = sum(leaf.size for leaf in jax.tree.leaves(shapes["connector"]) if len(leaf.shape) == 2)
    extra = (got[1][1] - got[1][0]) - (got[0][1] - got[0][0])
    # The language model's kernels once more, over the picture's positions; its two ends count with the connector.
    assert extra == 6 * 3 * (config.visual_tokens * weights + 2 * connector)


def test_gated_blocks_multiply_the_text_and_their_keys_the_pictures():
    config = tiny.SYSTEMS["flamingo"]
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    kernels = lambda part, *ends: sum(  # noqa: E731
        math.prod(leaf.shape)
        for path, leaf in trees.flatten(shapes[part]).items()
        if path.endswith(tuple(f"{end}/kernel" for end in ends or ("",)))
    )
    keys, text, tower = kernels("fusion", "attn/k", "attn/v"), 8, config.vision
    count = lambda pictures, *parts: step_flops(  # noqa: E731
        config, shapes, mask(shapes, *parts), rows=1, length=text, pictures=pictures
    )
    seen = 2 * tower.patches * kernels("vision") + 2 * 4 * (kernels("connector") + keys)
    seen += tower.depth * 4 * tower.patches**2 * tower.width
    assert count(1) - count(0) == seen
    # Trained blocks cost three times their forward pass, and the decoder behind them twice.
    blocks = 2 * text * (kernels("fusion") - keys) + 2 * 4 * text * 4 * 2 * 8  # two blocks, 4 keys, 2 heads of 8
    assert count(0, "fusion") == 3 * blocks + 2 * (count(0) - blocks)


@pytest.mark.parametrize("name", ["minigpt4", "videochat"])
def test_what_trains_behind_a_frozen_tower_sends_no_gradient_into_it(name):
    config = tiny.SYSTEMS[name]
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    sizes = {"rows": 1, "length": 8, "pictures": 3}
    flat = trees.flatten(shapes)

    def cost(*paths):
        chosen = trees.unflatten({path: path.startswith(("connector/", *paths)) for path in flat})
        return step_flops(config, shapes, chosen, **sizes)

    assert cost("vision/post_norm/") == cost()
    assert cost("vision/trunk/") > cost()
    own = sum(trees.size(leaf) for path, leaf in flat.items() if path.startswith("vision/globals/"))
    assert (cost("vision/globals/") > cost()) == (own > 0)
