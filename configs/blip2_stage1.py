"""BLIP-2 stage 1: a Q-Former learns to find, match and write captions, between a frozen tower and BERT's words.

Run:      lvlm train --config blip2_stage1 --workdir runs/blip2_stage1
Hardware: planned for v5p-32 or 16 x 80 GB, FSDP          Measured: not yet

EVA01-CLIP's giant, frozen and without its last block; behind it a norm that trains; a Q-Former of BERT-base's sizes, 32
queries, that begins as BERT. Sources, as they stand behind each line: [Y] lavis/projects/blip2/train/
pretrain_stage1.yaml, [M] lavis/models/blip2_models/blip2_qformer.py, both of salesforce/LAVIS; [P] the paper, arXiv
2301.12597, section 3.4. The released weights saw 129 million pairs; the file of settings names COCO and Visual Genome.

Their warm-up begins at 1e-6 and their cosine falls once an epoch; here it begins at 0 and falls each step. Their towers
run in float16 with autocast; here in bfloat16. The texts and pictures of other devices have no gradient in their
contrast (concat_all_gather); here they have.

Data: tar shards of KEY.jpg and KEY.txt; override stages.qformer.data.path. ``:pformer`` is BLIText's first stage (arXiv
2307.07063, lavis/projects/blip-T/train/pretrain_stage1.yaml of yiren-jian/BLIText, [B]): the queries are also drawn to
the prompts of a P-Former that ``pformer_pretrain`` trained.
"""

import dataclasses

from ml_collections import ConfigDict

from lvlm_jax.config import to_config
from lvlm_jax.connectors.pformer import PFormerConfig
from lvlm_jax.connectors.qformer import PRESETS as QFORMERS
from lvlm_jax.llm.opt import PRESETS as OPT
from lvlm_jax.train.pformer_losses import ALIGNMENT
from lvlm_jax.vision import blip2_vit, eva
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD

BERT = "google-bert/bert-base-uncased"
HEADS = ("vision_projection/**", "text_projection/**", "match_head/**", "word_head/**", "temperature")


def get_config(arg: str = "") -> ConfigDict:
    """``blip2_stage1``, ``:pformer`` with BLIText's alignment, ``:tiny`` for a few steps (tests)."""
    if arg not in ("", "pformer", "tiny"):
        raise ValueError(f"blip2_stage1:{arg}: choose one of ['pformer', 'tiny']")
    c = ConfigDict()
    c.name = "blip2_stage1"
    c.seed = 42  # [Y] seed
    c.mesh = "FSDP"
    c.remat = "full"
    c.export = False  # no public class holds what pre-trains
    c.run = ("qformer",)
    c.model = _model(aligned=arg == "pformer")
    c.stages = ConfigDict()
    c.stages.qformer = {
        "loss": "image_text",
        "settings": {
            "start_id": 30522,  # [M] [DEC], the tokenizer's bos_token
            "tower": "timm/eva_giant_patch14_clip_224.laion400m",  # [M] init_vision_encoder, eva_clip_g
            "bert": BERT,  # [M] init_Qformer, bert-base-uncased; both feed-forwards begin as BERT's
            "gathered": True,  # [M] concat_all_gather has no gradient: False is that; here the true one
            "smoothing": 0.1,  # [M] label_smoothing of both contrasts, and of BERT's head
            "align": 0.0,
        },
        # [M] freeze_vit, ln_vision and all that is new train
        "trains": ("vision/post_norm/**", "qformer/**", *HEADS),
        "steps": 250_000,  # [P] 250k steps of the first stage
        "optimizer": {
            "learning_rate": 1e-4,  # [Y] init_lr
            # [M] all but vectors
            "decay": ("**/kernel", "qformer/queries", "qformer/embed/table", "qformer/position_embed"),
            "schedule": "cosine",  # [Y] lr_sched: linear_warmup_cosine_lr
            "end_factor": 0.1,  # [Y] min_lr: 1e-5
            "warmup": 5000,  # [Y] warmup_steps
            "weight_decay": 0.05,  # [Y]
            "b2": 0.98,  # [P]
            "clip": None,  # [Y] names none
        },
        "data": {
            "source": "webdataset",
            "path": "data/blip2/*.tar",
            "rows": 1680,  # [P] batch of the first stage with ViT-g
            "groups": 1680,
            "pictures": 1680,
            "length": 32,  # [M] max_txt_len
            "pack": False,
            "augment": {"flip": True, "crop": 0.5},  # [Y] blip2_image_train
            "workers": 4,  # [Y] num_workers
            "on_bad": "skip",
        },
        "save_every": 1000,
    }
    if arg == "pformer":
        _align(c)
    return _tiny(c) if arg == "tiny" else c


def _model(aligned: bool) -> ConfigDict:
    vision = dataclasses.replace(eva.PRESETS["eva01_clip_g14_224"], depth=39, classes=0, **blip2_vit.READ)
    c = ConfigDict(
        {
            "vision": to_config(vision),
            "qformer": to_config(QFORMERS["qformer_text"]),  # [M] num_query_token=32, cross_attention_freq=2
            "projection": 256,  # [M] embed_dim
            # [Y] image_size: 224; [M] CLIP's mean and deviation; their evaluation squashes too
            "image": {"size": 224, "patch": 14, "mean": CLIP_MEAN, "std": CLIP_STD, "fit": "squash"},
            "tokenizer": BERT,
        }
    )
    if aligned:
        c.pformer = to_config(PFormerConfig())
        c.language_width = OPT["opt_2.7b"].width  # their opt_proj is for OPT 2.7B
    return c


def _align(c: ConfigDict) -> None:
    """BLIText's first stage: COCO, VG, CC3M and SBU, 4 million pairs."""
    stage = c.stages.qformer
    stage.settings.align = ALIGNMENT["stage 1"]  # [B] loss_weight: 10.0
    stage.trains = (*stage.trains, "language_projection/**")
    stage.start = ConfigDict({"pformer": {"workdir": "runs/pformer_pretrain"}})  # [B] pretrained_stage0
    stage.optimizer.b2 = 0.999  # [B] names none, LAVIS' own
    stage.steps = 10 * 4_000_000 // 384  # [B] max_epoch: 10
    stage.data.update(rows=384, groups=384, pictures=384)  # [B] batch_size_train: 128, on the three GPUs of their logs


def _tiny(c: ConfigDict) -> ConfigDict:
    """A few steps of a model of a few thousand weights, from nothing."""
    c.remat = "none"
    c.model.image.update(size=28, patch=7)
    c.model.vision.update(image_size=28, patch_size=7, width=16, depth=1, heads=2, mlp_dim=32)
    c.model.qformer.update(queries=4, width=16, depth=2, heads=2, mlp_dim=32, vocab=512, context=32)
    c.model.projection = 8
    stage = c.stages.qformer
    stage.settings.update(tower="", bert="", start_id=511)
    stage.update(steps=4, save_every=2, log_every=1)
    stage.optimizer.warmup = 1
    stage.data.update(rows=8, groups=8, pictures=8, length=16, workers=0)
    return c
