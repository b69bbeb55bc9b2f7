"""A recipe like quickstart:tiny on a handful of pictures.

Run:      lvlm train --config tests/e2e/story.py:ALBUM --workdir DIR
"""

from pathlib import Path

from ml_collections import ConfigDict

from lvlm_jax.config import find, load

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30), "black": (0, 0, 0)}


def write_album(folder: Path) -> None:
    """Pictures of one colour, and three files of conversations about them in the words of easy-VQA."""
    import json

    import PIL.Image

    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list] = {"captions": [], "text": [], "questions": []}
    for name, colour in COLOURS.items():
        PIL.Image.new("RGB", (20, 20), colour).save(folder / f"{name}.png")
        for shape in ("circle", "triangle"):
            lines["captions"].append(_record(f"{name}.png", "<image>", f"a {name} {shape}"))
            lines["text"].append(_record(None, f"a {name} {shape} what color is the shape?", name))
            lines["questions"].append(_record(f"{name}.png", "<image>what color is the shape?", name))
    for kind, records in lines.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _record(image: str | None, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({"image": image} if image else {})


def get_config(arg: str = "") -> ConfigDict:
    """The four stages of the quickstart on the album in folder `arg`, small enough for a test."""
    c = load(f"{find('quickstart')}:tiny")
    c.unlock()
    c.name = "story"
    c.evaluation, c.export, c.report = None, False, False
    c.model.image.update(size=16, patch=8)
    c.model.vision.update(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=32)
    c.model.llm.update(width=16, depth=2, heads=2, kv_heads=2, mlp_dim=32, context=64)
    c.contrastive.text.update(width=16, depth=1, mlp_dim=32)
    c.contrastive.projection = 16
    files = {"vision": "captions", "language": "text", "align": "captions", "instruct": "questions"}
    for name, stage in c.stages.items():
        stage.update(steps=40, save_every=7, log_every=1, evaluate=())
        stage.data = {"source": "llava_json", "path": f"{arg}/{files[name]}.jsonl", "rows": 4, "groups": 2}
        stage.data.length = 8 if name == "vision" else 64
        stage.data.pack = name != "vision"
        stage.data.pictures = {"vision": 4, "language": 0}.get(name, 16)
    return c
