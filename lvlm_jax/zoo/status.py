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
        part="system",
        what="LLaVA-1.5 (7B, 13B)",
        status="parity, import and export",
        tested=("tests/parity/test_llava.py", "tests/hub"),
    ),
    Status(
        part="system",
        what="LLaVA-NeXT (Vicuna 7B, 13B): pictures of any resolution",
        status="parity, import and export",
        tested=("tests/parity/test_llava_next.py", "tests/hub"),
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
)


def markdown() -> str:
    """The README's table."""
    lines = ["| part | what | status | tested in |", "| --- | --- | --- | --- |"]
    for row in STATUS:
        tested = ", ".join(f"`{path}`" for path in row.tested)
        lines.append(f"| {row.part} | {row.what} | {row.status} | {tested} |")
    return "\n".join(lines)
