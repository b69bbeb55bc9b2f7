import dataclasses
import io

import numpy as np
import pytest

from lvlm_jax import cli
from lvlm_jax.infer.prompt import as_example, as_videos
from lvlm_jax.infer.terminal import repl
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.picture import ImageError
from lvlm_jax.processing.schema import Clip, Image, Text, Turn, Video
from lvlm_jax.processing.video import choose, frames
from tests.infer.tiny import few_shapes
from tests.processing import clips

SHORT = {"max_new_tokens": 6}


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    few_shapes(monkeypatch)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clips.write(tmp_path_factory.mktemp("clip") / "clip.mp4", 30)


@pytest.fixture
def looking(system):
    """The tiny system, which is shown three frames."""
    return dataclasses.replace(system, video=VideoSpec(frames=3))


def test_a_video_is_seen_as_its_frames(looking, clip):
    encoded = looking.encode(as_example("What happens?", videos=clip))
    batch = looking.generator.batch_of([encoded], 1)
    shown = [np.asarray(frame) for frame in frames(choose(Video(str(clip)), looking.video))]
    pictures = looking.generator.batch_of([looking.encode(as_example("What happens?", images=shown))], 1)
    np.testing.assert_array_equal(batch.patches, pictures.patches)
    assert (batch.image_index >= 0).sum() == (pictures.image_index >= 0).sum()


@pytest.mark.slow
def test_prompts_hold_videos_in_every_form(looking, clip):
    wanted = looking.generate("What?", videos=clip, **SHORT)
    part = {"type": "text", "text": "What?"}
    bare = [{"role": "user", "content": [{"type": "video"}, part]}]
    named = [{"role": "user", "content": [{"type": "video", "video": str(clip)}, part]}]
    assert looking.generate([Video(str(clip)), "What?"], **SHORT) == wanted
    assert looking.generate(bare, videos=[clip], **SHORT) == wanted
    assert looking.generate_batch([named], **SHORT) == [wanted]
    assert looking.generate("What?", videos=clip.read_bytes(), **SHORT) == wanted
    assert as_videos(None) == ()


def test_the_prompt_of_a_record_shows_where_the_video_stands(looking, clip):
    told = dataclasses.replace(looking, video=VideoSpec(frames=3, sentence="videochat"))
    text = told.prompt_text(as_example("What?", videos=clip))
    assert "<video>\nThe video contains 3 frames sampled at 0.0, 0.6, 1.2 seconds.\nWhat?" in text


def test_a_newline_that_the_model_has_not_learned_is_refused(system):
    with pytest.raises(ValueError, match=r"video\.newline='frame': this model learned no newline; use 'none'"):
        dataclasses.replace(system, video=VideoSpec(newline="frame"))


@pytest.mark.slow
def test_a_chat_keeps_the_frames_that_it_saw(looking, clip, tmp_path):
    gone = tmp_path / "gone.mp4"
    gone.write_bytes(clip.read_bytes())
    chat = looking.chat()
    first = chat.ask("What?", videos=gone, **SHORT)
    assert first == looking.generate("What?", videos=clip, **SHORT)
    gone.unlink()
    second = chat.ask("And then?", **SHORT)
    turns = (Turn("user", (Video(str(clip)), Text("What?"))), Turn("assistant", (Text(first),)))
    assert second == looking.generate([*turns, Turn("user", (Text("And then?"),))], **SHORT)
    held = chat.turns[0].segments[0]
    assert isinstance(held, Image)
    assert isinstance(held.source, Clip)
    assert held.source.times == choose(Video(str(clip)), looking.video).times


@pytest.mark.slow
def test_the_chat_command_takes_videos(looking, clip):
    lines = iter([f"/video {clip} no.mp4", "What?", "/video", "/quit"])
    asked, out = [], io.StringIO()
    repl(looking, read=lambda prompt: asked.append(prompt) or next(lines), out=out, **SHORT)
    assert asked == ["you> ", "you [1 video(s)]> ", "you> ", "you> "]
    said = out.getvalue()
    assert f"{clip}: 96 x 64, 1.2 s, 3 frames are shown; now ask about it" in said
    assert "no.mp4: the file does not exist" in said
    assert "/video: give the path of a video" in said
    assert looking.generate("What?", videos=clip, **SHORT) in said


@pytest.mark.slow
def test_the_command_answers_about_a_clip(looking, clip, monkeypatch, capsys):
    monkeypatch.setattr("lvlm_jax.api.load", lambda name, **options: dataclasses.replace(looking, name=name))
    line = ["generate", "tiny", "--prompt", "What?", "--max-new-tokens", "6", "--video"]
    assert cli.main([*line, str(clip), "--no-stream"]) == 0
    assert capsys.readouterr().out.strip() == looking.generate("What?", videos=clip, **SHORT)
    wide = dataclasses.replace(looking, video=VideoSpec(frames=5))
    assert cli.main([*line, str(clip), "--no-stream", "--frames", "5"]) == 0
    assert capsys.readouterr().out.strip() == wide.generate("What?", videos=clip, **SHORT)
    assert cli.main([*line, "no.mp4"]) == 2
    assert capsys.readouterr().err.startswith("lvlm generate: --video no.mp4: the file does not exist; check the path")
    assert cli.main([*line, str(clip), "--frames", "0"]) == 2
    assert "frames 0: at least 1" in capsys.readouterr().err


def test_a_clip_given_as_a_picture_is_an_error_that_says_so(looking, clip):
    with pytest.raises(ImageError, match="is a video, not a picture; give it as one: videos="):
        looking.generate("What?", images=clip, **SHORT)
