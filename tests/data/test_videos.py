"""Records with videos, from the file to the batch."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lvlm_jax.data.check import check
from lvlm_jax.data.collate import collate
from lvlm_jax.data.lengths import measure_lengths
from lvlm_jax.data.loader import Loader
from lvlm_jax.data.packing import PackingPlan
from lvlm_jax.data.parquet import Parquet
from lvlm_jax.data.show import show
from lvlm_jax.data.sources import LlavaJson, Messages, Numbered
from lvlm_jax.data.tars import TarPairs
from lvlm_jax.processing.augment import augment
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.image import to_patches
from lvlm_jax.processing.schema import NEWLINE, TEXT, Clip, Example, Image, Text, Turn, Video
from lvlm_jax.processing.video import frames
from tests.processing import clips

Q = 4
THREE = VideoSpec(frames=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips and a picture."""
    folder = tmp_path_factory.mktemp("videos")
    clips.write(folder / "a.mp4", 30)
    clips.write(folder / "b.mkv", 20)
    import PIL.Image

    PIL.Image.fromarray(clips.picture(5)).save(folder / "p.png")
    return folder


def lines(folder, *records, name="x.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def llava(value, **fields):
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "red circle"}], **fields}


def asked(example):
    """The segments of the user's turn, files by their names."""
    said = next(turn for turn in example.turns if turn.role == "user").segments
    return [s.text if isinstance(s, Text) else type(s)(str(s.source).rsplit("/", 1)[-1]) for s in said]


A, B, P = Video("a.mp4"), Video("b.mkv"), Image("p.png")
LLAVA = {
    "its own mark": (llava("<video>\nwhat?", video="a.mp4"), [A, "what?"]),
    "the picture's mark, as LLaVA-Video writes it": (llava("<image>\nwhat?", video="a.mp4"), [A, "what?"]),
    "one mark goes first": (llava("what?\n<video>", video="a.mp4"), [A, "what?"]),
    "several": (llava("<video>\nand\n<video>\nhow?", videos=["a.mp4", "b.mkv"]), [A, "and", B, "how?"]),
    "beside a picture": (llava("<video>is <image>?", video="a.mp4", image="p.png"), [A, "is ", P, "?"]),
    "without a video the mark is text": (llava("<image>\na <video> tag", image="p.png"), [P, "a <video> tag"]),
}


@pytest.mark.parametrize("name", LLAVA)
def test_llava_records_place_their_videos(folder, name):
    record, wanted = LLAVA[name]
    example = LlavaJson(lines(folder, record))[0]
    assert asked(example) == [Text(w).text if isinstance(w, str) else w for w in wanted]


def test_messages_place_their_videos(folder):
    parts = [
        {"type": "video", "video": "a.mp4"},
        {"type": "image", "image": "p.png"},
        {"type": "video"},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
        {"type": "text", "text": "<video>?"},
    ]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    example = Messages(lines(folder, {"messages": said, "videos": ["b.mkv"]}))[0]
    assert asked(example) == [A, P, B, A, "<video>?"]
    assert example.videos == (Video(str(folder / "a.mp4")), Video(str(folder / "b.mkv")), Video(str(folder / "a.mp4")))


