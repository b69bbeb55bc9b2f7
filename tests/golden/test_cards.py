"""Tree cards: path, dtype, shape and axes of every preset at full size, by `jax.eval_shape`, against golden text.

After a change on purpose, write them anew and read the difference: ``python -m tests.golden.test_cards --write``.
"""

import pathlib
import sys

import jax.numpy as jnp
import pytest

from lvlm_jax import keymap, llm, vision, zoo
from lvlm_jax import params as P
from lvlm_jax.connectors import LinearConfig, PerceiverConfig, pformer, qformer
from lvlm_jax.connectors import keys as connector_keys
from lvlm_jax.llm.decoder import Decoder, dummy_inputs
from lvlm_jax.llm.encoder_decoder import EncoderDecoder
from lvlm_jax.models.contrastive import DualEncoder
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.models.unified import Unified
from lvlm_jax.nn.linear import abstract
from lvlm_jax.vision import blip2_vit, dinov2, eva, nfnet, plain_vit, vqgan
from lvlm_jax.vision.vq import VQ
from lvlm_jax.zoo import chameleon, dual

CARDS = pathlib.Path(__file__).parent / "cards"


def _decoder(config):
    shapes, axes = abstract(Decoder(config, scan=True), *dummy_inputs(config))
    return shapes, axes, llm.FAMILIES[llm.family_of(config)].rows(config, "")


def _encoder_decoder(config):
    text = jnp.zeros((1, 2), jnp.int32)
    shapes, axes = abstract(EncoderDecoder(config, scan=True), jnp.zeros((1, 2, config.width)), text, text, text)
    return shapes, axes, llm.ENCODER_DECODERS[llm.family_of(config)].rows(config, "")


def _dual(config):
    v = config.vision
    batch = dummy_batch(zoo.SYSTEMS["llava_7b"].config, length=config.text.context).replace(
        patches=jnp.zeros((1, 1, v.patches, v.values)),
        patch_positions=jnp.zeros((1, 1, v.patches, 2), jnp.int32),
        patch_segments=jnp.ones((1, 1, v.patches), jnp.int32),
    )
    shapes, axes = abstract(DualEncoder(config, scan=True), batch)
    return shapes, axes, dual.rows(config)


def _tower(config):
    p = config.patches
    picture = jnp.zeros((1, p, config.values)), jnp.zeros((1, p, 2), jnp.int32), jnp.ones((1, p), jnp.int32)
    shapes, axes = abstract(config.build(jnp.float32, scan=True), *picture)
    return shapes, axes, vision.FAMILIES[vision.family_of(config)].rows(config, "", "")


def _qformer(config):
    """Between EVA's tower and OPT-2.7B."""
    shapes, axes = abstract(config.build(2560, jnp.float32, scan=True), jnp.zeros((1, 2, 1408)))
    return {"connector": shapes}, {"connector": axes}, connector_keys.rows(config)


def _pformer(config):
    """For OPT-2.7B."""
    text = jnp.zeros((1, 2), jnp.int32)
    shapes, axes = abstract(pformer.PFormer(config, 2560, scan=True), text, text)
    return {"pformer": shapes}, {"pformer": axes}, pformer.rows(config)


def _tokenizer(config):
    shapes, axes = abstract(VQ(config), jnp.zeros((1, config.image_size, config.image_size, 3)))
    return shapes, axes, vqgan.rows(config, "", "", vqgan.fits(config))


def _unified(config):
    shapes, axes = abstract(Unified(config, scan=True), dummy_batch(config))
    return shapes, axes, chameleon.rows(config)


def _system(spec):
    shapes, axes = abstract(LVLM(spec.config, scan=True), dummy_batch(spec.config))
    family = zoo.family_of(spec.config)
    return shapes, axes, family.rows(spec.config, "hf-5" if "hf-5" in family.LAYOUTS else next(iter(family.LAYOUTS)))


TOWERS = (plain_vit, dinov2, blip2_vit, eva, nfnet)
PRESETS = (
    {name: (_system, spec) for name, spec in zoo.SYSTEMS.items()}
    | {name: (_dual, config) for name, config in dual.PRESETS.items()}
    | {name: (_tower, config) for family in TOWERS for name, config in family.PRESETS.items()}
    | {name: (_decoder, config) for name, config in llm.PRESETS.items()}
    | {name: (_qformer, config) for name, config in qformer.PRESETS.items()}
    | {name: (_pformer, config) for name, config in pformer.PRESETS.items()}
    | {name: (_encoder_decoder, config) for name, config in llm.t5.PRESETS.items()}
    | {name: (_tokenizer, config) for name, config in vqgan.PRESETS.items()}
    | {name: (_unified, config) for name, config in chameleon.PRESETS.items()}
)


