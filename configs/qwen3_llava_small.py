"""LLaVA's two stages on a small host: SigLIP-so400m at 384 pixels and Qwen3-0.6B, for one free accelerator.

Run:      lvlm train --config qwen3_llava_small --workdir runs/qwen3_llava_small
Hardware: planned for one accelerator of 16 GB (0.6B) to 80 GB (4B)          Measured: not yet

No release: the recipe is LLaVA-1.5's (arXiv 2310.03744, table 9; scripts/v1_5 of haotian-liu/LLaVA) on other parts.
Stage 1, align: tower and language model frozen, a two-layer MLP trained on the 558K caption pairs, batch 256, learning
rate 1e-3, one epoch (2,181 steps). Stage 2, instruct: projector and language model on the 665K mix, batch 128, learning
rate 2e-5, one epoch (5,198 steps). Both cosine with 3 % warm-up, no weight decay. Rows are packed: a picture takes 729
positions, so 64 rows of 3,200 hold about 256 pairs, and 64 of 4,096 about 128 conversations and more.

Data: as llava15_align and llava15_instruct; override stages.align.data.path, stages.instruct.data.path and their
.images. On 16 GB, accumulate keeps two rows at a time on the device.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``qwen3_llava_small`` (0.6B), ``:1.7b``, ``:4b``; ``:gemma3_1b`` and ``:gemma3_4b`` put Gemma 3 in its place."""
    systems = {"": "llava_qwen3_0.6b"} | {size: f"llava_qwen3_{size}" for size in ("0.6b", "1.7b", "4b")}
    systems |= {f"gemma3_{size}": f"llava_gemma3_{size}" for size in ("1b", "4b")}
    if arg not in systems:
        raise ValueError(f"qwen3_llava_small:{arg}: choose one of {[name for name in systems if name]}")
    spec = SYSTEMS[systems[arg]]
    c = ConfigDict()
    c.name = "qwen3_llava_small"
    c.seed = 0
    c.mesh = "DP"
    c.remat = "full"
    c.run = ("align", "instruct")
    c.model = model_of(spec)
    optimizer = {"schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0, "clip": 1.0}
    data = {"source": "llava_json", "rows": 64, "groups": 64, "workers": 4, "on_bad": "skip"}
    c.stages = ConfigDict()
    c.stages.align = {
        "trains": ("connector/**",),
        "steps": 2181,
        "optimizer": {"learning_rate": 1e-3, **optimizer},
        "accumulate": 32,
        "data": {
            **data,
            "path": "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
            "images": "data/LLaVA-Pretrain/images",
            "template": "plain",
            "length": 3200,
            "pictures": 256,
        },
        "start": {"vision": {"hub": "google/siglip-so400m-patch14-384"}, "llm": {"hub": spec.source}},
        "save_every": 500,
    }
    c.stages.instruct = {
        "trains": ("connector/**", "llm/**"),
        "steps": 5198,
        "optimizer": {"learning_rate": 2e-5, **optimizer},
        "accumulate": 32,
        "data": {
            **data,
            "path": "data/LLaVA-Instruct/llava_v1_5_mix665k.json",
            "images": "data/LLaVA-Instruct",
            "length": 4096,
            "pictures": 192,
        },
        "start": {"all": {"stage": "align"}},
        "save_every": 500,
    }
    return c
