"""Tiny configs of every family, random weights that hide nothing, and batches built by hand."""

import dataclasses
import functools

import jax
import numpy as np

from lvlm_jax import llm
from lvlm_jax import params as P
from lvlm_jax.connectors import (
    AveragePoolConfig,
    GatedConfig,
    LinearConfig,
    MlpConfig,
    PerceiverConfig,
    PixelShuffleConfig,
    QFormerConfig,
)
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.models.unified import Unified, UnifiedConfig
from lvlm_jax.nn.linear import abstract
from lvlm_jax.nn.positions import RopeScaling
from lvlm_jax.processing.schema import Batch
from lvlm_jax.vision import NFNetConfig
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.vision.vq import VQConfig

IMAGE = "image"
"""A picture in a row of `batch`."""

# Three layers, so that the last but one is not the first.
CLIP = ViTConfig(image_size=28, patch_size=7, width=32, depth=3, heads=4, mlp_dim=64)
SIGLIP = dataclasses.replace(
    CLIP,
    activation="gelu_tanh",
    norm_eps=1e-6,
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    pool="none",
)
SIGLIP2 = dataclasses.replace(SIGLIP, pool="map", resize="linear_antialias", max_patches=20)
VIT = dataclasses.replace(CLIP, activation="gelu", pre_norm=False, patch_bias=True, pool="token", classes=5)
DINOV2 = dataclasses.replace(
    VIT,
    activation="silu",
    classes=0,
    layer_scale=True,
    gated=True,
    registers=3,
    mask_token=True,
    resize="cubic_antialias",
)
EVA02 = dataclasses.replace(
    VIT, activation="silu", norm_eps=1e-6, gated=True, key_bias=False, inner_norm=True, rotary_grid=6
)
NFNET = NFNetConfig(
    image_size=64, depths=(1, 1, 2, 1), widths=(16, 32, 32, 32), group_width=8, stem_width=16, final_width=24
)
LLAMA = DecoderConfig(vocab=99, width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48, head_dim=16, context=128)
QWEN2 = DecoderConfig(vocab=99, width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48, qkv_bias=True, rope_theta=1e6)
LLAMA3 = dataclasses.replace(
    LLAMA, rope_theta=500000.0, tied=True, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context=16)
)
GEMMA = dataclasses.replace(LLAMA, **llm.gemma.PARTS, kv_heads=1, tied=True)
GEMMA2 = dataclasses.replace(
    LLAMA,
    **llm.gemma2.PARTS,
    depth=3,
    tied=True,
    query_scalar=24,
    attn_softcap=5.0,
    final_softcap=3.0,
    window=6,
    pattern=("local", "global"),
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    **llm.gemma3.PARTS,
    attn_softcap=None,
    final_softcap=None,
    rope_theta=1e6,
    rope_scaling=RopeScaling(kind="linear", factor=8.0),
    local_theta=1e4,
)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True)
MISTRAL = dataclasses.replace(LLAMA, window=6, pattern=("local",), public="mistral")
TURNED = dataclasses.replace(  # every way of rotating that the others lack
    LLAMA,
    rotary_fraction=0.5,
    rotary_pairs="interleaved",
    rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_context=8),
)
_PLAIN = {**llm.gpt2.LAYER, "activation": "gelu"}
_SMALL = dataclasses.replace(LLAMA, kv_heads=4, head_dim=None)
OPT = dataclasses.replace(_SMALL, **_PLAIN, positions="learned", position_offset=2, tied=True)
OPT_350M = dataclasses.replace(OPT, order="post", final_norm=False, embed_width=16)
NEOX = dataclasses.replace(_SMALL, **_PLAIN, order="parallel", rotary_fraction=0.25)
MPT = dataclasses.replace(_SMALL, **llm.mpt.PARTS, mlp_dim=128, clip_qkv=1.0, alibi_max=4.0, tied=True)
PALM = dataclasses.replace(LLAMA, **llm.palm.PARTS, kv_heads=1, mlp_dim=64, tied=True)
GLM4 = dataclasses.replace(TURNED, qkv_bias=True, post_norms=True, rope_scaling=None)
CHATGLM_6B = dataclasses.replace(_SMALL, **llm.chatglm_6b.PARTS, residual_scale=2.0, tied=True)
DECODERS: dict[str, DecoderConfig] = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "partial, interleaved, yarn": TURNED,
    "opt": OPT,
    "opt_350m": OPT_350M,
    "gpt_neox": NEOX,
    "mpt": MPT,
    "glm4": GLM4,
    "palm": PALM,
    "chatglm_6b": CHATGLM_6B,
}
"""A decoder of each family that is in no system here; windows that a row of twenty reaches past."""
ENDING = dataclasses.replace(SIGLIP, feature_layer=-1, feature_norm=True)
PERCEIVER = PerceiverConfig(latents=4, depth=2, heads=4, head_dim=8)
QFORMER = QFormerConfig(queries=4, width=24, depth=2, heads=4, mlp_dim=48)