def make(name):
    build, value = PRESETS[name]
    return build(value)


def card(shapes, axes) -> str:
    """One line a leaf (the layers of a stack scanned, so that a stack is a line), then the number of weights."""
    flat, names = P.flatten(shapes), P.flatten(axes)
    lines = [f"{path} {leaf.dtype} {list(leaf.shape)} {_names(names[path])}" for path, leaf in flat.items()]
    return "\n".join([*lines, f"total {P.size(shapes):,}", ""])


def _names(axes) -> str:
    return f"({', '.join(axis or '-' for axis in axes)})"


# Of the NFNets, which are slow to trace, the first stands for the others.
SLOW = [name for name in nfnet.PRESETS if name != "nfnet_f0"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PRESETS])
def test_card_and_key_table(name):
    shapes, axes, rows = make(name)
    golden = CARDS / f"{name}.txt"
    assert golden.exists(), "no card for this preset: python -m tests.golden.test_cards --write"
    assert card(shapes, axes) == golden.read_text()
    keys = [row.theirs for row in rows]
    assert len(set(keys)) == len(keys)
    keymap.check(rows, P.flatten(P.unstack_layers(shapes)), keys, name)


def test_no_card_without_its_preset():
    assert {path.stem for path in CARDS.glob("*.txt")} == set(PRESETS)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        # as the hub counts them in the releases' files
        ("llava15_7b", 7_063_427_072),
        ("llava15_13b", 13_351_494_656),
        ("llavanext_7b", 7_063_431_168),
        ("yi_34b", 34_388_917_248),
        ("paligemma_3b_224", 2_923_466_480),
        ("paligemma2_3b_224", 3_032_242_416),
        ("llama2_7b", 6_738_415_616),
        ("llama2_13b", 13_015_864_320),
        ("llama3_8b", 8_030_261_248),
        ("llama31_8b", 8_030_261_248),
        ("llama32_1b", 1_235_814_400),
        ("llama32_3b", 3_212_749_824),
        ("qwen2_0.5b", 494_032_768),
        ("qwen2_1.5b", 1_543_714_304),
        ("qwen2_7b", 7_615_616_512),
        ("qwen2_72b", 72_706_203_648),
        ("mistral_7b_v01", 7_241_732_096),
        ("mistral_7b_v03", 7_248_023_552),
        ("qwen3_0.6b", 596_049_920),
        ("qwen3_1.7b", 1_720_574_976),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
        ("smollm2_135m", 134_515_008),
        ("smollm2_360m", 361_821_120),
        ("smollm2_1.7b", 1_711_376_384),
        ("opt_350m", 331_196_416),
        ("gpt2", 124_439_808),
        ("gpt2_xl", 1_557_611_200),
        ("mpt_7b", 6_649_286_656),
        ("pythia_70m", 70_426_624),
        ("pythia_2.8b", 2_775_208_960),
        ("glm4_0414_9b", 9_400_279_040),
        ("chatglm_6b", 6_173_286_400),
        ("chatglm2_6b", 6_243_584_000),
        ("qwen_7b", 7_721_324_544),
        ("qwen_72b", 72_287_920_128),
        ("gemma3_1b", 999_885_952),
        ("gemma_2b", 2_506_172_416),
        ("gemma_7b", 8_537_680_896),
        ("gemma2_2b", 2_614_341_888),
        ("gemma2_9b", 9_241_705_984),
        ("gemma2_27b", 27_227_128_320),
        ("flan_t5_small", 76_961_152),
        ("flan_t5_base", 247_577_856),
        ("flan_t5_large", 783_150_080),
        ("flan_t5_xl", 2_849_757_184),
        ("flan_t5_xxl", 11_135_332_352),
        ("t5_small", 60_506_624),
        ("t5_base", 222_903_552),
        ("t5_large", 737_668_096),
        ("t5_3b", 2_851_598_336),
        ("t5_11b", 11_307_321_344),
        # as the torch library counts the parameters of a model built from the config
        ("chameleon_34b", 34_323_732_480),
        ("chameleon_vq", 29_423_616),
        ("janus_vq", 71_883_403),
        ("clip_b32", 151_277_313),
        ("clip_b16", 149_620_737),
        ("clip_l14", 427_616_513),
        ("clip_l14_336", 427_944_193),
        ("siglip_b16_224", 203_155_970),
        ("siglip_so400m_14_384", 877_960_498),
        ("siglip2_b16_224", 375_187_970),
        ("siglip2_b16_naflex", 375_234_050),
        ("siglip2_so400m_16_naflex", 1_135_670_962),
        ("siglip2_g16_256", 1_871_393_906),
        ("vit_b16_224", 86_567_656),
        ("vit_h14_224_in21k", 632_404_480),
        ("dinov2_b14", 86_580_480),
        ("dinov2_g14", 1_136_480_768),
        ("dinov2_l14_reg", 304_372_736),
        ("blip2_vit_g14_224", 985_952_256),
        # as timm counts them
        ("eva01_clip_g14_224", 1_012_588_928),
        ("eva02_clip_b16_224", 86_263_040),
        ("eva02_clip_l14_336", 304_432_832),
        ("eva02_clip_e14_224", 4_350_556_928),
        pytest.param("nfnet_f6", 438_359_116, marks=pytest.mark.slow),
        ("qformer_blip2", 107_130_880),
        ("qformer_text", 187_653_376),
        ("pformer_bert_base", 130_546_689),
    ],
)
def test_published_sizes(name, total):
    assert P.size(make(name)[0]) == total


