"""InstructBLIP: instruction tuning with a Q-Former that reads the instruction.

Run:      lvlm train --config instructblip --workdir runs/instructblip
Hardware: planned for v5p-64 or 16 x 80 GB, FSDP          Measured: not yet

Settings: InstructBLIP, arXiv 2305.06500, section 2.6, and salesforce/LAVIS (models/blip2_models/
blip2_vicuna_instruct.py, blip2_t5_instruct.py): tower and language model frozen, Q-Former, projection and the tower's
last norm trained, at most 60,000 steps of 128 (Vicuna-7B), 64 (13B and Flan-T5-XXL) or 192 (Flan-T5-XL) examples, each
in a row of its own.

Data: theirs were 13 sets written out by templates, drawn in proportion to the square root of their sizes (section
2.4). Here stand the three parts of LLaVA-Instruct-150K among them (with Flan-T5, which writes one answer to one
question, two); add the others, with their weights, to stages.tune.data.members. It begins with the release: the authors
begin with BLIP-2's Q-Former after stage 1.
"""

import math

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS

SIZES = {
    "": ("instructblip_vicuna_7b", 128),
    "vicuna_7b": ("instructblip_vicuna_7b", 128),
    "vicuna_13b": ("instructblip_vicuna_13b", 64),
    "flan_t5_xl": ("instructblip_flan_t5_xl", 192),
    "flan_t5_xxl": ("instructblip_flan_t5_xxl", 64),
    "tiny": ("instructblip_vicuna_7b", 16),
}
"""System, and examples a step (section 2.6)."""

PARTS = {"conversation_58k": 58_000, "detail_23k": 23_000, "complex_reasoning_77k": 77_000}
"""Files of LLaVA-Instruct-150K and their sizes."""


def get_config(arg: str = "") -> ConfigDict:
    """``instructblip`` (Vicuna-7B), ``:vicuna_13b``, ``:flan_t5_xl``, ``:flan_t5_xxl``; ``:tiny`` for a look around."""
    if arg not in SIZES:
        raise ValueError(f"instructblip:{arg}: choose one of {[name for name in SIZES if name]}")
    name, rows = SIZES[arg]
    spec = SYSTEMS[name]
    c = ConfigDict()
    c.name = "instructblip"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("tune",)
    c.model = model_of(spec)
    c.model.instruction.length = 128  # blip2_vicuna_instruct.py: max_txt_len
    c.stages = ConfigDict()
    c.stages.tune = {
        "trains": ("connector/**", "vision/post_norm/**"),  # blip2_vicuna_instruct.py
        "steps": 60_000,  # section 2.6
        "optimizer": {
            "learning_rate": 1e-5,  # section 2.6
            "schedule": "cosine",
            "warmup": 1000,  # section 2.6
            "b2": 0.999,  # section 2.6
            "weight_decay": 0.05,  # section 2.6
            # blip2.py, get_optimizer_params: all but vectors
            "decay": ("connector/**/kernel", "connector/**/queries", "connector/**/{table,position_embed}"),
            "clip": None,  # tasks/base_task.py clips nothing
        },
        "data": {
            "source": "mixture",
            "members": {
                part: {
                    "source": "llava_json",
                    "path": f"data/LLaVA-Instruct-150K/{part}.json",
                    "images": "data/coco/train2014",
                    "weight": math.sqrt(size),  # section 2.4
                }
                for part, size in PARTS.items()
                if "t5" not in name or part != "conversation_58k"  # of several rounds
            },
            "rows": rows,
            "groups": 32,
            "length": 32 + 128 + 256,  # queries, max_txt_len, max_output_txt_len
            "pictures": rows,
            "pack": False,
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {"all": {"hub": spec.source}},
        "save_every": 3000,
    }
    return _tiny(c) if arg == "tiny" else c


def _tiny(c: ConfigDict) -> ConfigDict:
    """Two steps of a few thousand weights on easy-VQA's questions, whose words the connector reads too."""
    small, vocab = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}, 35
    c.model.vision.update({**small, "image_size": 16, "patch_size": 8})
    c.model.image.update({"size": 16, "patch": 8})
    c.model.connector.update({**small, "queries": 4, "vocab": vocab, "context": 32})
    c.model.llm.update({**small, "kv_heads": 2, "vocab": vocab, "context": 128})
    c.model.tokenizer = c.model.instruction.tokenizer = "easy_vqa"
    c.model.image_token_id, c.model.instruction.length = 4, 16
    stage = c.stages.tune
    stage.steps, stage.save_every, stage.log_every, stage.optimizer.warmup = 2, 2, 1, 1
    sizes = {"rows": 16, "groups": 8, "pictures": 32, "length": 128, "pack": False}
    stage.data = ConfigDict({"source": "easy_vqa", "of": "questions", **sizes})
    stage.start = ConfigDict()
    return c
