"""Every recipe in configs/: found by name, resolved, its model made in shapes alone at full size, stage by stage."""

import dataclasses
import json
import re

import pytest

from lvlm_jax import assemble, cli, config, recipe
from lvlm_jax.config import ConfigError, to_dict
from lvlm_jax.train.stages import trained_share

ARGUMENTS = {
    "quickstart": ("tiny",),
    "llava15_align": ("13b", "perceiver"),
    "llava15_instruct": ("13b", "perceiver", "full"),
    "llava_onevision_align": ("0.5b", "72b"),
    "llava_onevision_instruct": ("0.5b", "72b"),
    "llava_onevision_mid": ("0.5b", "72b"),
    "llavanext_instruct": ("13b",),
    "nanovlm_222m": (),
    "paligemma_finetune": ("448", "896", "v2"),
    "qwen3_llava_small": ("1.7b", "4b", "gemma3_1b", "gemma3_4b"),
    "smollm2_emoji": ("noto", "twemoji", "openmoji"),
}
WORDS = [*config.names(), *(f"{name}:{arg}" for name, args in ARGUMENTS.items() for arg in args)]
# (weights of the whole model, share in percent) of each stage that trains a vision-language model.
FULL = {
    "llava15_align": {"align": (7_063_427_072, 0.297)},
    "llava15_align:13b": {"align": (13_351_494_656, 0.236)},
    "llava15_instruct": {"instruct": (7_063_427_072, 95.7)},
    "llava15_instruct:full": {"instruct": (7_063_427_072, 100)},
    # 32 layers of rank 128 beside seven kernels are 319,815,680 weights and 224 strengths; and the projector.
    "lora_your_data": {"tune": (7_063_427_072 + 319_815_680 + 224, 4.616)},
    "llava_onevision_align": {"align": (8_030_804_000, 0.2114)},
    "llava_onevision_align:0.5b": {"align": (893_674_656, 0.2055)},
    "llava_onevision_mid": {"mid": (8_030_807_584, 100)},
    "llava_onevision_instruct": {"single": (8_030_807_584, 100), "onevision": (8_030_807_584, 100)},
    "llava_onevision_instruct:72b": {"onevision": (73_181_570_592, 100)},
    "llavanext_instruct": {"instruct": (7_063_431_168, 100)},
    "nanovlm_222m": {"train": (222_118_464, 100)},
    "paligemma_finetune": {"transfer": (2_923_466_480, 100)},
    "paligemma_finetune:v2": {"transfer": (3_032_242_416, 100)},
    "qwen3_llava_small": {"align": (1_011_267_440, 0.2205), "instruct": (1_011_267_440, 59.16)},
    "qwen3_llava_small:4b": {"align": (4_444_963_184, 0.2139)},
    # A rank of 16 beside four kernels of 30 layers is 1,843,200 weights and 120 strengths.
    "smollm2_emoji": {"align": (137_778_240, 0.3211), "instruct": (137_778_240 + 1_843_200 + 120, 1.637)},
}


def shapes_of(found, name):
    return assemble.stage_shapes(found, found.stages[name])


def align_of(found):
    """(shapes, mask) of the stage that trains the connector alone."""
    shapes = shapes_of(found, "align")[0]
    return shapes, found.stages["align"].stage("align").mask(shapes)


def test_the_recipes_that_there_are():
    assert set(config.names()) >= {"quickstart", "llava15_align", "llava15_instruct"}
    for name in ARGUMENTS:
        assert config.find(name).is_file()
        with pytest.raises(ConfigError, match=f"{name}:huge: (the only argument is 'tiny'|choose one of)"):
            recipe.load(f"{name}:huge")


@pytest.mark.parametrize("word", WORDS)
def test_a_recipe(word):
    found = recipe.load(word)
    assert found.name == word.partition(":")[0]
    assert set(found.run) <= set(found.stages)
    assert recipe.resolve(json.loads(json.dumps(to_dict(found)))) == found

    for name in found.run:
        stage = found.stages[name]
        shapes, axes = shapes_of(found, name)
        mask = stage.stage(name).mask(shapes)
        rows = trained_share(shapes, mask)
        assert 0 < rows[-1].trained <= rows[-1].total
        assert set(stage.start) <= {*shapes, "all"}
        assert dataclasses.is_dataclass(found.model.lvlm)
        assert set(axes) == set(shapes)
        if name in FULL.get(word, {}):
            total, share = FULL[word][name]
            assert rows[-1].total == total
            assert rows[-1].percent == pytest.approx(share, rel=5e-3)