@pytest.mark.parametrize(
    ("name", "connector", "share"),
    [
        ("llava_7b", 4_198_400, 0.06),
        ("llava_13b", 5_248_000, 0.04),
        ("llava15_7b", 20_979_712, 0.30),
        ("llava15_13b", 31_467_520, 0.24),
    ],
)
def test_what_the_alignment_stage_trains(name, connector, share):
    shapes, _, _ = make(name)
    assert P.size(shapes["connector"]) == connector
    assert round(100 * connector / P.size(shapes), 2) == share


def test_what_a_picture_costs_in_tokens():
    tokens = {name: spec.config.visual_tokens for name, spec in zoo.SYSTEMS.items()}
    assert tokens == {
        "llava_7b": 256,
        "llava_13b": 256,
        "llava15_7b": 576,
        "llava15_13b": 576,
        "llava15_7b_perceiver": 64,
        "llavanext_7b": 576,  # of each tile
        **dict.fromkeys(("llavanext_13b", "llavanext_34b", "llavanext_mistral_7b", "llavanext_llama3_8b"), 576),
        "llavanext_video_7b": 576,
        **{f"llava_onevision_{size}_{stage}": 729 for size in ("0_5b", "7b", "72b") for stage in ("si", "ov")},
        "nanovlm_222m": 49,
        "nanovlm_450m": 64,
        **dict.fromkeys(("llava_qwen3_0.6b", "llava_qwen3_1.7b", "llava_qwen3_4b"), 729),
        **dict.fromkeys(("llava_gemma3_1b", "llava_gemma3_4b"), 729),
        "paligemma_3b_224": 256,
        "paligemma_3b_448": 1024,
        "paligemma_3b_896": 4096,
        "paligemma2_3b_224": 256,
        "paligemma2_10b_224": 256,
        "paligemma2_28b_224": 256,
        **dict.fromkeys(
            ("idefics_9b", "idefics_80b", "open_flamingo_9b_llama"), 1
        ),  # a picture is one word; its 64 tokens stand beside the text
    }
    assert isinstance(zoo.spec("llava_7b").config.connector, LinearConfig)
    assert isinstance(zoo.spec("llava15_7b_perceiver").config.connector, PerceiverConfig)


def main() -> None:
    if "--write" not in sys.argv:
        sys.exit(__doc__)
    CARDS.mkdir(exist_ok=True)
    for old in CARDS.glob("*.txt"):
        old.unlink()
    for name in PRESETS:
        (CARDS / f"{name}.txt").write_text(card(*make(name)[:2]))
    print(f"{len(PRESETS)} cards in {CARDS}")


if __name__ == "__main__":
    main()
