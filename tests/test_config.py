import dataclasses
from typing import Any, Literal

import ml_collections
import pytest

from lvlm_jax import config
from lvlm_jax.config import ConfigError, build, check_words, convert, fill, to_config, to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """Something with a check of its own."""

    width: int = 4
    rate: float = 0.5

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width={self.width}: at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    """One field of every kind."""

    name: str
    inner: Inner = Inner()
    several: dict[str, Inner] = dataclasses.field(default_factory=dict)
    words: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    kind: Literal["plain", "fancy"] = "plain"
    limit: int | None = None
    either: int | str = 0
    anything: Any = None


def test_build_takes_plain_values():
    values = {"name": "x", "inner": {"width": 8, "rate": 1}, "several": {"a": {"width": 2}}, "words": ["a", "b"]}
    got = build(Outer, values | {"pair": [3, 4], "limit": 5, "either": "auto", "anything": [1]})
    assert got == Outer(
        name="x",
        inner=Inner(width=8, rate=1.0),
        several={"a": Inner(width=2)},
        words=("a", "b"),
        pair=(3, 4.0),
        limit=5,
        either="auto",
        anything=[1],
    )
    assert isinstance(got.inner.rate, float)
    assert isinstance(got.pair[1], float)
    assert build(Outer, to_dict(got)) == got
    assert build(Outer, {"name": "x", "inner": Inner(width=3)}).inner.width == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"config\.name: this field has no default and must be given"),
        ({"nmae": "x"}, r"config\.nmae: no such field \(did you mean 'name'\?\)\. Fields: name, inner, several"),
        ({"inner": {"widht": 1}}, r"config\.inner\.widht: no such field \(did you mean 'width'\?\)"),
        ({"several": {"a": {"rat": 1}}}, r"config\.several\.a\.rat: no such field \(did you mean 'rate'\?\)"),
        ({"inner": {"width": 0}}, r"config\.inner: width=0: at least 1"),
        ({"inner": {"width": "4"}}, r"config\.inner\.width='4': expected int, got str"),
        ({"inner": {"width": 4.0}}, r"config\.inner\.width=4\.0: expected int, got float"),
        ({"inner": {"width": True}}, r"config\.inner\.width=True: expected int, got bool"),
        ({"inner": {"rate": True}}, r"config\.inner\.rate=True: expected float, got bool"),
        ({"inner": 3}, r"config\.inner=3: expected the fields of Inner"),
        ({"several": [1]}, r"config\.several=\[1\]: expected a mapping"),
        ({"words": "connector/**"}, r"config\.words='connector/\*\*': expected a tuple, \('connector/\*\*',\)"),
        ({"words": (1,)}, r"config\.words\[0\]=1: expected str, got int"),
        ({"pair": (1,)}, r"config\.pair=\(1,\): expected 2 values"),
        ({"kind": "fanci"}, r"config\.kind='fanci' \(did you mean 'fancy'\?\): choose one of \['plain', 'fancy'\]"),
        ({"limit": "none"}, r"config\.limit='none': expected int, got str"),
        ({"either": 1.5}, r"config\.either=1\.5: expected int \| str"),
    ],
)
def test_build_names_the_field_and_the_fix(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, values if "name" in values or values == {} or "nmae" in values else {"name": "x"} | values)


def test_convert_leaves_what_fits():
    assert convert(float, 3, "x") == 3.0
    assert convert(int | None, None, "x") is None
    with pytest.raises(ConfigError, match="x=None: expected int, got NoneType"):
        convert(int, None, "x")


def test_fill_adds_every_default_so_that_it_can_be_overridden():
    values = ml_collections.ConfigDict({"name": "x", "several": {"a": {"width": 2}}})
    fill(Outer, values)
    assert values.inner.width == 4
    assert values.several.a.rate == 0.5
    assert values.pair == (1, 2.0)
    assert values.get_type("limit") is int
    values.limit = 3
    assert build(Outer, values.to_dict()).limit == 3


def test_a_dataclass_as_a_config_and_back():
    value = Outer(name="x", inner=Inner(width=7), words=("a",))
    assert build(Outer, to_config(value).to_dict()) == value


def recipe(folder, body):
    path = folder / "mine.py"
    path.write_text(f"from ml_collections import ConfigDict\n{body}\n")
    return str(path)


WORKING = "def get_config(arg=''):\n    return ConfigDict({'name': arg or 'x', 'inner': {}})"


def test_load_reads_a_file_its_argument_and_overrides(tmp_path):
    path = recipe(tmp_path, WORKING)
    assert config.load(f"{path}:big", schema=Outer).name == "big"
    words = ["--config.inner.width=9", "--config.limit=3", "--config.words=('a', 'b')", "--config.name=a=b"]
    got = build(Outer, config.load(path, words, schema=Outer).to_dict())
    assert (got.inner.width, got.limit, got.words, got.name) == (9, 3, ("a", "b"), "a=b")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "--config.inner.widht=9",
            """inner.widht=9: no such field 'widht'; Did you mean "width" instead of "widht"?""",
        ),
        ("--config.iner.width=9", """iner.width=9: no such field 'iner'; Did you mean "inner" instead of "iner"?"""),
        ("--config.nmae=y", """nmae=y: no such field 'nmae'; Did you mean "name" instead of "nmae"?"""),
        ("--config.inner.width=wide", r"^--config\.inner\.width=wide: expected int, as in --config\.inner\.width=\d+$"),
        ("--config.inner.width", "--config.inner.width: write the value behind an equals sign"),
        ("config.inner.width=9", r"begin with two dashes and 'config.': did you mean --config.inner.width=9\?"),
        ("-config.inner.width=9", r"did you mean --config.inner.width=9\?"),
        ("--model.llm.depth=2", r"did you mean --config.model.llm.depth=2\?"),
        ("seed=1", r"did you mean --config.seed=1\?"),
        ("--lr=1", r"--lr=1: not understood; overrides look like --config.seed=1"),
        ("quickstart", "quickstart: not understood"),
    ],
)
def test_load_refuses_a_word(tmp_path, word, message):
    with pytest.raises(ConfigError, match=message):
        config.load(recipe(tmp_path, WORKING), [word], schema=Outer)


def test_check_words_of_nothing():
    check_words([])


def test_find_names_the_recipes_that_there_are(tmp_path):
    assert config.find("quickstart").name == "quickstart.py"
    with pytest.raises(ConfigError, match=r"no such recipe \(did you mean 'quickstart'\?\)\. Recipes: .*quickstart"):
        config.find("quickstrat")
    with pytest.raises(ConfigError, match=r"--config=.*gone\.py: no such file\. Recipes by name: .*quickstart"):
        config.find(str(tmp_path / "gone.py"))


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ConfigError, match=r"mine\.py has no get_config\(arg\) that returns a ConfigDict"):
        config.load(recipe(tmp_path, "x = 1"))
    with pytest.raises(ConfigError, match="the only argument is 'tiny'"):
        config.load("quickstart:huge")
