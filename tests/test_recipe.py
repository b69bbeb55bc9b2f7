import dataclasses
import functools
import json

import pytest

from lvlm_jax import config, llm, recipe, recipe_model, run
from lvlm_jax.config import ConfigError
from lvlm_jax.connectors import GatedConfig, PerceiverConfig
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.vision import NFNetConfig, siglip
from lvlm_jax.zoo import SYSTEMS
from tests.infer.tiny import tiny_system


def quickstart(**changes):
    """The quickstart's values with some changed, by path: stages__align__steps=0."""
    values = config.load("quickstart", schema=recipe.Recipe).to_dict()
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = values
        for key in parents:
            node = node[key]
        node[last] = value
    return values


def test_a_recipe_is_a_value():
    found = recipe.resolve(quickstart())
    assert found == recipe.load("quickstart")
    assert found != recipe.load("quickstart", ["--config.seed=1"])
    with pytest.raises(AttributeError):
        found.seed = 3
    assert found.model.lvlm.visual_tokens == found.model.vision.features
    assert found.stages["align"].stage("align").trains == ("connector/**",)
    assert found.dual_encoder.projection == 64


BAD = [
    ({"mesh": "FSPD"}, r"mesh='FSPD': choose one of \['DP', 'FSDP', 'FSDP_TP', 'FSDP_TP_SP'\]"),
    ({"remat": "some"}, r"remat='some': choose one of \['none', "),
    ({"run": ("vision", "tune")}, r"run names \['tune'\], which is no stage; the stages are \['align', "),
    (
        {"run": ("language", "align", "vision", "instruct")},
        r"stages\.align\.start\.vision\.stage='vision' does not run",
    ),
    ({"contrastive": None}, r"stages\.vision\.loss='contrastive' needs config\.contrastive: the text tower"),
    ({"evaluation": None}, r"stages\.\w+\.evaluate=\(.*\) needs config\.evaluation: on what"),
    (
        {"stages__vision__data__pictures": 8},
        r"stages\.vision\.data: a stage of kind 'contrastive' .* pictures=rows; here pack=",
    ),
    ({"stages__align__loss": "languag"}, r"stages\.align\.loss='languag' \(did you mean 'language'\?\): choose one of"),
    (
        {"stages__align__loss": "unified"},
        r"loss='unified' trains what UnifiedModel describes, but config\.model has .* Model",
    ),
    ({"stages__vision__accumulate": 2}, r"vision\.accumulate=2: a loss of kind 'contrastive' couples all rows"),
    (
        {"stages__vision__eval_every": 1},
        r"vision\.eval_every: a stage of kind 'contrastive' trains no model that could",
    ),
    ({"stages__align__settings": {"z": 1.0}}, r"config\.stages\.align\.settings\.z: no such field.*Fields: z_loss"),
    ({"stages__align__data__rows": 9}, r"config\.stages\.align\.data: rows=9, pictures=\d+: .* multiples of groups="),
    (
        {"stages__align__data__source": "llava"},
        r"source='llava' \(did you mean 'llava_\w+'\?\): choose one of \['easy_vqa', 'emoji', 'llava_json',",
    ),
    ({"stages__align__data__source": "messages"}, r"path: messages needs it; give its path"),
    (
        {"stages__align__data__images": "pictures"},
        r"images='pictures' is not read by source='easy_vqa', whose fields are split, of, turns, sense; leave it at ''",
    ),
    ({"stages__align__data__template": "vicuna"}, r"template='vicuna': choose one of \['plain', 'vicuna_v1',"),
    (
        {"stages__align__start": {"llm": {}}},
        r"config\.stages\.align\.start\.llm: give exactly one of stage,",
    ),
    (
        {"stages__align__start": {"llm": {"stage": "language", "hub": "x"}}},
        r"config\.stages\.align\.start\.llm: give exactly one of stage,",
    ),
    ({"stages__align__trains": ()}, r"^config\.stages\.align\.trains=\(\): a tuple of path patterns"),
    ({"stages__align__steps": 0}, r"^config\.stages\.align\.steps=0: must be at least 1"),
    ({"stages__align__optimizer__schedule": "step"}, r"optimizer\.schedule='step': choose one of"),
    ({"model__image__size": 48}, r"image\.size=48, image\.patch=16 do not fit vision\.image_size=64"),
    ({"model__image_token_id": 35}, r"image_token_id=35 is outside the vocabulary of 35"),
    ({"model__template": "vicuna"}, r"config\.model: template='vicuna': choose one of"),
    ({"model__connector": {"kind": "conv"}}, r"connector\.kind='conv': choose one of"),
    ({"model__connector": {}}, r"connector\.kind=None: choose one of"),
    ({"model__connector": {"kind": "mlp", "dept": 3}}, r"config\.model\.connector\.dept: no such field"),
    ({"model__llm__heads": 5}, r"config\.model\.llm: heads=5 do not divide into groups of kv_heads=4"),
    (
        {"model__llm__heads": 10, "model__llm__kv_heads": 5},
        r"config\.model\.llm: width=96 does not divide into heads=10",
    ),
    ({"model__llm__head_dim": 7}, r"config\.model\.llm: heads of width 7 cannot be rotated in pairs"),
    ({"model__vision__heads": 3}, r"config\.model\.vision: width=64 does not divide into heads=3"),
    ({"model__vision__feature_layer": 0}, r"config\.model\.vision: feature_layer=0: -1 is the last of depth=4 layers"),
    ({"model__vision__pool": "mean"}, r"config\.export: no public family .*or set config\.export=False"),
    ({"stages__vision__data__augment__zoom": 1.0}, r"augment: augment\.zoom=1\.0: from 0 \(off\) to below 1"),
    ({"stages__align__data__length": 257}, r"stages\.align\.data\.length=257 is beyond model\.llm\.context=256"),
    ({"model__vision__patch_size": 65}, r"config\.model\.vision: patch_size=65 does not fit image_size=64"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[" ".join(changes) for changes, _ in BAD])
def test_what_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe.resolve(quickstart(**changes))


def test_a_stage_that_is_not_run_may_start_from_any():
    assert recipe.load("quickstart", ["--config.run=('vision', 'language')"]).run == ("vision", "language")
    with pytest.raises(ConfigError, match=r"stages\.instruct\.start\.all\.stage='align' does not run before"):
        recipe.load("quickstart", ["--config.run=('vision', 'language', 'instruct')"])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_of_the_zoo_as_a_model(name):
    spec = SYSTEMS[name]
    model = config.build(recipe.Model, recipe_model.model_of(spec).to_dict())
    assert model.lvlm == spec.config
    words = spec.tokenizer or spec.source
    assert (model.image, model.template, model.tokenizer) == (spec.image, spec.template, words)
    assert config.build(recipe.Model, json.loads(json.dumps(config.to_dict(model)))) == model


def test_a_tower_that_is_no_vit():
    """Which of the towers a recipe means is told by its fields; a misspelt one is named, with its like."""
    fields = recipe_model.model_of(SYSTEMS["llava15_7b"]).to_dict()
    tower = config.to_dict(NFNetConfig(image_size=64, depths=(1, 1, 2, 1)))
    fields |= {"vision": tower, "image": fields["image"] | {"size": 64, "patch": 32}}
    model = config.build(recipe.Model, fields)
    assert model.vision == NFNetConfig(image_size=64, depths=(1, 1, 2, 1))
    assert model.lvlm.visual_tokens == 4
    with pytest.raises(ConfigError, match=r"config\.vision\.stem_widht: no such field \(did you mean 'stem_width'"):
        config.build(recipe.Model, fields | {"vision": tower | {"stem_widht": 8}})


def test_a_workdir_belongs_to_a_recipe_once_a_stage_has_begun(tmp_path):
    first, mended = recipe.load("quickstart:tiny"), recipe.load("quickstart:tiny", ["--config.seed=1"])
    for each in (first, mended):
        with run.Run(each, tmp_path).claim(resume=True):
            pass
        assert json.loads((tmp_path / "recipe.json").read_text())["seed"] == each.seed
    (tmp_path / "vision").mkdir()
    with run.Run(mended, tmp_path).claim(resume=True):
        pass
    with (
        pytest.raises(ConfigError, match="holds a run of another recipe: seed was 1, is now 0"),
        run.Run(first, tmp_path).claim(resume=True),
    ):
        pass
    with run.Run(first, tmp_path).claim(resume=False):
        pass
    assert not (tmp_path / "vision").exists()


def test_a_run_without_an_evaluation_says_what_is_missing(tmp_path):
    (tmp_path / "recipe.json").write_text('{"evaluation": null, "run": [], "stages": {}}')
    with pytest.raises(ConfigError, match="what to score it on"):
        run.evaluate_folder(str(tmp_path), tiny_system())


def test_a_part_by_its_name():
    """The name puts the part in with its defaults; words about its fields come after it, wherever they stand."""
    load = functools.partial(recipe.load, "quickstart")
    assert load(["--config.model.connector=perceiver"]).model.lvlm.connector == PerceiverConfig()
    for words in (
        ["--config.model.connector=perceiver", "--config.model.connector.latents=16"],
        ["--config.model.connector.latents=16", "--config.model.connector=perceiver"],
    ):
        assert load(words).model.lvlm.connector == PerceiverConfig(latents=16)
    assert load(["--config.model.connector=mlp"]) == load([])
    gated = load(["--config.model.connector=gated", "--config.model.connector.hidden=24"])
    assert gated.model.lvlm.connector == GatedConfig(hidden=24)
    fused = load(["--config.model.fusion=cross_attention", "--config.model.fusion.every=3"]).model
    assert fused.fusion == CrossAttentionConfig(every=3)
    tower = ["--config.model.vision=siglip_b16_224", "--config.model.image.size=224"]
    assert load(tower).model.vision == dataclasses.replace(siglip.PRESETS["siglip_b16_224"], pool="none")
    assert load(["--config.model.llm=qwen25_0.5b"]).model.llm == llm.PRESETS["qwen25_0.5b"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.model.connector=percever", r"no such connector \(did you mean 'perceiver'\?\); choose one of lin"),
        ("--config.model.connector=gated", r"config\.model\.connector\.hidden: this field has no default and must be"),
        ("--config.model.fusion=gated", r"no such fusion; choose one of none, cross_attention"),
        (
            "--config.model.vision=qwen2_5_vl",
            r"qwen2_5_vl reads pictures at their own resolution, .* needs model\.im",
        ),
        (
            "--config.model.vision=videochat_eva_g14_224",
            r"224 reads the frames of a clip as one, so it needs model",
        ),
        ("--config.model.vision=siglip_b16_224", r"image\.size=64, image\.patch=16 do not fit vision\.image_size=224"),
    ],
)
def test_a_name_that_does_not_do(word, message):
    with pytest.raises(ConfigError, match=message):
        recipe.load("quickstart", [word])