SYSTEMS: dict[str, LVLMConfig] = {
    "llava": LVLMConfig(vision=CLIP, connector=LinearConfig(), llm=LLAMA),
    "llava15": LVLMConfig(vision=CLIP, connector=MlpConfig(), llm=LLAMA),
    "llava15_prefix": LVLMConfig(vision=CLIP, connector=MlpConfig(), llm=LLAMA, attention="prefix"),
    "llava_next": LVLMConfig(vision=CLIP, connector=MlpConfig(), llm=LLAMA, newline=True),
    "llava_next_video": LVLMConfig(vision=CLIP, connector=MlpConfig(), llm=LLAMA, newline=True, pools_frames=True),
    "llava_onevision": LVLMConfig(
        vision=dataclasses.replace(SIGLIP, feature_layer=-1),
        connector=MlpConfig(),
        llm=QWEN2,
        newline=True,
        public="llava_onevision",
    ),
    "paligemma": LVLMConfig(vision=ENDING, connector=LinearConfig(), llm=GEMMA, attention="prefix"),
    "paligemma2": LVLMConfig(vision=ENDING, connector=LinearConfig(), llm=GEMMA2, attention="prefix"),
    "siglip_qwen2": LVLMConfig(vision=SIGLIP, connector=MlpConfig(), llm=QWEN2),
    "clip_llama3": LVLMConfig(vision=CLIP, connector=MlpConfig(), llm=LLAMA3),
    "siglip_gemma3": LVLMConfig(vision=SIGLIP, connector=MlpConfig(), llm=GEMMA3),
    "perceiver": LVLMConfig(vision=CLIP, connector=PERCEIVER, llm=LLAMA),
    "qformer": LVLMConfig(vision=CLIP, connector=QFORMER, llm=LLAMA),
    "pixel_shuffle": LVLMConfig(vision=SIGLIP, connector=PixelShuffleConfig(factor=2), llm=LLAMA),
    "dinov2": LVLMConfig(
        vision=dataclasses.replace(DINOV2, mlp_dim=88, max_patches=16), connector=MlpConfig(), llm=LLAMA
    ),
    "eva": LVLMConfig(vision=dataclasses.replace(EVA02, classes=0), connector=MlpConfig(), llm=LLAMA),
    "nfnet": LVLMConfig(vision=NFNET, connector=MlpConfig(), llm=LLAMA),
    "average_pool": LVLMConfig(vision=SIGLIP, connector=AveragePoolConfig(side=2), llm=LLAMA),
    "visual_expert": LVLMConfig(
        vision=CLIP, connector=GatedConfig(hidden=40), llm=dataclasses.replace(LLAMA, kv_heads=4), expert=True
    ),
    "flamingo": LVLMConfig(
        vision=CLIP,
        connector=dataclasses.replace(PERCEIVER, project=False),
        llm=dataclasses.replace(LLAMA, depth=4),
        fusion=CrossAttentionConfig(every=2, heads=2, head_dim=8, qk_norm="rms"),
        words=2,
    ),
}
"""One system a kind of part."""

VQ = VQConfig(image_size=8, channels=8, multipliers=(1, 2, 2), codes=24, code_width=6, latent=8, blocks=1, groups=4)
UNIFIED: dict[str, UnifiedConfig] = {
    order: UnifiedConfig(
        vision=VQ,
        llm=dataclasses.replace(LLAMA, qk_norm="head_layer", order=order),
        # No order that a range would have.
        code_ids=tuple(70 - i if i % 2 else 10 + i for i in range(24)),
        begin_id=4,
        end_id=3,
        image_id=98,
    )
    for order in ("pre", "swin")
}
"""Pictures of four tokens."""

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""`jax.jit` without the compiler's last optimisations: for programs that run once, half of the time is saved."""


def randomize(shapes: dict, seed: int = 0) -> dict:
    """Random weights that hide nothing (fresh norms are one and fresh biases zero), as numpy arrays.

    Drawn on the host: to compile a model's own initializers takes seconds.
    """
    rng = np.random.default_rng(seed)
    out = {}
    for path, leaf in P.flatten(shapes).items():
        name, noise = path.split("/")[-1], rng.normal(size=leaf.shape)
        spread = leaf.shape[0] ** -0.5 if name == "kernel" else 0.3
        out[path] = np.asarray(spread * noise + (name == "scale"), np.float32)
    return P.unflatten(out)


