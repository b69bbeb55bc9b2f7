"""A tiny LLaVA learns from records with a video, answers on a clip, and after a stop goes on with the same frames."""

import json
import os
import signal

import numpy as np
import pytest
from ml_collections import ConfigDict

import lvlm_jax
from lvlm_jax import params as trees
from lvlm_jax import recipe, run
from lvlm_jax.data.loader import Loader
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.schema import Image, Video
from lvlm_jax.processing.video import choose, read_rows
from lvlm_jax.train.log import read_rows as log_rows
from lvlm_jax.train.loop import Preempted
from tests.e2e import story
from tests.processing import clips

VIDEO = VideoSpec(sampler="videochat", frames=4)
QUESTION = "what color is the shape?"


def told(folder, steps):
    """The recipe: one stage on two clips, a question each."""
    records = []
    for name, answer in (("a.mp4", "red"), ("b.mkv", "blue")):
        clips.write(folder / name, 30 if answer == "red" else 44)
        turns = [{"from": "human", "value": f"<video>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
        records.append({"video": name, "conversations": turns})
    (folder / "clips.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 8))
    c = story.get_config(str(folder))
    c.run, c.export, c.contrastive = ("instruct",), True, None
    del c.stages["vision"], c.stages["language"], c.stages["align"]
    c.model.video = {"sampler": "videochat", "frames": 4}
    c.stages.instruct.update(steps=steps, save_every=1)
    c.stages.instruct.start = ConfigDict()
    c.stages.instruct.data.update(path=str(folder / "clips.jsonl"), rows=8, pictures=32, groups=8)
    return recipe.resolve(c)


@pytest.fixture
def built(monkeypatch):
    """Batch number -> the patches of every time that it was built."""
    seen, build = {}, Loader.build

    def keep(self, k):
        batch = build(self, k)
        seen.setdefault(k, []).append(batch.patches)
        return batch

    monkeypatch.setattr(Loader, "build", keep)
    return seen


@pytest.mark.slow
def test_a_model_learns_from_videos_and_answers_about_one(tmp_path, built):
    resolved = told(tmp_path, steps=2)
    assert resolved.model.video == VIDEO
    run.train(resolved, tmp_path / "run")
    assert [row["step"] for row in log_rows(tmp_path / "run" / "instruct" / "metrics.jsonl")] == [1, 2]
    clip = str(tmp_path / "a.mp4")
    frames, _ = read_rows(Image(choose(Video(clip), VIDEO)), resolved.model.image)
    assert any(np.array_equal(group, frames) for group in built[0][0])

    model = lvlm_jax.load(tmp_path / "run")
    assert model.video == VIDEO
    answer = model.generate(QUESTION, videos=clip, max_new_tokens=4)
    assert model.chat().ask(QUESTION, videos=clip, max_new_tokens=4) == answer


@pytest.mark.nightly
def test_a_run_on_videos_that_was_stopped_goes_on_with_the_same_frames(tmp_path, built, monkeypatch):
    resolved = told(tmp_path, steps=6)
    whole = trees.flatten(run.train(resolved, tmp_path / "whole"))
    wanted = {k: patches[0] for k, patches in built.items()}
    built.clear()
    build = Loader.build

    def stop(self, k):
        if k == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return build(self, k)

    with monkeypatch.context() as patched, pytest.raises(Preempted):
        patched.setattr(Loader, "build", stop)
        run.train(resolved, tmp_path / "stopped")
    again = trees.flatten(run.train(resolved, tmp_path / "stopped"))
    assert all(np.array_equal(leaf, whole[path]) for path, leaf in again.items())
    assert all(np.array_equal(patches, wanted[k]) for k in range(6) for patches in built[k])
