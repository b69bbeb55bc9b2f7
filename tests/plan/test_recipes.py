"""Plans of the recipes' stages against kept figures, within 2 %, and the page that shows them (`recipes`)."""

import pytest

from lvlm_jax import recipe
from lvlm_jax.plan import NoCompiler, topology
from tests.plan import recipes

KEPT = recipes.kept()
FITTING = [name for name, its in KEPT.items() if its["topology"]]
NUMBERS = ("peak", "capacity", "flops")


def test_the_page_shows_what_is_kept():
    text = recipes.PAGE.read_text(encoding="utf-8")
    assert recipes.page(text, KEPT) == text


@pytest.mark.parametrize(
    ("word", "name", "where", "shards", "rows", "accumulate"),
    [
        ("llava15_instruct", "instruct", "v5e:2x2", 4, None, 1),
        ("llava15_instruct", "instruct", "v5p:8x8x8", 512, 1, 1),
        ("blip2_stage1", "qformer", "v5p:4x4x4", 64, 26, 1),
        # 32 microbatches of two rows on one chip are 8 of eight rows on four.
        ("qwen3_llava_small", "align", "v5e:2x2", 4, None, 8),
        ("qwen3_llava_small", "align", "v5p:4x4x4", 64, None, 1),
    ],
)
def test_a_batch_is_placed(word, name, where, shards, rows, accumulate):
    found, *got = recipes.placed(recipe.load(word), name, topology.parse(where))
    assert got == [shards, rows]
    assert found.stages[name].accumulate == accumulate


def test_a_line():
    its = {"topology": "v5e:2x2", "rows": 3, "peak": 5 * 2.0**30, "capacity": 16 * 2.0**30, "flops": 1.5e13}
    assert recipes.line("a b", its | {"bound": "links"}) == "| a b | v5e:2x2 | 3 | 5.00 of 16 | 15.00 | links |"
    assert recipes.line("a b", its | {"flops": None, "bound": None}).endswith("| not known | not known |")
    assert recipes.line("a b", {"topology": None}) == "| a b | none of these | | | | |"


@pytest.mark.nightly
@pytest.mark.parametrize("name", FITTING)
def test_a_plan(name):
    try:
        topology.devices(topology.parse(recipes.LADDER[0]))
    except NoCompiler as error:
        pytest.skip(str(error))
    its = KEPT[name]
    found = recipes.plan(*name.split(), its["topology"])
    assert found is not None, "does not fit any more"
    assert {key: found[key] for key in ("topology", "mesh", "rows")} == {
        key: its[key] for key in ("topology", "mesh", "rows")
    }
    for key in NUMBERS:
        assert found[key] == (its[key] if its[key] is None else pytest.approx(its[key], rel=0.02)), key