def weights(config: LVLMConfig | UnifiedConfig, seed: int = 0) -> dict:
    """Random parameters of a whole model, layers one by one."""
    kind = Unified if isinstance(config, UnifiedConfig) else LVLM
    return randomize(abstract(kind(config), dummy_batch(config))[0], seed)


def batch(
    config: LVLMConfig | UnifiedConfig,
    rows: list[list[int | str]],
    *,
    groups: int = 1,
    pad: str = "right",
    length: int | None = None,
    image_id: int = 98,
    seed: int = 0,
) -> tuple[Batch, np.ndarray]:
    """A batch, and its pictures [n, 3, height, width] in reading order.

    Args:
      rows: what each row holds: a number is that many text tokens, `IMAGE` a picture. The last number is the answer.
      pad: the side on which short rows are padded.

    Where the config has a newline, it fills the last position of each picture, instead of its last token; in a
    LLaVA-OneVision the positions before are three parts of their own visual token and one of the next, and in a
    LLaVA-NeXT-Video every second picture is a frame.
    """
    rng = np.random.default_rng(seed)
    q, side, per = config.visual_tokens, config.vision.image_size, len(rows) // groups
    sizes = [sum(q if part == IMAGE else part for part in row) for row in rows]
    length = length or max(sizes)
    text = np.zeros((len(rows), length), np.int32)
    fields = {name: text.copy() for name in ("tokens", "positions", "segments")}
    image_index, weights = text - 1, text.astype(np.float32)
    counts = [sum(part == IMAGE for row in rows[g * per : (g + 1) * per] for part in row) for g in range(groups)]
    pictures = rng.normal(size=(sum(counts), side, side, 3)).astype(np.float32)
    patches = np.zeros((groups, max(counts), config.vision.patches, config.vision.values), np.float32)
    shown = np.zeros(patches.shape[:3], np.int32)
    taken = 0
    for b, row in enumerate(rows):
        g = b // per
        at = 0 if pad == "right" else length - sizes[b]
        here = slice(at, at + sizes[b])
        fields["positions"][b, here] = np.arange(sizes[b])
        fields["segments"][b, here] = 1
        fields["tokens"][b, here] = rng.integers(3, image_id, sizes[b])
        weights[b, here.stop - (row[-1] if row[-1] != IMAGE else 0) : here.stop] = 1
        for part in row:
            if part == IMAGE:
                slot = taken - sum(counts[:g])
                patches[g, slot], shown[g, slot] = cut(pictures[taken], config.vision.patch_size), 1
                fields["tokens"][b, at : at + q] = image_id
                image_index[b, at : at + q] = slot * q + np.arange(q)
                if getattr(config, "newline", False):
                    image_index[b, at + q - 1] = patches.shape[1] * q
                taken += 1
            at += q if part == IMAGE else part
    grid = np.stack(np.meshgrid(*[np.arange(config.vision.grid)] * 2, indexing="ij"), -1).reshape(-1, 2)
    where = np.broadcast_to(grid.astype(np.int32), (*patches.shape[:3], 2)).copy()
    if getattr(config, "pools_frames", False):
        fields["frames"] = np.broadcast_to(np.arange(patches.shape[1], dtype=np.int32) % 2, patches.shape[:2]).copy()
    if getattr(config, "public", None) == "llava_onevision":
        plain = (image_index >= 0) & (image_index < patches.shape[1] * q)
        fields["blend_index"] = np.stack([np.maximum(image_index, 0), np.maximum(image_index + plain, 0)], -1)
        fields["blend_index"] = np.pad(fields["blend_index"], ((0, 0), (0, 0), (0, 2))).astype(np.int32)
        share = np.stack([np.where(plain, 0.75, image_index >= 0), 0.25 * plain], -1)
        fields["blend_weight"] = np.pad(share, ((0, 0), (0, 0), (0, 2))).astype(np.float32)
    made = Batch(
        **fields,
        weights=weights,
        image_index=image_index,
        patches=patches,
        patch_positions=where,
        patch_segments=shown,
    )
    return made, pictures.transpose(0, 3, 1, 2)


def cut(picture: np.ndarray, patch: int) -> np.ndarray:
    """One picture [height, width, 3] -> its patches [P, C], written as plain loops."""
    rows, cols = picture.shape[0] // patch, picture.shape[1] // patch
    return np.stack(
        [
            picture[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].reshape(-1)
            for r in range(rows)
            for c in range(cols)
        ]
    )


def logits(model: LVLM | Unified, batch: Batch) -> jax.Array:
    """For ``model.apply(..., method=tiny.logits)``: a batch to scores over the vocabulary."""
    return model.logits(model(batch)[0])


def close(got, wanted, of=None):
    """Equal within 2e-5 of the largest value of `of` (default `wanted`): the tolerance of tests/parity."""
    largest = np.abs(wanted if of is None else of).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * largest)
