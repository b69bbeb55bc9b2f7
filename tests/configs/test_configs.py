"""Every recipe in configs/: found by name, resolved, its model made in shapes alone at full size, stage by stage."""

import dataclasses
import json
import re

import pytest

from lvlm_jax import assemble, cli, config, recipe, starts
from lvlm_jax import params as trees
from lvlm_jax.config import ConfigError, to_dict
from lvlm_jax.recipe import Start
from lvlm_jax.train.stages import trained_share
from lvlm_jax.zoo import blip2

ARGUMENTS = {
    "blip2_stage2": ("opt_6_7b", "flan_t5_xl", "flan_t5_xxl", "tiny"),
    "instructblip": ("vicuna_13b", "flan_t5_xl", "flan_t5_xxl", "tiny"),
    "quickstart": ("tiny",),
    "cogvlm_pretrain": ("490",),
    "cogvlm_sft": (),
    "cogvlm_lora": ("224",),
    "flamingo": ("9b", "80b"),
    "idefics_interleaved": ("80b",),
    "openflamingo_interleaved": ("4b", "9b"),
    "quickstart_senses": ("tiny",),
    "llava15_align": ("13b", "perceiver"),
    "llava15_instruct": ("13b", "perceiver", "full"),
    "llava_onevision_align": ("0.5b", "72b"),
    "llava_onevision_instruct": ("0.5b", "72b"),
    "llava_onevision_mid": ("0.5b", "72b"),
    "llavanext_instruct": ("13b",),
    "minigpt4_align": ("13b", "llama2"),
    "minigpt4_instruct": ("13b", "llama2"),
    "nanovlm_222m": (),
    "paligemma_finetune": ("448", "896", "v2"),
    "qwen2_5_vl_finetune": ("3b", "32b"),
    "qwen3_llava_small": ("1.7b", "4b", "gemma3_1b", "gemma3_4b"),
    "videochat_align": ("13b",),
    "videochat_instruct": ("13b",),
    "smollm2_emoji": ("noto", "twemoji", "openmoji"),
    "unified_emoji": ("plain", "tiny"),
    "blip2_stage1": ("pformer", "tiny"),
    "pformer_pretrain": ("tiny",),
}
WORDS = [*config.names(), *(f"{name}:{arg}" for name, args in ARGUMENTS.items() for arg in args)]
# (weights of the whole model, share in percent) of each stage that trains a vision-language model.
FULL = {
    # An expert of 6.476 B, a projector of 142.6 M and the ends; 37 % of the whole, as the paper has it.
    "cogvlm_pretrain": {"caption": (17_637_948_928, 37.52), "ground": (17_637_948_928, 37.52)},
    "cogvlm_sft": {"instruct": (17_639_685_376, 75.72)},
    # Rank 10 beside four kernels of 32 and of 63 layers: 19,517,440 weights and 380 strengths; nine feed-forwards.
    "cogvlm_lora": {"tune": (17_639_685_376 + 19_517_440 + 380, 2.917)},
    # The connector, and the tower's last norm of 2,816.
    "blip2_stage2": {"generate": (3_744_761_856, 2.861)},
    "blip2_stage2:opt_6_7b": {"generate": (7_752_869_376, 1.397)},
    "blip2_stage2:flan_t5_xl": {"generate": (3_942_446_592, 2.707)},
    "blip2_stage2:flan_t5_xxl": {"generate": (12_229_596_672, 0.886)},
    "instructblip": {"tune": (7_913_726_720, 2.386)},
    # Resampler, gated blocks, new words. Flamingo's paper has 1.4, 1.8 and 10.2 B; ours of the last is 8.5, by the
    # sizes that are published.
    "openflamingo_interleaved": {"train": (2_558_330_928, 36.90)},
    "openflamingo_interleaved:4b": {"train": (4_039_029_792, 23.79)},
    "openflamingo_interleaved:9b": {"train": (8_130_678_800, 14.50)},
    "flamingo": {"train": (3_137_500_308, 42.32)},
    "flamingo:9b": {"train": (11_264_922_744, 17.52)},
    "flamingo:80b": {"train": (79_018_775_676, 10.79)},
    "idefics_interleaved": {"train": (8_929_679_632, 17.48)},
    "videochat_align": {"align": (8_035_078_016, 2.558)},
    "minigpt_v2_instruct": {"instruct": (7_781_003_328, 0.7278)},
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
    # A tower of 985,952,256 and a Q-Former of 105,162,240 before one dense layer of 3,149,824.
    "minigpt4_align": {"align": (7_832_688_128, 0.0402)},
    "minigpt4_align:13b": {"align": (14_110_926_336, 0.0279)},
    "minigpt4_align:llama2": {"align": (7_747_448_832, 0.2978)},
    "nanovlm_222m": {"train": (222_118_464, 100)},
    "paligemma_finetune": {"transfer": (2_923_466_480, 100)},
    "paligemma_finetune:v2": {"transfer": (3_032_242_416, 100)},
    "qwen2_5_vl_finetune": {"tune": (8_292_166_656, 92.38)},
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


def _marks(word):
    """Recipes with an argument differ from those without it in sizes; Flamingo's tower is slow to trace."""
    return [pytest.mark.nightly] if ":" in word else [pytest.mark.slow] if word == "flamingo" else []


@pytest.mark.parametrize("word", [pytest.param(word, marks=_marks(word)) for word in WORDS])
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
        starts.begins("start", stage.start, trees.flatten(shapes))
        assert dataclasses.is_dataclass(found.model)
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
    words = ["quickstart:tiny", "cogvlm_pretrain", "llava15_align", "llava15_align:13b"]
    assert cli.main(["list", "--trained", *words]) == 0
    head, *rows = [re.sub("  +", "  ", line).split("  ") for line in capsys.readouterr().out.splitlines()]
    assert head == ["recipe and stage", "weights", "trained", "share"]
    stages = ["vision", "language", "align", "instruct", "caption", "ground", "align", "align"]
    assert [row[0].split()[1] for row in rows] == stages
    # What is trained of CogVLM before its instruction tuning is 37 %.
    assert rows[4:6] == [
        [f"cogvlm_pretrain {stage}", "17,637,948,928", "6,618,628,096", "37.52%"] for stage in ("caption", "ground")
    ]
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
    tune = recipe.load("cogvlm_lora").stages["tune"]
    assert (tune.data.length, tune.data.rows, tune.lora.scale, tune.optimizer.clip) == (1288, 32, 0.1, 0.1)
    open_flamingo = recipe.load("openflamingo_interleaved")
    assert (open_flamingo.model.lvlm.vocab, open_flamingo.model.image_token_id) == (50280, 50278)
    assert open_flamingo.stages["train"].optimizer.decay == ("fusion/**",)
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


def test_blip2s_authors_settings():
    for word, rows in (("blip2_stage2", 1920), ("blip2_stage2:flan_t5_xl", 1520)):
        found = recipe.load(word)
        stage = found.stages["generate"]
        assert stage.trains == ("connector/**", "vision/post_norm/**")
        assert (stage.steps, stage.data.rows, stage.data.pictures, stage.data.pack) == (80_000, rows, rows, False)
        assert (stage.optimizer.b2, stage.optimizer.end_factor, stage.optimizer.clip) == (0.98, 0.5, None)
        assert found.model.template == ("blip2_t5" if "t5" in word else "blip2")
        assert found.model.instruction is None
        # What is trained is what the authors' files hold.
        shapes = trees.unstack_layers(shapes_of(found, "generate")[0])
        trained = {path for path, hit in trees.flatten(stage.stage("generate").mask(shapes)).items() if hit}
        assert {path for row in blip2.lavis_rows(found.model.lvlm) for path in row.leaves} == trained
    at = 'stages.generate.start["connector/qformer"]'
    start = recipe.load("blip2_stage2", [f"--config.{at}.workdir=", f"--config.{at}.hub=x"]).stages["generate"].start
    assert start["connector/qformer"] == Start(hub="x")
    assert start["vision/post_norm"] == Start(workdir="runs/blip2_stage1")
    tune = recipe.load("instructblip")
    assert (tune.model.instruction.length, tune.model.llm.vocab) == (128, 32064)
    weights = {name: member.weight for name, member in tune.stages["tune"].data.members.items()}
    assert weights["conversation_58k"] / weights["detail_23k"] == pytest.approx((58 / 23) ** 0.5)
    assert set(recipe.load("instructblip:flan_t5_xl").stages["tune"].data.members) < set(weights)
    with pytest.raises(ConfigError, match="a connector with a vocabulary reads an instruction"):
        recipe.load("blip2_stage2", ["--config.model.connector.vocab=30523"])


def test_what_minigpt4_trains():
    for name in ("minigpt4_align", "minigpt4_instruct"):
        assert recipe.load(name) == recipe.load(f"{name}:7b")
    align, tune = (recipe.load(f"minigpt4_{name}").stages[name] for name in ("align", "instruct"))
    assert align.trains == tune.trains == ("connector/linear_1/**",)
    rates = [
        (o.learning_rate, round(o.learning_rate * o.end_factor, 9), o.warmup) for o in (align.optimizer, tune.optimizer)
    ]
    assert rates == [(1e-4, 8e-5, 5000), (3e-5, 1e-5, 200)]
    wide = recipe.load("minigpt_v2_instruct")
    assert wide.model.lvlm.visual_tokens == 256
    stage, shapes = wide.stages["instruct"], shapes_of(wide, "instruct")[0]
    rows = trained_share(shapes, stage.stage("instruct").mask(shapes))
    adapters = 32 * 2 * (4096 * 64 + 64 * 4096)  # their strengths stay
    assert rows[-1].trained == 5632 * 4096 + 4096 + adapters


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
    "--config.stages.align.settings.z_loss=0.001": lambda r: r.stages["align"].settings == {"z_loss": 0.001},
    "--config.stages.align.settings.z_loss=0.0": lambda r: r.stages["align"].settings == {},
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


@pytest.mark.parametrize("word", [word for word in WORDS if not word.endswith(":tiny")])
def test_its_batches_divide_over_the_hardware_that_it_names(word):
    """A v5p-N has N / 2 chips, a v5e-N has N; where a recipe names none, one device holds it."""
    line = re.search(r"^Hardware: (.*)$", config.find(word.partition(":")[0]).read_text(), re.MULTILINE)[1]
    chips = [int(n) // 2 for n in re.findall(r"v5p-(\d+)", line)]
    chips += [int(n) for pattern in (r"v5e-(\d+)", r"(\d+) x \d+ GB") for n in re.findall(pattern, line)]
    found = recipe.load(word)
    for name in found.run:
        stage = found.stages[name]
        for count in chips or [1]:
            stage.data.check_divides(f"stages.{name}.data", count, stage.accumulate)
