"""Generation with a visual expert: what a picture's positions hold depends on their row, so rows do not share them."""

import dataclasses

import pytest

from lvlm_jax.connectors import GatedConfig
from lvlm_jax.infer.prompt import as_example
from lvlm_jax.models.lvlm import LVLM
from tests.infer import tiny

SHORT = {"max_new_tokens": 6}


@pytest.mark.slow
def test_questions_about_one_picture_in_one_batch_are_answered_as_alone(pictures):
    plain = tiny.tiny_system()
    decoder = dataclasses.replace(plain.config.llm, kv_heads=plain.config.llm.heads)
    config = dataclasses.replace(plain.config, expert=True, connector=GatedConfig(hidden=24), llm=decoder)
    system = dataclasses.replace(plain, model=LVLM(config), params=tiny._weights(config))
    prompts = [["What is it?", pictures[0]], ["dogs", pictures[0]], [pictures[0], "Which color?"], ["no picture"]]
    together = system.generate_batch(prompts, **SHORT)
    assert together == [system.generate(prompt, **SHORT) for prompt in prompts]
    assert len(set(together)) > 2
    batch = system.generator.batch_of([system.encode(as_example(prompt)) for prompt in prompts], 4)
    assert batch.patches.shape[1] == 4  # three pictures, rounded up
