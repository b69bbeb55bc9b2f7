"""A tiny LLaVA learns from records with a video, and answers about a clip."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

import lvlm_jax
from lvlm_jax import recipe, run
from lvlm_jax.data.loader import Loader
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.schema import Image, Video
from lvlm_jax.processing.video import choose, read_rows
from lvlm_jax.train.log import read_rows as log_rows
from tests.e2e import story
from tests.processing import clips

VIDEO = VideoSpec(sampler="videochat", frames=4)
QUESTION = "what color is the shape?"


def told(folder):
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
    c.stages.instruct.update(steps=2)
    c.stages.instruct.start = ConfigDict()
    c.stages.instruct.data.update(path=str(folder / "clips.jsonl"), rows=8, pictures=32, groups=8)
    return recipe.resolve(c)


@pytest.fixture
def built(monkeypatch):
    """Batch number -> the patches that the run was given."""
    seen, build = {}, Loader.build

    def keep(self, k):
        batch = build(self, k)
        seen[k] = batch.patches
        return batch

    monkeypatch.setattr(Loader, "build", keep)
    return seen


@pytest.mark.slow
def test_a_model_learns_from_videos_and_answers_about_one(tmp_path, built):
    resolved = told(tmp_path)
    assert resolved.model.video == VIDEO
    run.train(resolved, tmp_path / "run")
    assert [row["step"] for row in log_rows(tmp_path / "run" / "instruct" / "metrics.jsonl")] == [1, 2]
    clip = str(tmp_path / "a.mp4")
    frames, _ = read_rows(Image(choose(Video(clip), VIDEO)), resolved.model.image)
    assert any(np.array_equal(group, frames) for group in built[0])

    model = lvlm_jax.load(tmp_path / "run")
    assert model.video == VIDEO
    answer = model.generate(QUESTION, videos=clip, max_new_tokens=4)
    assert model.chat().ask(QUESTION, videos=clip, max_new_tokens=4) == answer
