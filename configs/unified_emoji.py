"""One transformer that reads and writes text and pictures, trained here from nothing on drawings of emoji.

Run, in the folder of the checkout (npm comes with Node.js, 102 MB of packages):

          pip install -e '.[emoji]'
          npm install --no-save --ignore-scripts --prefix data/emoji @iconify-json/noto@1.2.9 \
            @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/openmoji@1.2.29 \
            emojibase-data@17.0.0
          lvlm train --config unified_emoji:plain --workdir runs/unified_plain
          lvlm train --config unified_emoji --workdir runs/unified_emoji --config.beside=runs/unified_plain
          lvlm generate runs/unified_emoji --prompt "" --temperature 1 --draw drawn.png
          lvlm generate runs/unified_emoji --prompt "red apple" --picture --draw apple.png

Hardware: planned for two CPU cores, 4 GiB of memory          Measured: not yet

1. vq:      a small VQGAN learns to write drawings of 32 x 32 pixels as 64 codes out of 256 and to read them back, on
            the drawings of three vendors.
2. unified: a decoder learns words and codes in one sequence and one loss: picture then name (three vendors), name then
            picture (one vendor, so that a name has one drawing).

The second stage's remedies against training that runs away are values of this file (`STABLE`): norms of queries and
keys, z-loss, warm-up, skipped spikes. ``unified_emoji:plain`` goes without them; the report of a run with
``beside`` draws both losses into one chart.

Scores: `exact_match[fluent]`, names of drawings by a vendor that no stage saw, and `exact_match[twemoji]`, of drawings
that all have seen; `drawn@1` and `drawn@10`, the share of drawings whose nearest picture, by pixels, is of the concept
that was asked for, among 1,594; `written_and_drawn`, of answers to no prompt, name and picture out of one call.
"""

from ml_collections import ConfigDict

from lvlm_jax.data.emoji import SPECIALS, VENDORS

DATA = "data/emoji"
UNSEEN, DRAWN = "fluent", "twemoji"
"""The vendor that no stage sees, and the one whose drawings are to be drawn."""
SIZE, CODES, WORDS = 32, 256, 1472
"""Of the names of all concepts there are 1,467 words, special tokens among them; the other rows stay unused."""

STABLE = {"qk_norm": "head_layer", "z_loss": 1e-5, "warmup": 0.05, "spike": 3.0}
"""Chameleon's kit (arXiv 2405.09818, section 2.3: query-key norm, z-loss of 1e-5), warm-up, and skipped spikes."""
PLAIN = {"qk_norm": False, "z_loss": 0.0, "warmup": 0, "spike": 0.0}


def get_config(arg: str = "") -> ConfigDict:
    """``unified_emoji``, ``:plain`` without the stability kit, ``:tiny`` for a few steps of everything (tests)."""
    kits = {"": STABLE, "plain": PLAIN, "tiny": STABLE}
    if arg not in kits:
        raise ValueError(f"unified_emoji:{arg}: choose one of {[name for name in kits if name]}")
    kit = kits[arg]
    seen = tuple(name for name in VENDORS if name != UNSEEN)
    c = ConfigDict()
    c.name = "unified_emoji"
    c.seed = 0
    c.mesh = "DP"
    c.run = ("vq", "unified")
    c.model = _model(kit)
    c.stages = ConfigDict()
    c.stages.vq = {
        "loss": "vq",
        "settings": {"distance": "l1", "commitment": 0.25, "codebook": 1.0, "codebook_from": "latents"},
        "trains": ("vision/**",),
        "steps": 1000,
        "optimizer": {"learning_rate": 2e-3, "b2": 0.98, "warmup": 0.05, "clip": 1.0},
        "data": {
            "source": "emoji",
            "path": DATA,
            "vendors": seen,
            "of": "captions",
            "augment": {"shift": 4, "zoom": 0.1, "colour": 0.2},
            "rows": 48,
            "groups": 8,
            "pictures": 48,
            "length": 1,
            "pack": False,
        },
    }
    c.stages.unified = {
        "loss": "unified",
        "settings": {"z_loss": kit["z_loss"]},
        "trains": ("llm/**",),
        "steps": 1200,
        "optimizer": {"learning_rate": 3e-3, "b2": 0.98, "warmup": kit["warmup"], "clip": 1.0, "weight_decay": 0.05},
        "spike": {"factor": kit["spike"]},
        "data": {
            "source": "mixture",
            "members": {
                "say": {"source": "emoji", "path": DATA, "vendors": seen, "of": "captions", "weight": 1.0},
                "draw": {"source": "emoji", "path": DATA, "vendors": (DRAWN,), "of": "drawings", "weight": 1.0},
            },
            "rows": 16,
            "groups": 8,
            "pictures": 64,
            "length": 304,
        },
        "start": {"vision": {"stage": "vq"}},
        "evaluate": ("after",),
    }
    data = {"source": "emoji", "path": DATA, "vendors": (DRAWN, UNSEEN), "of": "captions"}
    c.evaluation = ConfigDict({"data": data, "scores": ("exact",), "max_new_tokens": 12, "rows": 64})
    for stage in c.stages.values():
        stage.log_every, stage.save_every = 20, 200
    return _tiny(c) if arg == "tiny" else c


def _model(kit: dict) -> ConfigDict:
    return ConfigDict(
        {
            # 8 x 8 codes of 4 x 4 pixels
            "vision": {
                "image_size": SIZE,
                "channels": 16,
                "multipliers": (1, 2, 4),
                "codes": CODES,
                "code_width": 16,
                "latent": 64,
                "blocks": 1,
                "groups": 8,
            },
            "llm": {
                "vocab": WORDS + CODES,
                "width": 192,
                "depth": 4,
                "heads": 6,
                "kv_heads": 6,
                "mlp_dim": 512,
                "context": 304,
                "qk_norm": kit["qk_norm"],
            },
            "image": {"size": SIZE, "patch": 4, "mean": (0.5,) * 3, "std": (0.5,) * 3, "fit": "squash"},
            "tokenizer": f"emoji:{DATA}",
            "first_code": WORDS,
            "image_id": SPECIALS.index("<image>"),
            "begin_id": SPECIALS.index("<begin>"),
            "end_id": SPECIALS.index("<end>"),
        }
    )


def _tiny(c: ConfigDict) -> ConfigDict:
    """A few steps of a model of a few thousand weights."""
    c.model.image.update(size=16, patch=4)
    c.model.vision.update(image_size=16, channels=4, codes=16, code_width=4, latent=8, groups=4)
    c.model.llm.update(vocab=WORDS + 16, width=16, depth=2, heads=2, kv_heads=2, mlp_dim=32, context=64)
    for stage in c.stages.values():
        stage.steps, stage.save_every, stage.log_every = 4, 2, 1
        stage.data.rows, stage.data.pictures = 8, 8
    c.stages.unified.data.update(length=32, pictures=16)
    c.evaluation.update(rows=8, max_new_tokens=4)
    return c
