"""P-Former pre-training, BLIText's stage 0: from a sentence the prompt that a frozen OPT-2.7B would write it from.

Run:      lvlm train --config pformer_pretrain --workdir runs/pformer_pretrain
Hardware: planned for 4 x 80 GB or v5p-8, FSDP          Measured: not yet

BERT-base reads a sentence of which a quarter is hidden; its first state becomes 32 vectors in OPT's width. Three losses
are added up: OPT writes the sentence behind the prompt, each vector is drawn to OPT's nearest word, and sentences are
told apart (other devices' with a gradient, which theirs have not). No picture is seen. Sources, as they stand behind
each line: [L] training_logs/BLIP-T/training_stage0.txt, [M] lavis/models/blip2_models/pformer_opt.py, both of yiren-
jian/BLIText (arXiv 2307.07063).

Data: captions of LAION-115M, here as JSON of conversations; override stages.pformer.data.path. OPT's repository holds
pickle files in old revisions: where there are no safetensors, save it anew and override stages.pformer.start.llm.hub.
"""

from ml_collections import ConfigDict

from lvlm_jax.config import to_config
from lvlm_jax.connectors.pformer import PRESETS
from lvlm_jax.llm.opt import PRESETS as OPT

BERT, HOST = "google-bert/bert-base-uncased", "facebook/opt-2.7b"


def get_config(arg: str = "") -> ConfigDict:
    """``pformer_pretrain``, ``:tiny`` for a few steps (tests)."""
    if arg not in ("", "tiny"):
        raise ValueError(f"pformer_pretrain:{arg}: the only argument is 'tiny'")
    c = ConfigDict()
    c.name = "pformer_pretrain"
    c.seed = 42  # [L]
    c.mesh = "FSDP"
    c.remat = "full"
    c.export = False  # no public class holds a P-Former
    c.run = ("pformer",)
    c.model = ConfigDict(
        {
            "pformer": to_config(PRESETS["pformer_bert_base"]),  # [M] bert-base-uncased, num_query_token=32
            "llm": to_config(OPT["opt_2.7b"]),  # [M] opt_model
            "tokenizer": HOST,
            "reader": BERT,
            "reads": 32,  # [M] max_txt_len
            "ends": "\n",  # [M] text = t + "\n"
        }
    )
    c.stages = ConfigDict()
    c.stages.pformer = {
        "loss": "pformer",
        "settings": {
            "mask": 0.25,  # [M] probability_matrix
            "mask_id": 103,  # [M] mask_token_id of bert-base-uncased
            "smoothing": 0.1,  # [M] label_smoothing
            "gathered": True,  # [M] concat_all_gather has no gradient: False is that; here the true one
            "bert": BERT,  # [M] BertModel.from_pretrained
        },
        "trains": ("pformer/**",),  # [M] OPT is frozen
        "steps": 5 * 115_000_000 // 384,  # [L] max_epoch: 5, laion_sentence_115m
        "optimizer": {
            "learning_rate": 1e-4,  # [L] init_lr
            "schedule": "cosine",  # [L] lr_sched: linear_warmup_cosine_lr
            "end_factor": 0.1,  # [L] min_lr: 1e-5
            "warmup": 2000,  # [L] warmup_steps
            "weight_decay": 0.05,  # [L]
            "decay": ("**/kernel", "pformer/embed/table", "pformer/{position,type}_embed"),  # [M] all but vectors
            "clip": None,  # [L] names none
        },
        "data": {
            "source": "llava_json",
            "path": "data/laion115m/captions.jsonl",
            "rows": 384,  # [L] batch_size_train: 128, world_size: 3
            "groups": 384,
            "length": 64,  # BERT's 32 positions and OPT's 32
            "pack": False,
            "workers": 4,  # [L] num_workers
            "on_bad": "skip",
        },
        "start": {"llm": {"hub": HOST}},
        "save_every": 1000,
    }
    return _tiny(c) if arg == "tiny" else c


def _tiny(c: ConfigDict) -> ConfigDict:
    """A few steps of a model of a few thousand weights, from nothing."""
    c.remat = "none"
    c.model.pformer.update(prompt=4, contrast=8, width=16, depth=1, heads=2, mlp_dim=32, vocab=512, context=16)
    c.model.llm.update(vocab=512, width=16, depth=2, heads=2, kv_heads=2, mlp_dim=32, context=64)
    c.model.reads = 12
    stage = c.stages.pformer
    stage.settings.bert = ""
    stage.start = ConfigDict()
    stage.update(steps=4, save_every=2, log_every=1)
    stage.optimizer.warmup = 1
    stage.data.update(rows=8, groups=8, length=24, workers=0)
    return c
