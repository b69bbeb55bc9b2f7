"""Model FLOPs against the counts that everyone quotes."""

import dataclasses

import pytest

from lvlm_jax import llm
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.train.flops import factors, step_flops
from lvlm_jax.zoo import SYSTEMS


def test_frozen_parts_cost_two_before_and_four_after_a_trained_one():
    assert factors({"vision": False, "connector": True, "llm": False}) == {"vision": 2, "connector": 6, "llm": 4}
    assert factors({"vision": True, "connector": True, "llm": True}) == {"vision": 6, "connector": 6, "llm": 6}
    assert factors({"vision": False, "connector": False, "llm": True}) == {"vision": 2, "connector": 2, "llm": 6}


def test_llama_7b_is_six_times_its_weights_plus_attention():
    config = SYSTEMS["llava15_7b"].config
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    full = {"vision": True, "connector": True, "llm": True}
    got = step_flops(config, shapes, full, rows=1, length=4096, pictures=0)
    # One LLaMA-7B layer at 4,096 tokens: 5.39 TF (6N and causal attention); 32 of them, and the head of 32,064 words.
    head = 6 * 4096 * 4096 * 32064
    assert got == pytest.approx(32 * 5.39e12 + head, rel=0.005)


def test_alignment_costs_four_sixths_of_the_full_step_in_the_language_model():
    config = SYSTEMS["llava15_7b"].config
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    sizes = {"rows": 2, "length": 2048, "pictures": 0}
    full = step_flops(config, shapes, {"vision": True, "connector": True, "llm": True}, **sizes)
    align = step_flops(config, shapes, {"vision": False, "connector": True, "llm": False}, **sizes)
    assert align / full == pytest.approx(4 / 6)


@pytest.mark.parametrize("length", [2048, 8192])
def test_attention_costs_what_a_window_lets_it_see(length):
    whole, near = ({"llm": True, "vision": True, "connector": True}, 4096)
    wide = dataclasses.replace(SYSTEMS["llava15_7b"].config, llm=llm.PRESETS["mistral_7b_v02"])
    narrow = dataclasses.replace(wide, llm=dataclasses.replace(wide.llm, window=near, pattern=("local", "global")))
    shapes, _ = abstract(LVLM(wide), dummy_batch(wide))
    saved = [step_flops(c, shapes, whole, rows=1, length=length, pictures=0) for c in (wide, narrow)]
    hidden = sum(max(0, t + 1 - near) for t in range(length))  # pairs beyond the window, in one of its 16 layers
    assert saved[0] - saved[1] == pytest.approx(3 * 16 * 4 * 4096 * hidden, rel=1e-3)
