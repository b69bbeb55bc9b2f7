"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures and videos of several shapes in packed rows, as the torch library's model
sees each conversation alone; the towers alone; positions; answers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lvlm_jax import params as P
from lvlm_jax.infer.generate import Generator
from lvlm_jax.models.lvlm import LVLM
from lvlm_jax.processing.native import positions
from tests import tiny
from tests.parity import compare, qwen_vl_tiny
from tests.parity.qwen_vl_tiny import CASES, alone, inputs, make, packed

# Two conversations a row: two shapes in one vision row, text alone; a video of an odd number of frames; a picture that
# is shrunk, one that is grown; a video among pictures.
ROWS = [
    [[3, (24, 16), 2, (17, 30), 4], [5]],
    [[2, (3, 32, 16), 3], [1, (200, 20), 2, (5, 5), 1]],
    [[1, (8, 8), 1, (4, 32, 8), 2, (24, 24), 3]],
]


def run(module, scan=False):
    module = LVLM(module.config, scan=scan)
    return tiny.jit(lambda params, batch: module.apply({"params": params}, batch, method=tiny.logits))


@pytest.mark.parametrize("case", CASES)
def test_logits_of_packed_rows(case):
    model, module, params, spec = make(case)
    rows, batch = packed(case, spec, ROWS)
    ours = np.asarray(run(module)(params, batch))
    with torch.no_grad():
        expected = [np.concatenate([alone(model, one, spec).numpy() for one in row]) for row in rows]
    ours = np.concatenate([ours[i, : len(row)] for i, row in enumerate(expected)])
    compare.close(ours, np.concatenate(expected), f"{case}, packed")


@pytest.mark.parametrize("case", CASES)
def test_positions_are_theirs(case):
    """Where a video is no longer than wide or high, their rule and the authors' agree."""
    model, _, _, spec = make(case)
    rows, _ = packed(case, spec, ROWS)
    for one in [one for row in rows for one in row if one.images]:
        given = inputs(one, spec)
        kept = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
        theirs, _ = model.model.get_rope_index(given["input_ids"], **{k: v for k, v in given.items() if k in kept})
        np.testing.assert_array_equal(one.axes, theirs[:, 0].T.numpy())


