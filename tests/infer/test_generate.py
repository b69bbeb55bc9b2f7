import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as M
from lvlm_jax.data.collate import collate
from lvlm_jax.infer import generate as G
from lvlm_jax.infer.prompt import as_example
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.processing.schema import Encoded
from tests.infer.tiny import tiny_system

QUESTIONS = ["What is it?", "Which color is the big circle in the image?", "dogs", "Is there a yellow bird near it?"]


@pytest.fixture(scope="module")
def prompts(system, pictures):
    shown = [pictures[0], [pictures[1], pictures[2]], None, pictures[0]]
    return [system.encode(as_example(text, images)) for text, images in zip(QUESTIONS, shown)]


@functools.partial(jax.jit, static_argnames=("model",))
def whole_pass(model, params, batch, last):
    hidden, _ = model.apply({"params": params}, batch)
    return model.apply({"params": params}, hidden[0, last], method="logits")


def by_full_passes(system, prompt, count, length=64):
    """Greedy tokens by running the whole sequence anew for each: no cache, no other rows, padding on the right."""
    out = []
    for _ in range(count):
        tokens = np.concatenate([prompt.tokens, out]).astype(np.int32)
        visual = np.concatenate([prompt.visual, np.full(len(out), -1)]).astype(np.int32)
        longer = Encoded(tokens, np.zeros(len(tokens), np.float32), visual, prompt.images, prompt.rows, prompt.sizes)
        batch = collate(
            [[longer]],
            length=length,
            groups=1,
            vision_rows=max(2, prompt.vision_rows),
            visual_tokens=system.config.visual_tokens,
            pad_id=0,
            spec=system.spec,
        )
        out.append(int(whole_pass(system.model, system.params, batch, len(tokens) - 1).argmax()))
    return tuple(out)


def free(system, **changes):
    """A generator that no token ends."""
    generator = dataclasses.replace(system, **changes).generator
    generator.eos_ids = frozenset()
    return generator


def tokens_of(answers):
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("scan", [False, True])
def test_cached_batched_padded_decoding_equals_full_passes(scan, prompts):
    system = tiny_system(scan=scan)
    answers = free(system).generate(prompts, max_new_tokens=6)
    expected = [by_full_passes(system, prompt, 6) for prompt in prompts]
    assert tokens_of(answers) == expected
    assert len(set(expected)) == len(expected)  # the model listens to what it is asked and shown
    assert [answer.reason for answer in answers] == ["length"] * 4
    assert [answer.prompt_tokens for answer in answers] == [len(p.tokens) for p in prompts]


@pytest.mark.slow
def test_a_repetition_penalty_counts_what_the_answer_has(system, prompts):
    plain = tokens_of(free(system).generate(prompts, max_new_tokens=8))
    drawn = {"max_new_tokens": 8, "sampling": Sampling(repetition_penalty=1e6)}
    for tokens, before in zip(tokens_of(free(system).generate(prompts, **drawn)), plain):
        assert len(set(tokens)) == len(tokens)
        new = next((i for i in range(8) if before[i] in before[:i]), 8)
        assert tokens[:new] == before[:new]  # until one comes again


@pytest.mark.slow
def test_pictures_of_any_resolution():
    """Wide, tall and square ones, two in one prompt, one in two prompts; its tiles are read once."""
    system = tiny_system(tiles=True)
    rng = np.random.default_rng(1)
    wide, tall, square = (rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((16, 40), (50, 20), (30, 30)))
    shown = [wide, [tall, square], None, wide]
    prompts = [system.encode(as_example(text, images)) for text, images in zip(QUESTIONS, shown)]
    assert [prompt.rows for prompt in prompts] == [(3,), (3, 5), (), (3,)]
    answers = free(system).generate(prompts, max_new_tokens=4)
    assert tokens_of(answers) == [by_full_passes(system, prompt, 4, length=96) for prompt in prompts]
    assert system.embed_images([wide, square]).shape == (3 + 5, 4, 32)


def test_the_prefix_of_a_prefix_model_is_the_prompt(prompts):
    system = tiny_system(attention="prefix")
    first = tokens_of(free(system).generate(prompts, max_new_tokens=1))
    assert first == [by_full_passes(system, prompt, 1) for prompt in prompts]
    assert first != [by_full_passes(tiny_system(), prompt, 1) for prompt in prompts]


@pytest.mark.parametrize("preset", ["DP", pytest.param("FSDP", marks=pytest.mark.slow), "FSDP_TP"])
def test_sharded_equals_unsharded(system, prompts, preset):
    alone = free(system).generate(prompts, max_new_tokens=5)
    mesh = M.make_mesh(preset)
    sharded = free(system, mesh=mesh)
    assert tokens_of(sharded.generate(prompts, max_new_tokens=5)) == tokens_of(alone)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(sharded.params)) == (preset == "DP")
    if preset == "FSDP_TP":
        drawn = {"max_new_tokens": 4, "sampling": Sampling(temperature=1.0, seed=4)}
        assert tokens_of(sharded.generate(prompts, **drawn)) == tokens_of(free(system).generate(prompts, **drawn))


