"""Emoji drawings, out of npm packages that are made here: four vendors, five concepts."""

import json
import pickle

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.config import ConfigError
from lvlm_jax.data import emoji
from lvlm_jax.data.emoji import GROUP, NAME, Emoji
from lvlm_jax.data.registry import Choice
from lvlm_jax.data.sources import Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Image, Text
from lvlm_jax.processing.tokenizer import Tokenizer

RECORDS = [
    {"hexcode": "1F600", "label": "grinning face", "group": 0},
    {"hexcode": "1F3FB", "label": "light skin tone", "group": 2},  # a part of drawings
    {"hexcode": "2764-FE0F", "label": "red heart", "group": 8},
    {"hexcode": "1F34E", "label": "red apple", "group": 4},
    {"hexcode": "1F1E6-1F1E8", "label": "flag: Ascension Island", "group": 9},  # fluent drew no flags
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]
GROUPS = [{"order": 9, "message": "flags"}, {"order": 0, "message": "smileys"}, {"order": 2, "message": "components"}]
GROUPS += [{"order": 4, "message": "food & drink"}, {"order": 8, "message": "symbols"}]
COLOURS = {"noto": "#ff0000", "twemoji": "#00ff00", "fluent": "#0000ff", "openmoji": "#ffff00"}


def write(path, what):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(what))


def packages(root):
    """Drawings are boxes of the vendor's colour; that of the heart is twice as wide as high, its right half empty."""
    modules = root / "node_modules"
    write(modules / "emojibase-data/en/data.json", RECORDS)
    write(modules / "emojibase-data/en/messages.json", {"groups": GROUPS})
    for vendor, package in emoji.VENDORS.items():
        body = f'<rect x="-4" y="0" width="8" height="8" fill="{COLOURS[vendor]}"/>'
        chars = {"1f600": "grin", "1f3fb": "tone", "1f34e": "apple", "1f1e6": "a", "1f1e6-1f1e8": "flag"}
        chars["2764-fe0f" if vendor == "noto" else "2764"] = "heart"
        if vendor == "fluent":
            del chars["1f1e6-1f1e8"]
        icons = {name: {"body": body} for name in chars.values() if name != "heart"}
        icons["love"] = {"body": body, "left": -4, "width": 16, "height": 8}
        aliases = {"heart": {"parent": "love"}}
        whole = {"icons": icons, "aliases": aliases, "width": 8, "height": 16}
        write(modules / "@iconify-json" / package / "icons.json", whole)
        write(modules / "@iconify-json" / package / "chars.json", chars)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return packages(tmp_path_factory.mktemp("emoji"))


def test_concepts_are_what_every_vendor_drew(root):
    source = Emoji(root)
    assert isinstance(source, Source)
    assert [c.name for c in source.concepts] == ["grinning face", "red heart", "red apple"]
    assert [c.group for c in source.concepts] == ["smileys", "symbols", "food & drink"]
    assert [c.code for c in source.concepts] == ["1f600", "2764", "1f34e"]
    assert len(source) == 12
    assert [source[i].id for i in (0, 4, -1)] == ["noto/1f600", "twemoji/2764", "openmoji/1f34e"]
    with pytest.raises(IndexError):
        source[12]


def test_drawings_are_rendered_once_on_white(root):
    source = Emoji(root, size=16)
    for index, colour in ((1, (255, 0, 0)), (4, (0, 255, 0)), (7, (0, 0, 255))):
        assert source.origin(index).endswith("/2764.png")
        pixels = np.asarray(PIL.Image.open(source.origin(index)).convert("RGB"))
        assert pixels.shape == (16, 16, 3)
        wanted = np.full((16, 16, 3), 255)
        wanted[4:12, :8] = colour  # a drawing that is no square stands in the middle
        np.testing.assert_array_equal(pixels, wanted)
    stamps = {file: file.stat().st_mtime_ns for file in root.rglob("*.png")}
    assert Emoji(root, size=16).origin(0) == source.origin(0)
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*.png")} == stamps
    assert not list(root.rglob("*.part"))


def test_kinds_of_records(root):
    kinds = ("captions", "drawings", "names", "groups", "questions")
    caption, drawing, name, group, question = (Emoji(root, ("twemoji",), kind)[2] for kind in kinds)
    picture = Image(Emoji(root, ("twemoji",)).origin(2))
    assert [turn.segments for turn in caption.turns] == [(picture,), (Text("red apple"),)]
    assert [turn.segments for turn in drawing.turns] == [(Text("red apple"),), (picture,)]
    assert [turn.segments for turn in name.turns] == [(picture, Text(NAME)), (Text("red apple"),)]
    assert [turn.segments for turn in group.turns] == [(picture, Text(GROUP)), (Text("food & drink"),)]
    more = [(Text(GROUP),), (Text("food & drink"),)]
    assert [turn.segments for turn in question.turns] == [*(turn.segments for turn in name.turns), *more]
    assert [turn.role for turn in question.turns] == ["user", "assistant"] * 2


def test_a_tokenizer_of_the_names(root):
    words = Tokenizer(emoji.word_tokenizer(root))
    assert words.vocab_size == len(emoji.SPECIALS) + len({"grinning", "face", "red", "heart", "apple"})
    assert [words.special_id(name) for name in emoji.SPECIALS] == list(range(7))
    ids, _ = words.encode_text("red heart")
    assert words.decode(ids) == "red heart"
    assert ids.min() >= 7
    assert words.encode_text("<begin>")[0].min() > 6 or words.unknown_id in words.encode_text("<begin>")[0]


def test_repr_names_the_content_and_it_travels(root, tmp_path):
    source = Emoji(root, ("noto",), "names")
    assert repr(pickle.loads(pickle.dumps(source))) == repr(source) == repr(Emoji(root, ("noto",), "names"))
    assert repr(source) != repr(Emoji(root, ("fluent",), "names"))
    other = packages(tmp_path)
    write(other / "node_modules/emojibase-data/en/data.json", RECORDS[:3])
    assert repr(Emoji(other)).split("crc=")[1] != repr(Emoji(root)).split("crc=")[1]


def test_a_recipe_opens_it(root):
    chosen = Choice(source="emoji", path=str(root), vendors=("noto", "fluent"), of="names")
    assert repr(chosen.open()) == repr(Emoji(root, ("noto", "fluent"), "names"))
    with pytest.raises(ConfigError, match="path: emoji needs it"):
        Choice(source="emoji")
    (line,) = Choice(source="emoji", path="nowhere").absent()
    assert line.startswith("path='nowhere' does not exist; it comes by: ")
    assert "npm install --no-save --ignore-scripts --prefix nowhere @iconify-json/noto@" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vendors": ("apple",)}, r"vendors=\['apple'\]: choose among \['noto', 'twemoji', 'fluent', 'openmoji'\]"),
        ({"vendors": ()}, r"vendors=\(\): name at least one, each once"),
        ({"vendors": ("noto", "noto")}, "each once"),
        ({"kind": "tags"}, r"of='tags': choose one of \['captions', 'drawings', 'names', 'groups', 'ques"),
    ],
)
def test_bad_fields(root, change, message):
    with pytest.raises(DataError, match=message):
        Emoji(root, **change)


def test_a_missing_package_is_named_with_the_command(tmp_path):
    packages(tmp_path)
    file = tmp_path / "node_modules/@iconify-json/twemoji/icons.json"
    file.unlink()
    with pytest.raises(DataError, match=r"twemoji/icons\.json is missing; the drawings are npm packages: npm install"):
        Emoji(tmp_path)
