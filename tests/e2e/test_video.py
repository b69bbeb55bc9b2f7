"""A tiny LLaVA learns from records with a video, is stopped and goes on with the same frames, and answers on a clip."""

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
from lvlm_jax.train.loop import Preempted
from tests.e2e import story
from tests.processing import clips

VIDEO = VideoSpec(sampler="videochat", frames=4)
STEPS = 4


def told(folder):
    """The recipe: one stage on two clips, a question each."""
    records = []
    for name, answer in (("a.mp4", "red"), ("b.mkv", "blue")):
        clips.write(folder / name, 30 if answer == "red" else 44)
        turns = [{"from": "human", "value": "<video>\nwhat color is the shape?"}, {"from": "gpt", "value": answer}]
        records.append({"video": name, "conversations": turns})
    (folder / "clips.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 8))
    c = story.get_config(str(folder))
    c.run, c.export, c.contrastive = ("instruct",), True, None
    del c.stages["vision"], c.stages["language"], c.stages["align"]
    c.model.video = {"sampler": "videochat", "frames": 4}
    c.stages.instruct.update(steps=STEPS, save_every=1)
    c.stages.instruct.start = ConfigDict()
    c.stages.instruct.data.update(path=str(folder / "clips.jsonl"), rows=8, pictures=32, groups=8)
    return recipe.resolve(c)


@pytest.mark.slow
def test_a_run_on_videos_stops_resumes_and_answers(tmp_path, monkeypatch):
    resolved = told(tmp_path)
    assert resolved.model.video == VIDEO
    seen = {"whole": {}, "stopped": {}}
    built, name = Loader.build, "whole"

    def build(self, k):
        batch = built(self, k)
        seen[name].setdefault(k, []).append(batch.patches)
        if name == "stopped" and k == 1 and len(seen[name][k]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    monkeypatch.setattr(Loader, "build", build)
    whole = run.train(resolved, tmp_path / "whole")
    name = "stopped"
    with pytest.raises(Preempted):
        run.train(resolved, tmp_path / "stopped")
    again = run.train(resolved, tmp_path / "stopped")
    flat = trees.flatten(whole)
    assert all(np.array_equal(leaf, flat[path]) for path, leaf in trees.flatten(again).items())
    for k in range(STEPS):
        assert all(np.array_equal(patches, seen["whole"][k][0]) for patches in seen["stopped"][k])
    clip = choose(Video(str(tmp_path / "a.mp4")), VIDEO)
    frames = read_rows(Image(clip), resolved.model.image)[0]
    assert any(np.array_equal(group, frames) for group in seen["whole"][0][0])

    model = lvlm_jax.load(tmp_path / "stopped")
    assert model.video == VIDEO
    asked = {"max_new_tokens": 4}
    answer = model.generate("what color is the shape?", videos=tmp_path / "a.mp4", **asked)
    assert answer == model.generate([Video(str(tmp_path / "a.mp4")), "what color is the shape?"], **asked)
    assert model.chat().ask("what color is the shape?", videos=str(tmp_path / "a.mp4"), **asked) == answer
