"""Records for named senses: read, encoded, packed, collated; what is refused, and how it says so."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.data.collate import collate
from lvlm_jax.data.lengths import measure_lengths
from lvlm_jax.data.loader import Loader
from lvlm_jax.data.packing import PackingPlan
from lvlm_jax.data.senses import Budget
from lvlm_jax.data.sources import LlavaJson, Messages
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import DataError, decode_view, encode
from lvlm_jax.processing.schema import Example, Features, Image, Text, Turn
from lvlm_jax.processing.tokenizer import Tokenizer
from tests import tiny
from tests.tokenizers_tiny import llama_tiny

SPECS = tiny.SENSED.specs
AUDIO = np.arange(15, dtype=np.float32).reshape(3, 5)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(llama_tiny())


def encoded(example, tokenizer, senses=SPECS, **options):
    image = tokenizer.special_id("<image>")
    return encode(example, TEMPLATES["vicuna_v1"], tokenizer, 16, image, senses=senses, **options)


def said(*segments, answer="yes"):
    return Example((Turn("user", segments), Turn("assistant", (Text(answer),))), origin="x.json:3")


def files(folder):
    np.save(folder / "a.npy", AUDIO)
    np.savez(folder / "two.npz", mel=AUDIO + 1, other=AUDIO)
    PIL.Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "d.png")
    return folder


def write(path, *records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_records_name_their_senses(tmp_path):
    files(tmp_path)
    asked = {"from": "human", "value": "<depth>\nwhat do you hear? <audio> and <audio>"}
    record = {
        "senses": {"audio": ["a.npy", AUDIO.tolist()], "depth": "d.png"},
        "conversations": [asked, {"from": "gpt", "value": "rain"}],
    }
    (example,) = LlavaJson(write(tmp_path / "l.jsonl", record))
    depth, text, first, word, second = example.turns[0].segments
    assert depth == Image(str(tmp_path / "d.png"), sense="depth")
    assert first == Features(str(tmp_path / "a.npy"), "audio")
    assert (second.sense, second.source.dtype) == ("audio", np.float32)
    np.testing.assert_array_equal(second.source, AUDIO)
    assert [text.text, word.text] == ["what do you hear? ", " and "]

    parts = [
        {"type": "features", "features": "two.npz", "key": "mel", "sense": "audio"},
        {"type": "image", "image": "d.png", "sense": "depth"},
        {"type": "text", "text": "what?"},
    ]
    message = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "rain"}]}
    (example,) = Messages(write(tmp_path / "m.jsonl", message))
    features, depth, _ = example.turns[0].segments
    assert features == Features(str(tmp_path / "two.npz"), "audio", key="mel")
    assert depth == Image(str(tmp_path / "d.png"), sense="depth")


@pytest.mark.parametrize(
    ("senses", "value", "message"),
    [
        ({"audio": "a.npy"}, "<audio> <audio>", r"2 x <audio> in 'conversations' but 1 source\(s\) in 'senses.audio'"),
        ({"audio": "a.npy"}, "what?", r"0 x <audio> in 'conversations' but 1 source\(s\)"),
        ({"audio": "../a.npy"}, "<audio>", r"'senses.audio' is '../a.npy', which leaves the picture folder"),
        ("a.npy", "<audio>", r"'senses' must be an object, name -> source, this is str"),
    ],
)
def test_records_that_do_not_fit(tmp_path, senses, value, message):
    record = {"senses": senses, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "x"}]}
    with pytest.raises(DataError, match=message):
        LlavaJson(write(tmp_path / "l.jsonl", record))[0]


def test_positions_of_their_own(tokenizer, tmp_path):
    files(tmp_path)
    shown = (Features(str(tmp_path / "a.npy"), "audio"), Image(str(tmp_path / "d.png"), sense="depth"), Text("what?"))
    found = encoded(said(*shown), tokenizer)
    audio, depth = found.placed
    assert (audio.sense, audio.size, depth.sense, depth.size) == ("audio", 3, "depth", 4)
    assert found.sense_rows == {"audio": 1, "depth": 1}
    assert found.vision_rows == 0
    for one in found.placed:
        here = slice(one.start, one.stop)
        assert (found.tokens[here] == tokenizer.special_id("<image>")).all()
        assert not found.weights[here].any()
        assert (found.visual[here] == -1).all()
    view = [text for text, _, _ in decode_view(found, tokenizer)]
    assert "[sense audio: 3 tokens]" in view
    assert "[sense depth: 4 tokens]" in view


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_writes_them(name):
    """Behind a picture and before the question, and not one is left out."""
    shown = Image("a.png"), Features(AUDIO, "audio"), Image("d.png", sense="depth"), Text("what?")
    pieces = TEMPLATES[name].render((Turn("user", shown),), generate=True)
    assert [piece for piece in pieces if isinstance(piece, Image | Features)] == list(shown[:3])


def test_a_batch_of_them(tokenizer):
    """Two rows a group; features of another example stand behind those of the first."""
    one = encoded(said(Features(AUDIO, "audio"), Text("what?")), tokenizer)
    two = encoded(said(Text("and"), Features(AUDIO[:2] + 100, "audio")), tokenizer)
    length = 2 * max(len(one.tokens), len(two.tokens))
    batch = collate(
        [[one, two], [], [two], [one]],
        length=length,
        groups=2,
        vision_rows=0,
        visual_tokens=16,
        pad_id=0,
        senses=SPECS,
        sense_rows={"audio": 2, "depth": 0},
    )
    rows = batch.senses["audio"]
    assert list(batch.senses) == ["audio"]
    assert rows.patches.shape == (2, 2, 6, 5)
    at = one.placed[0].start
    np.testing.assert_array_equal(rows.index[0, at : at + 3], [0, 1, 2])
    behind = len(one.tokens) + two.placed[0].start
    np.testing.assert_array_equal(rows.index[0, behind : behind + 2], [6, 7])
    assert (rows.index[1] == -1).all()
    np.testing.assert_array_equal(rows.index[3, at : at + 3], [6, 7, 8])
    np.testing.assert_array_equal(rows.patches[0, 0, :3], AUDIO)
    np.testing.assert_array_equal(rows.patches[0, 1, :2], AUDIO[:2] + 100)
    np.testing.assert_array_equal(rows.patch_segments[0], [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    with pytest.raises(DataError, match=r"group 0 needs more than 1 rows of sense 'audio'; raise data\.senses\.audio"):
        collate(
            [[one, two]], length=length, groups=1, vision_rows=0, visual_tokens=16, pad_id=0, senses=SPECS,
            sense_rows={"audio": 1},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Features(np.zeros((7, 5)), "audio"), r"7 feature vectors, but sense 'audio' has room for 6 \(config\.model\."),
        (Features(np.zeros((3, 4)), "audio"), r"vectors of 4 values, but sense 'audio' reads 5 \(config\.model\.se"),
        (Features(np.zeros(5), "audio"), r"shape \[5\]; features are float\[n, C\]"),
        (Features(np.zeros((0, 5)), "audio"), r"shape \[0, 5\]"),
        (Features(np.full((2, 5), np.nan), "audio"), r"values that are not finite"),
        (Features(np.array([["a"] * 5]), "audio"), r"holds <U1, not numbers"),
        (Features("gone.npy", "audio"), r"gone\.npy: the file does not exist"),
        (Features("a.txt", "audio"), r"a\.txt: features come as \.npy or \.npz files"),
        (Features("two.npz", "audio"), r"two\.npz: 2 arrays in it; name one of mel, other as key"),
        (Features("two.npz", "audio", key="mfcc"), r"no array 'mfcc' in it; name one of mel, other"),
        (Features("broken.npy", "audio"), r"broken\.npy: (cannot be read|no array of numbers)"),
        (Features(AUDIO, "touch"), r"sense 'touch': the model has no such sense, its senses are audio, depth"),
        (Features(AUDIO, "depth"), r"sense 'depth' reads pictures, but this is features"),
        (Image("d.png", sense="audio"), r"sense 'audio' reads features, but this is a picture"),
    ],
    ids=lambda value: getattr(value, "sense", "") + str(getattr(value, "source", ""))[:12],
)
def test_what_is_refused(segment, message, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(files(tmp_path))
    (tmp_path / "broken.npy").write_bytes(b"no numpy at all")
    with pytest.raises(DataError, match=rf"^x\.json:3: .*{message}"):
        encoded(said(segment, Text("what?")), tokenizer)


def test_a_model_without_senses_says_so(tokenizer):
    with pytest.raises(DataError, match=r"sense 'audio': the model has no such sense, it has none \(config\.model"):
        encoded(said(Features(AUDIO, "audio")), tokenizer, senses=None)


def test_a_resampler_needs_all_of_a_row(tokenizer):
    fixed = {"audio": dataclasses.replace(SPECS["audio"], each=False, tokens=2)}
    whole = np.zeros((6, 5))
    assert encoded(said(Features(whole, "audio")), tokenizer, fixed).placed[0].size == 2
    with pytest.raises(DataError, match=r"3 feature vectors, but the connector of sense 'audio' reads all 6 of a row"):
        encoded(said(Features(AUDIO, "audio")), tokenizer, fixed)


def test_a_text_is_not_cut_inside_them(tokenizer):
    with pytest.raises(DataError, match=r"what sense 'audio' reads fills positions \d+ to \d+; raise max_length above"):
        encoded(said(Text("one two three"), Features(AUDIO, "audio")), tokenizer, max_length=8)


def test_one_number_stands_for_all_rooms():
    budget = Budget(pictures=4, senses={"audio": 6})
    assert budget.total == 12
    assert budget.cost(1, {}) == 3
    assert budget.cost(1, {"audio": 3}) == 6
    np.testing.assert_array_equal(budget.cost(np.array([0, 2]), {"audio": np.array([1, 1])}), [2, 6])
    assert Budget(pictures=5).cost(3, {}) == 3
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (50, 2))
    costs = budget.cost(counts[:, 0], {"audio": counts[:, 1]})
    for _ in range(200):  # whatever fits by the number fits in both rooms
        some = rng.choice(50, rng.integers(1, 6), replace=False)
        if costs[some].sum() <= budget.total:
            assert (counts[some].sum(0) <= [4, 6]).all()
    with pytest.raises(DataError, match=r"record 1: 7 rows for sense 'audio', but a group has room for 6 \(data\."):
        budget.check(np.zeros(2, int), {"audio": np.array([1, 7])}, lambda index: f"record {index}")
    with pytest.raises(DataError, match=r"1 rows for sense 'depth', but a group has room for 0"):
        budget.check(np.zeros(1, int), {"depth": np.array([1])}, str)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_loader_brings_them(tokenizer, tmp_path, workers):
    files(tmp_path)
    records = [
        {
            "id": str(n),
            "senses": {"audio": (AUDIO[: 1 + n % 3] + n).tolist()},
            "conversations": [{"from": "human", "value": "<audio> what?"}, {"from": "gpt", "value": f"{n}"}],
        }
        for n in range(8)
    ]
    source = LlavaJson(write(tmp_path / "l.jsonl", *records))
    encode_one = _Bound(tokenizer)
    measured = measure_lengths(source, encode_one, cache=tmp_path / "cache", progress=False)
    again = measure_lengths(source, encode_one, cache=tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(again.senses["audio"], np.ones(8, int))
    budget = Budget(pictures=0, senses={"audio": 3})
    cost = budget.cost(measured.pictures, measured.senses)
    plan = PackingPlan(measured.lengths, cost, seed=0, rows=4, length=128, groups=2, vision_rows=budget.total)
    loader = Loader(
        source, encode_one, None, plan=plan, visual_tokens=16, pad_id=0, senses=SPECS, budget=budget, workers=workers,
        pictures=measured.pictures,
    )  # fmt: skip
    batches = loader.iterate()
    seen = set()
    for _ in range(4):
        _, batch = next(batches)
        rows = batch.senses["audio"]
        assert rows.patches.shape == (2, 3, 6, 5)
        heard = rows.patches[rows.patch_segments[..., 0] > 0][:, 0, 0]
        assert (rows.index >= 0).sum() == rows.patch_segments.sum()
        seen |= set(heard.tolist())
    batches.close()
    assert seen == set(range(8))


class _Bound:
    """`encode` with all bound, which worker processes can take."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, example):
        return encoded(example, self.tokenizer)

    def __repr__(self):
        return "bound"
