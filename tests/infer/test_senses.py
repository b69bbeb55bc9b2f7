"""Questions about features: what a named sense reads, in prompts of every form, alone and in batches."""

import dataclasses
import functools
import io

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.connectors import MlpConfig
from lvlm_jax.infer.prompt import as_example
from lvlm_jax.infer.terminal import repl
from lvlm_jax.models.lvlm import LVLM
from lvlm_jax.models.senses import FeatureSlot, Sense
from lvlm_jax.processing.schema import Features, Image
from tests.infer.tiny import few_shapes, tiny_system

A, B = (np.random.default_rng(seed).normal(size=(3 + seed, 5)).astype(np.float32) for seed in (1, 2))


@functools.cache
def system():
    base = tiny_system()
    sense = Sense(encoder=FeatureSlot(length=6, width=5), connector=MlpConfig())
    rng, width = np.random.default_rng(0), base.config.llm.width
    sizes = {"linear_1": (5, width), "linear_2": (width, width)}
    connector = {
        name: {"kernel": jnp.asarray(rng.normal(size=size), jnp.float32), "bias": jnp.zeros(size[1], jnp.float32)}
        for name, size in sizes.items()
    }
    config = dataclasses.replace(base.config, senses=(("audio", sense),))
    params = {**base.params, "senses": {"audio": {"connector": connector}}}
    return dataclasses.replace(base, model=LVLM(config), params=params)


def test_every_form_of_prompt(tmp_path, monkeypatch):
    few_shapes(monkeypatch)
    np.save(tmp_path / "a.npy", A)
    ask = functools.partial(system().generate, max_new_tokens=6)
    wanted = ask("what?", features={"audio": A})
    assert ask("what?", features={"audio": str(tmp_path / "a.npy")}) == wanted
    assert ask([Features(A, "audio"), "what?"]) == wanted
    part = {"type": "features", "features": A, "sense": "audio"}
    assert ask([{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]) == wanted
    assert ask("what?", features={"audio": B}) != wanted
    assert ask("what?") == tiny_system().generate("what?", max_new_tokens=6)  # without features: the model as it was


def test_a_batch_answers_as_each_alone(monkeypatch):
    few_shapes(monkeypatch)
    picture = np.random.default_rng(3).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    prompts = [
        [Features(A, "audio"), "what?"],
        ["plain words"],
        [Image(picture), Features(B, "audio"), Features(A, "audio"), "both?"],
    ]
    together = system().generate_batch(prompts, max_new_tokens=6)
    assert together == [system().generate(prompt, max_new_tokens=6) for prompt in prompts]


def test_what_is_kept_of_a_chat(tmp_path, monkeypatch):
    few_shapes(monkeypatch)
    file = tmp_path / "a.npy"
    np.save(file, A)
    chat = system().chat()
    chat.ask("what?", features={"audio": str(file)}, max_new_tokens=3)
    file.unlink()
    chat.ask("and now?", max_new_tokens=3)
    np.testing.assert_array_equal(chat.turns[0].segments[0].source, A)


def test_the_terminal(tmp_path, monkeypatch):
    few_shapes(monkeypatch)
    np.save(tmp_path / "a.npy", A)
    lines, out = iter(["/features touch=x.npy", f"/features audio={tmp_path}/a.npy", "what?", "/quit"]), io.StringIO()
    asked = []

    def read(prompt):
        asked.append(prompt)
        return next(lines)

    repl(system(), read=read, out=out, thumbnails=False, max_new_tokens=3)
    assert "/features touch=x.npy: give SENSE=PATH; its senses are audio" in out.getvalue()
    assert "a.npy: for sense audio; now ask about it" in out.getvalue()
    assert asked == ["you> ", "you> ", "you [1 other(s)]> ", "you> "]


def test_a_prompt_as_text():
    assert "<audio>" in system().prompt_text(as_example("what?", features={"audio": A}))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"touch": A}, r"sense 'touch': the model has no such sense, its senses are audio"),
        ({"audio": A[:, :4]}, r"vectors of 4 values, but sense 'audio' reads 5"),
        ({"audio": 3}, r"features\['audio'\]: int; give a path, or an array"),
        (A, r"features: ndarray; give \{sense: features\}"),
        ({"audio": "picture.png"}, r"sense 'audio' reads features, but this is a picture"),
    ],
)
def test_what_is_refused(features, message):
    with pytest.raises(ValueError, match=message):
        system().generate("what?", features=features)