def test_tables_and_tars_hold_videos_as_bytes(folder):
    data = (folder / "a.mp4").read_bytes()
    rows = {"video": [{"bytes": data, "path": None}], "question": ["what?"], "answer": ["red"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "x.parquet")
    assert Parquet(folder / "x.parquet")[0].turns[0].segments == (Video(data), Text("what?"))
    qa = {"video": [data], "QA": [[{"i": "Be brief.", "q": "what?", "a": "red"}, {"i": "", "q": "how?", "a": "so"}]]}
    pyarrow.parquet.write_table(pyarrow.table(qa), folder / "qa.parquet")
    assert Parquet(folder / "qa.parquet")[0].turns == (
        Turn("system", (Text("Be brief."),)),
        Turn("user", (Video(data), Text("what?"))),
        Turn("assistant", (Text("red"),)),
        Turn("user", (Text("how?"),)),
        Turn("assistant", (Text("so"),)),
    )
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, content in (("k.mp4", data), ("k.txt", b"a red circle")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert TarPairs(folder / "x.tar")[0].turns[0].segments == (Video(data),)


BAD = {
    "a mark too many": (llava("<video><video>", video="a.mp4"), "2 x <video> in 'conversations' but 1 video(s) in"),
    "no mark": (llava("what?", video="a.mp4"), "0 x <video> in 'conversations' but 1 video(s) in 'video'; add <video>"),
    "a number": (llava("<video>", video=3), "'video' must hold a path or a data: URL, this is a number"),
    "outside": (llava("<video>", video="../a.mp4"), "leaves the picture folder"),
    "an address": (llava("<video>", video="https://x.org/a.mp4"), "nothing is fetched from the network"),
    "not there": (llava("<video>", video="no.mp4"), "no.mp4: the file does not exist; check the path in the record"),
    "no video": (llava("<video>", video="p.png"), "p.png: is not a video that is read here"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_names_line_and_fix(folder, encoder, name):
    record, message = BAD[name]
    path = lines(folder, llava("hi"), record)
    with pytest.raises(DataError) as caught:
        encoder(LlavaJson(path)[1])
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_a_video_is_counted_by_its_header_and_its_frames_are_vision_rows(folder, encoder, spec, monkeypatch):
    source = LlavaJson(lines(folder, llava("<video>\nwhat is it?", video="a.mp4")))
    spy = functools.partial(encoder, video=THREE)
    monkeypatch.setattr("lvlm_jax.processing.video._Reader", None)  # nothing is decoded
    measured = measure_lengths(source, spy, progress=False)
    encoded = spy(source[0])
    monkeypatch.undo()
    assert (measured.lengths.tolist(), measured.pictures.tolist()) == ([len(encoded.tokens)], [3])
    assert (encoded.rows, encoded.sizes) == ((3,), (3 * Q,))
    clip = encoded.images[0].source
    assert clip.indices == (0, 14, 29)
    batch = collate([[encoded]], length=40, groups=1, vision_rows=4, visual_tokens=Q, pad_id=0, spec=spec)
    for row, frame in enumerate(frames(clip)):
        np.testing.assert_array_equal(batch.patches[0, row], to_patches(frame, spec)[0])
    assert batch.patch_segments[0].any(1).tolist() == [True, True, True, False]
    seen = batch.image_index[0][batch.image_index[0] != TEXT]
    assert seen.tolist() == list(range(3 * Q))


def test_the_newline_of_a_frame_is_the_models_own(folder, encoder, spec):
    example = LlavaJson(lines(folder, llava("<video>\nwhat?", video="a.mp4")))[0]
    encoded = encoder(example, video=dataclasses.replace(THREE, newline="row"))
    assert encoded.sizes == (3 * (Q + 2),)
    assert (encoded.visual == NEWLINE).sum() == 6
    batch = collate([[encoded]], length=60, groups=1, vision_rows=4, visual_tokens=Q, pad_id=0, spec=spec)
    seen = batch.image_index[0][batch.image_index[0] != TEXT]
    assert seen.tolist()[:6] == [0, 1, 4 * Q, 2, 3, 4 * Q]


def test_the_sentence_on_the_frames_stands_between_them_and_the_question(folder, encoder, tokenizer):
    example = LlavaJson(lines(folder, llava("<video>\nwhat is it?", video="a.mp4")))[0]
    said = []
    rendering = dataclasses.replace(
        encoder.keywords["template"], builder=lambda system, turns, generate: said.extend(turns) or []
    )
    with pytest.raises(DataError):
        encoder(example, template=rendering, video=dataclasses.replace(THREE, sentence="videochat"))
    clip, sentence, question = said[0].segments
    assert isinstance(clip.source, Clip)
    assert sentence == Text("The video contains 3 frames sampled at 0.0, 0.6, 1.2 seconds.\n")
    assert question == Text("what is it?")


def test_more_frames_than_a_row_holds_is_an_error_that_says_how_to_take_fewer(folder, encoder):
    example = LlavaJson(lines(folder, llava("<video>\nwhat?", video="a.mp4")))[0]
    with pytest.raises(DataError, match=r"\(image 0 of 1, a video of 30 frames, fills.* \(model\.video\.frames\)$"):
        encoder(example, video=VideoSpec(frames=99), max_length=64)


def test_check_and_show_see_videos(folder, encoder, spec, tokenizer):
    path = lines(
        folder,
        llava("<video>\nwhat is it?", video="a.mp4"),
        llava("<image>\nwhat is it?", image="p.png"),
        llava("<video>\nwhat is it?", video="no.mp4"),
    )
    source, encode = LlavaJson(path), functools.partial(encoder, video=THREE)
    report = check(source, encode, progress=False, spec=spec)
    assert [bad.origin for bad in report.bad] == [f"{path}:3"]
    assert "3 records: 2 good, 1 bad; 4 pictures with the frames of 1 video(s) (decoded)" in str(report)
    shown = show(source[0], encode(source[0]), tokenizer, colour=False)
    assert "[video 3 frames of 96x64 x12 tokens]" in shown
    coloured = show(source[0], encode(source[0]), tokenizer, thumbnail=8)
    assert all(f"video 0 at {time} s:\n" in coloured for time in ("0.0", "0.6", "1.2"))


def loader(folder, encoder, spec, **options):
    record = llava("<video>\nwhat is it?", video="a.mp4"), llava("<video>\nwhat color?", video="b.mkv")
    source = LlavaJson(lines(folder, *record * 4, name="many.jsonl"))
    encode = functools.partial(encoder, video=THREE)
    lengths, pictures, _ = measure_lengths(source, encode, progress=False)
    plan = PackingPlan(lengths, pictures, seed=1, rows=4, length=64, groups=2, vision_rows=6)
    return Loader(source, encode, spec, plan=plan, visual_tokens=Q, pad_id=0, **options)


def taken(loader, start, count):
    with contextlib.closing(loader.iterate(start)) as batches:
        return [batch.patches for _, batch in itertools.islice(batches, count)]


@pytest.mark.slow
def test_a_loader_that_begins_again_gives_the_same_frames(folder, encoder, spec):
    whole = taken(loader(folder, encoder, spec), 0, 4)
    again = taken(loader(folder, encoder, spec, threads=1), 2, 2)
    assert all(np.array_equal(a, b) for a, b in zip(whole[2:], again, strict=True))
    assert all(batch.any() for batch in whole)


@pytest.mark.slow
def test_workers_give_the_same_frames(folder, encoder, spec):
    alone, workers = (taken(loader(folder, encoder, spec, workers=n), 0, 3) for n in (0, 2))
    assert all(np.array_equal(a, b) for a, b in zip(alone, workers, strict=True))


class One(Numbered):
    """A source of one conversation."""

    def __init__(self, *turns):
        self.example = Example(turns)

    def __len__(self):
        return 1

    def __repr__(self):
        return "One"

    def origin(self, index):
        return "one"

    def _example(self, index):
        return self.example


def test_the_frames_of_a_clip_are_changed_alike(encoder, spec):
    array = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), np.uint8)
    turns = (
        Turn("user", (Video(np.repeat(array, 3, axis=0), fps=3.0), Text("what?"))),
        Turn("assistant", (Text("red"),)),
    )
    source, encode = One(*turns), functools.partial(encoder, video=THREE)
    moves = functools.partial(augment, flip=True, shift=4, colour=0.3)
    plan = PackingPlan([len(encode(source[0]).tokens)], [3], seed=1, rows=1, length=40, groups=1, vision_rows=3)
    made = Loader(source, encode, spec, plan=plan, visual_tokens=Q, pad_id=0, augment=moves)
    patches = made.build(0).patches[0]
    assert np.array_equal(patches[0], patches[1])
    assert np.array_equal(patches[0], patches[2])
    plain = Loader(source, encode, spec, plan=plan, visual_tokens=Q, pad_id=0).build(0).patches[0]
    assert not np.array_equal(patches[0], plain[0])
