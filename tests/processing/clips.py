"""Clips whose every frame says which one it is: twelve bars, white where the frame's number has a bit."""

from fractions import Fraction

import numpy as np

BITS = 12


def picture(number, size=(96, 64)):
    """Frame `number`, uint8[H, W, 3]."""
    bits = np.repeat([255 * (number >> bit & 1) for bit in range(BITS)], size[0] // BITS)
    return np.broadcast_to(bits[None, :, None], (size[1], size[0], 3)).astype(np.uint8)


def number(frame):
    """Which frame a picture is."""
    bars = np.asarray(frame)[..., 1].mean(0).reshape(BITS, -1).mean(1)
    return sum(int(bar > 128) << bit for bit, bar in enumerate(bars))


def write(path, frames=60, *, codec="libx264", rate=25, gop=12, size=(96, 64), times=None, audio=False):
    """A clip of `frames` frames; `times` are milliseconds, where they do not come evenly. The path comes back."""
    import av

    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", gop
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            sound = out.add_stream("aac", rate=16000)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, size), format="rgb24")
            frame.pts = index if times is None else times[index]
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if audio:
            out.mux(sound.encode(silence()))
            out.mux(sound.encode(None))
    return path


def silence():
    """A second of it."""
    import av

    frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, 0
    return frame
