"""BLIP-2 stage 2: learn to generate from a frozen language model.

Run:      lvlm train --config blip2_stage2 --workdir runs/blip2_stage2
Hardware: planned for v5p-32 or 16 x 80 GB, FSDP          Measured: not yet

Settings: BLIP-2, arXiv 2301.12597, section 3.4, where it says them, else salesforce/LAVIS
(projects/blip2/train/pretrain_stage2.yaml; models/blip2_models): tower and language model frozen, Q-Former, projection
and the tower's last norm trained (`ln_vision`, blip2_opt.py), 80,000 steps of 1,920 captions (1,520 with Flan-T5), each
in a row of its own, at most 32 words behind 32 queries (`max_txt_len`). Half of a picture's area at least is shown,
mirrored or not.

Data: captions in img2dataset's tars; theirs were 129M pairs of COCO, Visual Genome, CC3M, CC12M, SBU and LAION, lower
case and without .!"()*#:;~ (processors/blip_processors.py). Override stages.generate.data.path. With Flan-T5 they cut
each caption at random and read its first half; here nothing is read. Nor are a tenth of the Q-Former's activations
dropped, as BERT's config has it.

Weights: the Q-Former and the norm before it are what a blip2_stage1 run left (its text and heads stay out), the dense
layer is fresh; tower and language model are the release's, which froze them. Another run: override
stages.generate.start["connector/qformer"].workdir and start["vision/post_norm"].workdir (in quotes, for the shell). Or
empty both, and override .hub with a folder of the authors' file of either stage, or the release's name.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS

SIZES = {
    "": "blip2_opt_2_7b",
    "opt_2_7b": "blip2_opt_2_7b",
    "opt_6_7b": "blip2_opt_6_7b",
    "flan_t5_xl": "blip2_flan_t5_xl",
    "flan_t5_xxl": "blip2_flan_t5_xxl",
    "tiny": "blip2_opt_2_7b",
}
STAGE1 = "runs/blip2_stage1"
"""Workdir of the first stage, as its recipe names it."""
VOCAB = 35
"""Words of easy-VQA with the special tokens (`data.easy_vqa.word_tokenizer`)."""


def get_config(arg: str = "") -> ConfigDict:
    """``blip2_stage2`` (OPT-2.7B), ``:opt_6_7b``, ``:flan_t5_xl``, ``:flan_t5_xxl``; ``:tiny`` for a look around."""
    if arg not in SIZES:
        raise ValueError(f"blip2_stage2:{arg}: choose one of {[name for name in SIZES if name]}")
    spec = SYSTEMS[SIZES[arg]]
    rows = 1520 if "t5" in arg else 1920  # section 3.4
    c = ConfigDict()
    c.name = "blip2_stage2"
    c.seed = 42  # pretrain_stage2.yaml
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("generate",)
    c.model = model_of(spec)
    c.stages = ConfigDict()
    c.stages.generate = {
        "trains": ("connector/**", "vision/post_norm/**"),  # blip2_opt.py: what is left to require a gradient
        "steps": 80_000,  # section 3.4
        "optimizer": {
            "learning_rate": 1e-4,  # section 3.4
            "schedule": "cosine",
            "warmup": 2000,  # section 3.4
            "end_factor": 0.5,  # section 3.4: down to 5e-5; pretrain_stage2.yaml has 1e-5
            "b2": 0.98,  # section 3.4
            "weight_decay": 0.05,  # section 3.4
            "decay": ("connector/**/kernel", "connector/**/queries"),  # blip2.py: all but vectors
            "clip": None,  # tasks/base_task.py clips nothing
        },
        "data": {
            "source": "webdataset",
            "path": "data/blip2/{00000..12900}.tar",
            "rows": rows,
            "groups": 16,
            "length": 64,  # 32 queries and `max_txt_len` words
            "pictures": rows,
            "pack": False,
            "augment": {"flip": True, "crop": 0.5},  # blip2_image_train
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {
            "vision": {"hub": spec.source},
            "vision/post_norm": {"workdir": STAGE1},
            "connector/qformer": {"workdir": STAGE1},
            "llm": {"hub": spec.source},
        },
        "save_every": 2000,
    }
    return _tiny(c) if arg == "tiny" else c


def _tiny(c: ConfigDict) -> ConfigDict:
    """Two steps of a few thousand weights on easy-VQA's captions."""
    small = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
    c.model.vision.update({**small, "image_size": 16, "patch_size": 8})
    c.model.image.update({"size": 16, "patch": 8})
    c.model.connector.update({**small, "queries": 4})
    c.model.llm.update({**small, "kv_heads": 2, "vocab": VOCAB, "context": 64})
    c.model.tokenizer, c.model.image_token_id = "easy_vqa", 4
    stage = c.stages.generate
    stage.steps, stage.save_every, stage.log_every, stage.optimizer.warmup = 2, 2, 1, 1
    sizes = {"rows": 16, "groups": 8, "pictures": 16, "length": 32, "pack": False}
    stage.data = ConfigDict({"source": "easy_vqa", "of": "captions", **sizes})
    stage.start = ConfigDict()
    return c