@pytest.mark.slow
def test_rows_do_not_depend_on_what_stands_beside_them(system, prompts):
    drawn = {"max_new_tokens": 5, "sampling": Sampling(temperature=1.5, top_k=50, top_p=0.9, seed=7)}
    two = prompts[::3]
    together = free(system).generate(two, rows=2, **drawn)
    assert tokens_of(free(system).generate(two, rows=1, **drawn)) == tokens_of(together)
    drawn["sampling"] = dataclasses.replace(drawn["sampling"], seed=8)
    assert tokens_of(free(system).generate(two, rows=2, **drawn)) != tokens_of(together)


def test_a_picture_in_several_rows_is_one_vision_row(system, pictures):
    same = [system.encode(as_example(q, pictures[0])) for q in QUESTIONS]
    batch = system.generator.batch_of(same, 4)
    assert batch.patches.shape[:2] == (1, 1)
    assert system.generator.batch_of([*same[:3], system.encode(as_example("a", pictures[1]))], 4).patches.shape[1] == 2
    assert system.generator.batch_of([system.encode(as_example("a"))], 4).patches.shape[1] == 0


def test_few_shapes_are_compiled(system, pictures):
    generator = system.generator
    texts = ["dogs " * n for n in range(1, 4)]
    encoded = [system.encode(as_example(t, pictures[0])) for t in texts]
    lengths = {G.bucket(len(e.tokens)) for e in encoded}
    before = G.prefill._cache_size(), G.decode._cache_size()
    for prompt in encoded:
        for new in (9, 12, 16):
            generator.generate([prompt], rows=1, max_new_tokens=new)
    assert G.prefill._cache_size() - before[0] <= len(lengths)
    assert G.decode._cache_size() - before[1] <= len(lengths)


def test_buckets_waste_at_most_a_quarter():
    for length in range(33, 3000):
        assert length <= G.bucket(length) < 1.25 * length + 1
    assert len({G.bucket(n) for n in range(1, 2049)}) < 35


def test_prefill_holds_no_logits_but_the_last_and_the_cache_is_donated(system, prompts):
    generator = system.generator
    batch = generator.batch_of(prompts, 4)
    rows, length = batch.tokens.shape
    vocab = system.config.llm.vocab
    static = (generator.model, None, "greedy")
    numbers = Sampling().numbers
    traced = jax.make_jaxpr(lambda p, b: G.prefill(*static, 8, p, b, None, numbers))(generator.params, batch)
    assert f"[{rows},{length},{vocab}]" not in str(traced)
    assert f"[{rows},{vocab}]" in str(traced)
    cache, place = G.prefill(*static, 8, generator.params, batch, None, numbers)
    leaves = jax.tree.leaves(cache)
    G.decode(*static, generator.params, cache, place, numbers)
    assert all(leaf.is_deleted() for leaf in leaves)


def test_an_end_token_ends_its_row_alone(system, prompts):
    generator = free(system)
    whole = generator.generate(prompts, max_new_tokens=6)
    end = whole[0].tokens[2]
    generator.eos_ids = frozenset({end})
    for before, answer in zip(whole, generator.generate(prompts, max_new_tokens=6)):
        cut = before.tokens.index(end) if end in before.tokens else 6
        assert answer.tokens == before.tokens[:cut]
        assert answer.reason == ("length" if cut == 6 else "stop")


def test_stop_strings_and_streaming_give_the_same_text(system, prompts):
    generator = free(system)
    whole = generator.generate(prompts[:1], max_new_tokens=12)[0].text
    assert "".join(generator.stream(prompts[0], max_new_tokens=12)) == whole
    stop = whole[len(whole) // 2 :][:3]
    cut = generator.generate(prompts[:1], max_new_tokens=12, stop=[stop])[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.reason == "stop"
    assert "".join(generator.stream(prompts[0], max_new_tokens=12, stop=[stop])) == cut.text


def test_more_prompts_than_rows_keep_their_order(system, prompts):
    many = [prompts[i % 4] for i in range(11)]
    answers = free(system).generate(many, rows=4, max_new_tokens=3)
    single = free(system).generate(prompts, max_new_tokens=3)
    assert tokens_of(answers) == [single[i % 4].tokens for i in range(11)]
    assert free(system).generate([], max_new_tokens=3) == []


def test_a_prompt_that_does_not_fit_names_both_numbers(system, prompts):
    with pytest.raises(ValueError, match=rf"prompt of {len(prompts[0].tokens)} tokens .*max_new_tokens=190 .*is 192"):
        system.generator.generate(prompts, max_new_tokens=190)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        system.generator.generate(prompts, max_new_tokens=0)
    fits = 192 - len(prompts[0].tokens)
    answer = free(system).generate(prompts[:1], max_new_tokens=fits)[0]
    assert len(answer.tokens) == fits


def test_bfloat16_generates(system, prompts):
    half = dataclasses.replace(system, model=system.model.clone(dtype=jnp.bfloat16))
    assert len(free(half).generate(prompts[:1], max_new_tokens=3)[0].tokens) == 3