def test_positions_after_a_long_video():
    """They go on behind the largest position of all axes, as the authors' code and paper say (the torch library, from
    5 on, goes on behind the larger of height and width, so it is given the positions in `test_a_long_video`).
    """
    axes = positions(9, [(1, 7)], [(6, 2, 2)], 2)
    assert axes[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert axes[:, 1].tolist() == [0, 1, 1, 1, 1, 1, 1, 7, 8]
    slow = positions(5, [(1, 4)], [(3, 2, 2)], 2, [2.5])
    assert slow.tolist() == [[0, 0, 0], [1, 1, 1], [3, 1, 1], [6, 1, 1], [7, 7, 7]]


@pytest.mark.parametrize("case", ["qwen2_vl", "qwen2_5_vl"])
def test_a_long_video(case):
    model, module, params, spec = make(case)
    [[one]], batch = packed(case, spec, [[[2, (12, 16, 16), 4]]])
    with torch.no_grad():
        expected = alone(model, one, spec, position_ids=torch.tensor(one.axes.T)[:, None])
    compare.close(run(module)(params, batch)[0], expected, f"{case}, a long video")


@pytest.mark.parametrize("case", CASES)
def test_tower_and_merger(case):
    """Of one picture; in Qwen2.5-VL the tower's own order is window by window."""
    model, module, params, spec = make(case)
    [[one]], batch = packed(case, spec, [[[1, (40, 20), 1]]], vision_rows=1)
    given = inputs(one, spec)
    with torch.no_grad():
        seen = model.model.visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
    picture = [jnp.asarray(x) for x in (batch.patches[0], batch.patch_positions[0], batch.patch_segments[0])]
    apply = lambda p, *x: module.apply({"params": p}, *x, method=lambda m, *x: m.vision.features(*x))  # noqa: E731
    features = np.asarray(tiny.jit(apply)(params, *picture))[0]
    real = batch.patch_segments[0, 0] > 0
    compare.close(features[real, :32], seen.last_hidden_state, f"{case} tower")
    embed = lambda p, *x: module.apply({"params": p}, *x, method="embed_images")  # noqa: E731
    tokens = np.asarray(tiny.jit(embed)(params, *(x[None] for x in picture)))[0]
    tokens = tokens[batch.image_index[0][batch.image_index[0] >= 0]]
    theirs = [seen.pooler_output, *getattr(seen, "deepstack_features", ())]
    compare.close(tokens, torch.cat(theirs, -1), f"{case} merger")


@pytest.mark.parametrize("case", CASES)
def test_answers_are_theirs(case):
    """Greedy ids of two prompts in one batch, and of one alone; theirs one by one."""
    model, module, params, spec = make(case)
    rows, _ = packed(case, spec, [[[3, (24, 16), 2, (17, 30), 4]], [[6]]])
    prompts = [one for row in rows for one in row]
    generator = Generator(module, params, spec=spec)
    answers = [list(answer.tokens) for answer in generator.generate(prompts, max_new_tokens=6)]
    assert [list(generator.generate(prompts[:1], max_new_tokens=6)[0].tokens)] == answers[:1]
    for one, answer in zip(prompts, answers):
        model.model.rope_deltas = None
        model.generation_config.eos_token_id = None
        given = inputs(one, spec)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        whole = model.generate(**given, max_new_tokens=6, do_sample=False)
        assert whole[0, len(one.tokens) :].tolist() == answer


def test_answer_after_a_long_video_equals_the_full_pass():
    """Decoding goes on from the largest position of the prompt."""
    _, module, params, spec = make("qwen2_5_vl")
    [[one]], _ = packed("qwen2_5_vl", spec, [[[2, (12, 16, 16), 4]]])
    answer = Generator(module, params, spec=spec).generate([one], max_new_tokens=5)[0].tokens
    scores = run(module)
    for count, token in enumerate(answer):
        words = dataclasses.replace(
            one,
            tokens=np.append(one.tokens, answer[:count]).astype(np.int32),
            weights=np.ones(len(one.tokens) + count, np.float32),
            visual=np.append(one.visual, [-1] * count).astype(np.int32),
            axes=np.append(one.axes, one.axes.max() + 1 + np.arange(count)[:, None].repeat(3, 1), 0).astype(np.int32),
        )
        batch = qwen_vl_tiny.together([[words]], spec, length=len(one.tokens) + 5)
        logits = np.asarray(scores(params, batch))[0, len(words.tokens) - 1]
        assert int(logits.argmax()) == token


@pytest.mark.parametrize("case", ["qwen2_5_vl", "qwen3_vl"])
def test_scanned_layers_give_the_same(case):
    _, module, params, spec = make(case)
    _, batch = packed(case, spec, ROWS)
    plain = np.asarray(run(module)(params, batch))
    tiny.close(run(module, scan=True)(P.stack_layers(params), batch), plain)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    model, module, params, spec = make(case)
    talks, batch = packed(case, spec, ROWS[:1])
    pull = np.random.default_rng(1).normal(size=(batch.tokens.shape[1], 99)).astype(np.float32)
    expected = torch.cat([alone(model, one, spec) for one in talks[0]])
    (expected * torch.tensor(pull)).sum().backward()
    family = CASES[case][0]
    theirs = compare.gradients(model)
    rows = family.rows(module.config, "qwen_vl-nested")
    expected = P.flatten(P.unflatten({k: v for row in rows for k, v in row.load(theirs[row.theirs]).items()}))
    loss = lambda p, b: (module.apply({"params": p}, b, method=tiny.logits)[0] * pull).sum()  # noqa: E731
    ours = P.flatten(jax.jit(jax.grad(loss))(params, batch))
    for part in ("vision", "connector", "llm"):
        keys = sorted(k for k in ours if k.startswith(f"{part}/"))
        together = [np.concatenate([np.asarray(flat[k]).ravel() for k in keys]) for flat in (ours, expected)]
        compare.close(*together, f"{case} gradients of {part}")
