"""Tiny randomly perturbed models of the torch library, saved to folders, and the layouts that people hold on disk."""

import json
import re
from pathlib import Path

import pytest
import transformers as hf

torch = pytest.importorskip("torch")  # the reference is installed in one lane only
from safetensors.torch import load_file, save_file  # noqa: E402

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
PICTURE = {"image_size": 28, "patch_size": 7}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
WORDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **WORDS,
}


def perturbed(model, dtype=torch.float32):
    """No weight keeps a special value (unit norms, zero biases), so that a lost one shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(value * 3 + 0.1 * noise if value.ndim > 1 else value + 0.2 * noise)
    return model.to(dtype).eval()


def llama(tied=False):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=tied))


def qwen2(tied=True):
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER, tie_word_embeddings=tied))


def gemma(tied=True):
    return hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER, head_dim=16, tie_word_embeddings=tied))


def gemma2(tied=True):
    sizes = {**DECODER, "num_hidden_layers": 3, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, tie_word_embeddings=tied))


def gemma3(tied=True):
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {**DECODER, "num_hidden_layers": 3, "head_dim": 16, "sliding_window": 7, "layer_types": types}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes, query_pre_attn_scalar=24, tie_word_embeddings=tied))


def qwen3(tied=True):
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=16, tie_word_embeddings=tied))


def mistral(tied=False):
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=7, tie_word_embeddings=tied))


def mistral_v03(tied=False):
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=None, tie_word_embeddings=tied))


def opt(tied=True):
    return hf.OPTForCausalLM(hf.OPTConfig(**DECODER, ffn_dim=48, word_embed_proj_dim=16, tie_word_embeddings=tied))


def gpt2(tied=True):
    sizes = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **WORDS}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, tie_word_embeddings=tied))


def gpt_neox(tied=False):
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**DECODER, tie_word_embeddings=tied))


def mpt(tied=True):
    sizes = {"vocab_size": 512, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, **WORDS}
    return hf.MptForCausalLM(hf.MptConfig(**sizes, tie_word_embeddings=tied))


T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "initializer_factor": 0.2,  # scores have no scale, so that perturbed weights of full size would choose one key each
}


def t5():
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5))


def flan_t5():
    """With a head of its own, which their class does not make but keeps."""
    config = hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = hf.T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().flip(0))
    return model


def clip(**towers):
    vision, text = {**TOWER, **PICTURE}, {**TEXT, "max_position_embeddings": 16, **WORDS}
    return hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24))


def siglip():
    vision, text = {**TOWER, **PICTURE}, {**TEXT, "max_position_embeddings": 16, "projection_size": 32, **WORDS}
    return hf.SiglipModel(hf.SiglipConfig(vision_config=vision, text_config=text))


def clip_vision():
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**TOWER, **PICTURE))


def siglip_vision():
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**TOWER, **PICTURE))


def clip_text():
    return hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT, max_position_embeddings=16, **WORDS))


def siglip_text():
    return hf.SiglipTextModel(hf.SiglipTextConfig(**TEXT, max_position_embeddings=16, projection_size=32, **WORDS))


_ANY_SHAPE = {**TOWER, "num_patches": 16, "patch_size": 7}


def siglip2():
    text = {**TEXT, "max_position_embeddings": 16, "projection_size": 32, **WORDS}
    return hf.Siglip2Model(hf.Siglip2Config(vision_config=_ANY_SHAPE, text_config=text))


def siglip2_vision():
    return hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**_ANY_SHAPE))


def vit():
    return hf.ViTModel(hf.ViTConfig(**TOWER, **PICTURE))


def vit_classifier():
    return hf.ViTForImageClassification(hf.ViTConfig(**TOWER, **PICTURE, num_labels=5))


_DINO = {name: value for name, value in TOWER.items() if name != "intermediate_size"} | PICTURE


def dinov2():
    return hf.Dinov2Model(hf.Dinov2Config(**_DINO, use_swiglu_ffn=True))


def blip2_vision():
    return hf.Blip2VisionModel(hf.Blip2VisionConfig(**TOWER, **PICTURE, initializer_range=0.02))


def dinov2_registers():
    return hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**_DINO, num_register_tokens=3))


def llava(tower="clip", decoder="llama", **fields):
    towers = {"clip": hf.CLIPVisionConfig, "siglip": hf.SiglipVisionConfig}
    near = {"num_hidden_layers": 3, "head_dim": 16, "sliding_window": 7}
    decoders = {
        "llama": lambda **sizes: hf.LlamaConfig(**sizes),
        "qwen2": lambda **sizes: hf.Qwen2Config(**sizes),
        "qwen3": lambda **sizes: hf.Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=True),
        "mistral": lambda **sizes: hf.MistralConfig(**sizes, sliding_window=None),
        "gemma2": lambda **sizes: hf.Gemma2Config(**sizes | near),
        "gemma3": lambda **sizes: hf.Gemma3TextConfig(**sizes | near),
    }
    if tower == "siglip":
        fields = {"vision_feature_select_strategy": "full", **fields}
    config = hf.LlavaConfig(
        vision_config=towers[tower](**TOWER, **PICTURE),
        text_config=decoders[decoder](**DECODER),
        image_token_index=511,
        **fields,
    )
    return hf.LlavaForConditionalGeneration(config)


PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def llava_next():
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, **PICTURE),
        text_config=hf.LlamaConfig(**{**DECODER, "max_position_embeddings": 256}),
        image_token_index=511,
        image_grid_pinpoints=PINPOINTS,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def llava_next_video():
    config = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, **PICTURE),
        text_config=hf.LlamaConfig(**{**DECODER, "max_position_embeddings": 256}),
        image_token_index=511,
        video_token_index=510,
        image_grid_pinpoints=PINPOINTS,
    )
    return hf.LlavaNextVideoForConditionalGeneration(config)


def llava_onevision():
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, **PICTURE, vision_use_head=False),
        text_config=hf.Qwen2Config(**{**DECODER, "max_position_embeddings": 512}),
        image_token_index=483,
        video_token_index=484,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def paligemma(version=1):
    text = {**DECODER, "max_position_embeddings": 256, "head_dim": 16}
    decoder = hf.GemmaConfig(**text) if version == 1 else hf.Gemma2Config(**text, query_pre_attn_scalar=24)
    tower = hf.SiglipVisionConfig(**TOWER, **PICTURE, vision_use_head=False, projection_dim=32)
    config = hf.PaliGemmaConfig(
        vision_config=tower, text_config=decoder, image_token_index=511, projection_dim=32, hidden_size=32
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def saved(model, path, shard=None):
    """The folder that the torch library writes."""
    model.save_pretrained(path, **({} if shard is None else {"max_shard_size": shard}))
    return Path(path)


def rekeyed(folder, path, rename, config=None):
    """A copy of a single-file folder with other keys (None: dropped) and, perhaps, another config.json."""
    path = Path(path)
    path.mkdir()
    tensors = {rename(key): value for key, value in load_file(folder / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    content = config or json.loads((folder / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content))
    return path


# Rewritings of layout "hf-5", which the torch library writes for a fresh LLaVA.
_TO = {
    "hf-4": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "hf-4.52": [
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^vision_tower\.", "model.vision_tower.vision_model."),
        (r"^multi_modal_projector", "model.multi_modal_projector"),
        (r"^image_newline", "model.image_newline"),
    ],
    "hf-5": [],
    "hf-5-memory": [
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^vision_tower\.", "model.vision_tower."),
        (r"^multi_modal_projector", "model.multi_modal_projector"),
        (r"^image_newline", "model.image_newline"),
    ],
    "llava-original": [
        (r"^language_model\.", ""),
        (r"^vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
        (r"^multi_modal_projector\.linear_1", "model.mm_projector.0"),
        (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"),
        (r"^image_newline", "model.image_newline"),
    ],
}


def llava_key(layout):
    """The renaming of a fresh LLaVA's keys into a layout."""

    def rename(key):
        for pattern, text in _TO[layout]:
            key, count = re.subn(pattern, text, key)
            if count:
                break
        return key

    return rename


def original_config(folder):
    """The LLaVA authors' config.json for a LLaVA folder of the torch library; the tower is in a folder of its own."""
    raw = json.loads((folder / "config.json").read_text())
    return {
        **raw["text_config"],
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
    }
