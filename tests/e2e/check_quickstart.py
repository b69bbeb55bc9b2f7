"""Checks a finished quickstart run: its accuracy, and its export against the torch library on all 1,000 test pictures.

Run:  python -m tests.e2e.check_quickstart runs/quickstart
Needs the ``[test]`` extra (torch). CI runs it on the run that it trained.
"""

import json
import sys
from pathlib import Path

import numpy as np

from lvlm_jax import api
from lvlm_jax.data.collate import collate
from lvlm_jax.data.easy_vqa import EasyVqa

TOLERANCE = 2e-5
"""Largest difference as a share of the largest reference logit; stated once, as in tests/parity."""
BATCH = 100


def accuracies(workdir: Path) -> dict[str, float]:
    """Exact match by moment: before align, after align, after instruct."""
    found = {}
    for file in sorted((workdir / "evaluation").glob("*/summary.json")):
        summary = json.loads(file.read_text())
        assert summary["samples"] == 9673, f"{file}: {summary['samples']} questions instead of all 9,673"
        found[file.parent.name] = summary["scores"]["exact_match"]
    return found


def first_questions() -> list:
    """One example for each of the 1,000 test pictures."""
    source, seen = EasyVqa("test"), {}
    for i in range(len(source)):
        example = source[i]
        seen.setdefault(example.images[0].source, example)
    assert len(seen) == 1000
    return list(seen.values())


def compare(folder: Path) -> tuple[float, float]:
    """(largest difference, largest reference) of the logits over every picture's prompt."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

    theirs, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind}: {info[kind]}"
    theirs.eval()
    ours = api.load(folder)
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    examples = sorted(first_questions(), key=lambda example: len(ours.encode(example).tokens))
    worst = largest = 0.0
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        encoded = [ours.encode(example) for example in part]
        length = max(len(e.tokens) for e in encoded)
        batch = collate(
            [[e] for e in encoded],
            length=length,
            groups=1,
            vision_rows=len(part),
            visual_tokens=ours.config.visual_tokens,
            pad_id=ours.tokenizer.pad_id,
            spec=ours.spec,
        )
        hidden, _ = ours.model.apply({"params": ours.params}, batch)
        got = np.asarray(ours.model.apply({"params": ours.params}, hidden, method="logits"))
        prompts = [
            ours.prompt_text(example).replace("<image>", "<image>" * ours.config.visual_tokens) for example in part
        ]
        words = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        pictures = processor([_picture(example) for example in part], return_tensors="pt")
        with torch.no_grad():
            want = theirs(**words, pixel_values=pictures["pixel_values"]).logits.numpy()
        real = words["attention_mask"].numpy().astype(bool)
        assert np.array_equal(words["input_ids"].numpy()[real], batch.tokens[batch.segments > 0]), "the ids differ"
        worst = max(worst, float(np.abs(got - want)[real].max()))
        largest = max(largest, float(np.abs(want)[real].max()))
    return worst, largest


def _picture(example):
    from PIL import Image

    return Image.open(example.images[0].source).convert("RGB")


def main(workdir: str) -> None:
    """Prints what was found; raises AssertionError where a target is missed."""
    found = accuracies(Path(workdir))
    print("exact match:", ", ".join(f"{name} {value:.2%}" for name, value in found.items()))
    assert found["after_instruct"] >= 0.99, found
    worst, largest = compare(Path(workdir) / "export")
    print(
        f"export against the torch library, 1,000 pictures: {worst:.2e} of {largest:.2f}, share {worst / largest:.1e}"
    )
    assert worst <= TOLERANCE * largest


if __name__ == "__main__":
    main(sys.argv[1])
