"""PaliGemma stage 3: transfer to one task, here questions about pictures (VQAv2).

Run:      lvlm train --config paligemma_finetune --workdir runs/paligemma_vqa
Hardware: planned for v5e-16 or 8 x 80 GB, FSDP          Measured: not yet

Settings as the authors ran them (PaliGemma, arXiv 2407.07726, section 3.2.4 and appendix J; transfers in
google-research/big_vision, configs/proj/paligemma): nothing frozen, batch 256, Adam with b2 0.999, learning rate 1e-5,
cosine with 5 % warm-up, clip 1.0, no weight decay, no label smoothing, 10 epochs of VQAv2's 443,757 training questions
(10 x 443,757 / 256 = 17,334 steps). The loss is averaged within each example, then over the batch
(weigh_by="example"), and each row holds one example, padded, as theirs does.

Data: a LLaVA JSON whose human turn is ``<image>answer en QUESTION`` and whose answer is a word or two, with the COCO
pictures beside it; override stages.transfer.data.path and .images. For captions the turn is ``<image>caption en`` and
5 epochs of COCO are enough. Boxes and shapes are words: ``detect cat`` -> ``<loc0100><loc0200><loc0300><loc0400> cat``.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``paligemma_finetune`` (224 pixels), ``:448``, ``:896``; ``:v2`` is PaliGemma 2 at 3B, 224 pixels."""
    systems = {"": "paligemma_3b_224", "448": "paligemma_3b_448", "896": "paligemma_3b_896", "v2": "paligemma2_3b_224"}
    if arg not in systems:
        raise ValueError(f"paligemma_finetune:{arg}: choose one of {[name for name in systems if name]}")
    spec = SYSTEMS[systems[arg]]
    c = ConfigDict()
    c.name = "paligemma_finetune"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("transfer",)
    c.model = model_of(spec)
    if arg == "v2":  # PaliGemma 2, arXiv 2412.03555: transfers run without Gemma 2's soft caps
        c.model.llm.attn_softcap = c.model.llm.final_softcap = None
    c.stages = ConfigDict()
    c.stages.transfer = {
        "trains": ("vision/**", "connector/**", "llm/**"),
        "steps": 17334,
        "optimizer": {
            "learning_rate": 1e-5,
            "schedule": "cosine",
            "warmup": 0.05,
            "b2": 0.999,
            "weight_decay": 0.0,
            "clip": 1.0,
        },
        "data": {
            "source": "llava_json",
            "path": "data/vqav2/train.json",
            "images": "data/coco/train2014",
            "rows": 256,
            "groups": 64,
            "length": spec.config.visual_tokens + 64,
            "pictures": 256,
            "pack": False,
            "weigh_by": "example",
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {"all": {"hub": spec.source}},
        "save_every": 1000,
    }
    return c