def test_what_a_dry_run_prints(capsys):
    assert cli.main(["train", "--config", "quickstart:tiny", "--dry-run", "--config.mesh=FSDP"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("recipe quickstart: mesh FSDP on 8 cpu device(s)")
    found = recipe.load("quickstart:tiny")
    data, share = found.stages["align"].data, trained_share(*align_of(found))
    assert f"stage align: 4 steps of {data.rows} rows x {data.length}; llm from stage language, vision from" in page
    assert f"all  {share[-1].total:,}  {share[-1].trained:,}  {share[-1].percent:.2f}%" in re.sub("  +", "  ", page)
    assert 1 < share[-1].percent < 5


def test_the_table_of_what_is_trained(capsys):
    assert cli.main(["list", "--trained", "quickstart:tiny", "llava15_align", "llava15_align:13b"]) == 0
    head, *rows = [re.sub("  +", "  ", line).split("  ") for line in capsys.readouterr().out.splitlines()]
    assert head == ["recipe and stage", "weights", "trained", "share"]
    assert [row[0].split()[1] for row in rows] == ["vision", "language", "align", "instruct", "align", "align"]
    # What the literature says: a projector of 20.98 M beside 7.06 B is 0.30 %, one of 31.47 M beside 13.35 B 0.24 %.
    assert rows[-2:] == [
        ["llava15_align align", "7,063,427,072", "20,979,712", "0.30%"],
        ["llava15_align:13b align", "13,351,494,656", "31,467,520", "0.24%"],
    ]
    with pytest.raises(SystemExit):
        cli.main(["list", "--trained", "quickstart", "--config.seed=1"])


def test_what_the_authors_of_the_later_ones_ran():
    tune = recipe.load("llavanext_instruct").stages["instruct"]
    assert (tune.optimizer.learning_rate, dict(tune.optimizer.lr_of)) == (1e-5, {"vision/**": 2e-6})
    assert (tune.steps, tune.data.length) == (-(-760_000 // 128), 4096)
    transfer = recipe.load("paligemma_finetune").stages["transfer"]
    assert (transfer.steps, transfer.data.rows, transfer.data.weigh_by) == (10 * 443_757 // 256, 256, "example")
    assert recipe.load("paligemma_finetune").model.attention == "prefix"
    caps = recipe.load("paligemma_finetune:v2").model.llm
    assert (caps.attn_softcap, caps.final_softcap, caps.window) == (None, None, 4096)
    nano = recipe.load("nanovlm_222m").stages["train"]
    assert (nano.optimizer.learning_rate, dict(nano.optimizer.lr_of)) == (5e-5, {"connector/**": 5.12e-3})
    assert nano.data.pictures == 18 * nano.data.rows
    for name in ("align", "instruct"):
        small, large = (recipe.load(f"{one}").stages[name] for one in ("qwen3_llava_small", f"llava15_{name}"))
        assert (small.trains, small.steps, small.optimizer) == (large.trains, large.steps, large.optimizer)


def test_the_authors_settings():
    for name in ("llava15_align", "llava15_instruct"):
        assert recipe.load(name) == recipe.load(f"{name}:7b")
    align, tune = recipe.load("llava15_align").stages["align"], recipe.load("llava15_instruct").stages["instruct"]
    assert (align.trains, tune.trains) == (("connector/**",), ("connector/**", "llm/**"))
    assert (align.optimizer.learning_rate, tune.optimizer.learning_rate) == (1e-3, 2e-5)
    for stage in (align, tune):
        assert (stage.optimizer.schedule, stage.optimizer.warmup, stage.optimizer.weight_decay) == ("cosine", 0.03, 0)
    assert (align.steps, tune.steps) == (558_128 // 256 + 1, -(-665_298 // 128))


OVERRIDES = {
    "--config.seed=7": lambda r: r.seed == 7,
    "--config.mesh=FSDP_TP": lambda r: r.mesh == "FSDP_TP",
    "--config.tensor=4": lambda r: r.tensor == 4,
    "--config.stages.align.steps=9": lambda r: r.stages["align"].steps == 9,
    "--config.stages.align.optimizer.clip=0.5": lambda r: r.stages["align"].optimizer.clip == 0.5,
    "--config.stages.align.optimizer.b1=0.8": lambda r: r.stages["align"].optimizer.b1 == 0.8,
    "--config.stages.align.spike.factor=3.0": lambda r: r.stages["align"].spike.factor == 3.0,
    "--config.stages.align.data.threads=3": lambda r: r.stages["align"].data.threads == 3,
    "--config.model.llm.depth=2": lambda r: r.model.llm.depth == 2,
    "--config.model.system=Be brief.": lambda r: r.model.system == "Be brief.",
}


@pytest.mark.parametrize("word", OVERRIDES)
@pytest.mark.parametrize("name", ["quickstart", "llava15_align"])
def test_an_override(name, word):
    assert OVERRIDES[word](recipe.load(name, [word]))


def test_an_override_of_a_field_of_the_source():
    data = recipe.load("llava15_align", ["--config.stages.align.data.path=x.json"]).stages["align"].data
    assert data.path == "x.json"


def test_overrides_of_tuples():
    found = recipe.load("quickstart", ["--config.run=('vision', 'language')", "--config.log_to=('tensorboard',)"])
    assert found.run == ("vision", "language")
    assert found.log_to == ("tensorboard",)
