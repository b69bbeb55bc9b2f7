"""What there is, part by part, and how it was checked: the one source of the README's table and of ``lvlm list``."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """One line of the table.

    status: "parity" for a tiny, randomly perturbed copy that gives the reference's numbers in float32; "re-derived"
    where no reference can be installed and a second one was written from the paper; else what is true of it, in words.
    tested: the files or folders of tests that back it.
    """

    part: Literal["vision", "connector", "language", "system"]
    what: str
    status: str
    tested: tuple[str, ...]


STATUS: tuple[Status, ...] = (
    Status(
        part="vision",
        what="CLIP B/32, B/16, L/14, L/14-336 (vision and text towers)",
        status="parity",
        tested=("tests/parity/test_clip.py",),
    ),
    Status(
        part="vision",
        what="SigLIP B/16, L/16, So400m/14; SigLIP 2, of one size or with pictures of any shape (NaFlex)",
        status="parity",
        tested=("tests/parity/test_siglip.py", "tests/parity/test_siglip2.py"),
    ),
    Status(
        part="vision",
        what="ViT (torch library's, timm's, AugReg's npz), DINOv2 (with registers, giant)",
        status="parity",
        tested=("tests/parity/test_vit.py", "tests/parity/test_timm.py", "tests/parity/test_vit_jax.py"),
    ),
    Status(
        part="vision",
        what="EVA-CLIP (EVA-01 g/14; EVA-02 B/16, L/14, E/14), BLIP-2's tower",
        status="parity",
        tested=("tests/parity/test_timm.py", "tests/parity/test_vit.py"),
    ),
    Status(
        part="vision",
        what="NFNet F0 to F6, with timm's and DeepMind's standardisation",
        status="parity with timm's; DeepMind's by hand",
        tested=("tests/parity/test_timm.py", "tests/vision/test_nfnet.py"),
    ),
    Status(
        part="vision",
        what="VQ picture tokenizers: Chameleon's, Janus's",
        status="parity",
        tested=("tests/parity/test_vq.py",),
    ),
    Status(
        part="vision",
        what="PaliGemma's mask codec (16 tokens to a mask and back)",
        status="re-derived",
        tested=("tests/parity/test_mask_codec.py",),
    ),
    Status(
        part="connector",
        what="linear (LLaVA 1), two-layer MLP (LLaVA-1.5)",
        status="parity",
        tested=("tests/parity/test_llava.py",),
    ),
    Status(
        part="connector",
        what="pixel shuffle (nanoVLM, SmolVLM), average pool (Gemma 3)",
        status="parity",
        tested=("tests/parity/test_connectors.py",),
    ),
    Status(
        part="connector",
        what="Perceiver resampler: Flamingo's, Idefics', Idefics 2's",
        status="parity",
        tested=("tests/parity/test_perceiver.py",),
    ),
    Status(
        part="connector",
        what="Q-Former: BLIP-2's and InstructBLIP's, with its pre-training (ITC, ITM, ITG)",
        status="parity",
        tested=("tests/parity/test_qformer.py", "tests/parity/test_image_text.py"),
    ),
    Status(
        part="connector",
        what="P-Former",
        status="re-derived",
        tested=("tests/parity/test_image_text.py",),
    ),
    Status(
        part="connector",
        what="gated projector (CogVLM)",
        status="re-derived",
        tested=("tests/parity/test_cogvlm.py",),
    ),
    Status(
        part="language",
        what="LLaMA 1, 2, 3, 3.1, 3.2 (text), Vicuna 1.5, SmolLM2, Mistral",
        status="parity",
        tested=("tests/parity/test_decoders.py",),
    ),
    Status(
        part="language",
        what="Qwen2, Qwen2.5, Qwen3",
        status="parity",
        tested=("tests/parity/test_decoders.py",),
    ),
    Status(
        part="language",
        what="Gemma 1, 2, 3 (text)",
        status="parity",
        tested=("tests/parity/test_decoders.py",),
    ),
    Status(
        part="language",
        what="OPT, GPT-2, GPT-NeoX and Pythia, MPT, GLM-4",
        status="parity",
        tested=("tests/parity/test_gpt.py",),
    ),
    Status(
        part="language",
        what="ChatGLM2 and 3, Qwen 1",
        status="parity with the same maths under other names",
        tested=("tests/parity/test_renamed.py",),
    ),
    Status(
        part="language",
        what="PaLM's block (no public checkpoint), ChatGLM-6B",
        status="re-derived",
        tested=("tests/parity/test_renamed.py",),
    ),
    Status(
        part="language",
        what="T5 1.0, Flan-T5 (alone; no system stands on it yet)",
        status="parity",
        tested=("tests/parity/test_t5.py",),
    ),
    Status(
        part="system",
        what="LLaVA-1.5 (7B, 13B)",
        status="parity, import and export",
        tested=("tests/parity/test_llava.py", "tests/hub"),
    ),
    Status(
        part="system",
        what="LLaVA-NeXT (Vicuna 7B and 13B, Mistral 7B, Yi 34B, Llama-3 8B): pictures of any resolution",
        status="parity, import and export",
        tested=("tests/parity/test_llava_next.py", "tests/hub"),
    ),
    Status(
        part="system",
        what="LLaVA-NeXT-Video (7B): frames averaged before the connector",
        status="parity, import and export",
        tested=("tests/parity/test_llava_next_video.py", "tests/hub"),
    ),
    Status(
        part="system",
        what="LLaVA-OneVision (0.5B, 7B, 72B): tiles, several pictures, videos",
        status="parity, import and export",
        tested=("tests/parity/test_llava_onevision.py", "tests/hub"),
    ),
    Status(
        part="system",
        what="PaliGemma 1 and 2",
        status="parity, import and export",
        tested=("tests/parity/test_paligemma.py", "tests/hub"),
    ),
    Status(
        part="system",
        what="nanoVLM's sizes (222M, 450M), LLaVA on Qwen3 and Gemma 3 (0.6B to 4B)",
        status="parity of the make; no public checkpoint",
        tested=("tests/parity/test_nanovlm.py", "tests/parity/test_llava.py"),
    ),
    Status(
        part="system",
        what="LLaVA 1 (7B, 13B)",
        status="same code as LLaVA-1.5 with a linear connector; released as deltas, which we do not apply",
        tested=("tests/golden",),
    ),
    Status(
        part="system",
        what="LLaVA-1.5 with a Perceiver resampler",
        status="trains and generates; no public checkpoint",
        tested=("tests/models",),
    ),
    Status(
        part="system",
        what="Idefics 1 (9B, 80B): gated cross-attention",
        status="parity, import and export",
        tested=("tests/parity/test_idefics.py", "tests/hub"),
    ),
    Status(
        part="system",
        what="OpenFlamingo: what it trains, over a tower and a language model loaded apart",
        status="re-derived",
        tested=("tests/parity/test_open_flamingo.py",),
    ),
    Status(
        part="system",
        what="CogVLM's visual expert (no preset yet)",
        status="re-derived",
        tested=("tests/parity/test_cogvlm.py",),
    ),
    Status(
        part="system",
        what="Chameleon (7B, 34B): reads and writes pictures as tokens",
        status="parity, import and export",
        tested=("tests/parity/test_chameleon.py", "tests/hub"),
    ),
)


def markdown() -> str:
    """The README's table."""
    lines = ["| part | what | status | tested in |", "| --- | --- | --- | --- |"]
    for row in STATUS:
        tested = ", ".join(f"`{path}`" for path in row.tested)
        lines.append(f"| {row.part} | {row.what} | {row.status} | {tested} |")
    return "\n".join(lines)
