"""The bad-input table of the project, one line a test, each through the door that a user comes in by.

Every refusal is one message that names the file, the field or line, and the fix, and leaves nothing half-written.
"""

import io
import json
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file, save_file

from lvlm_jax import cli
from lvlm_jax.hub.export import export_folder
from lvlm_jax.processing.image import load_image
from tests.infer.tiny import tiny_system
from tests.tokenizers_tiny import llama_tiny


def lvlm(capsys, *words):
    """(exit status, what it said) of one command line."""
    status = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return status, said.out + said.err


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and conversations: `lvlm data check`


def picture(folder: Path) -> np.ndarray:
    """A picture with a different colour in each corner, good.png in the folder."""
    pixels = np.zeros((24, 16, 3), np.uint8)
    pixels[:12, :8], pixels[:12, 8:], pixels[12:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    PIL.Image.fromarray(pixels).save(folder / "good.png")
    return pixels


def truncated(folder: Path) -> str:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-900])
    return "cut.jpg"


def page(folder: Path) -> str:
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")
    return "page.jpg"


def bomb(folder: Path) -> str:
    PIL.Image.new("1", (12_000, 12_000)).save(folder / "bomb.png")
    assert (folder / "bomb.png").stat().st_size < 100_000
    return "bomb.png"


def llava(image, question="<image>\nwhat is it?", answer="a circle"):
    """A record in LLaVA's format."""
    turns = [{"from": "human", "value": question}] + ([{"from": "gpt", "value": answer}] if answer else [])
    return {"conversations": turns} | ({"image": image} if image else {})


# line of the table: (record, what `lvlm data check` says of it)
REFUSED = {
    "missing picture": (
        lambda folder: llava("gone.png"),
        "{folder}/gone.png: the file does not exist; check the path in the record and the image folder, {folder} (set "
        "by --images DIR, in a recipe by data.images, where the source has that field)",
    ),
    "truncated picture": (
        lambda folder: llava(truncated(folder)),
        "{folder}/cut.jpg: the picture is truncated or damaged (",
    ),
    "HTML named .jpg": (
        lambda folder: llava(page(folder)),
        "{folder}/page.jpg: is an HTML or XML page, not a picture; the download failed, fetch it again",
    ),
    "decompression bomb": (
        lambda folder: llava(bomb(folder)),
        "{folder}/bomb.png: the picture claims 12000 x 12000 = 144.0 megapixels, more than the limit of 40.0 (a "
        "decompression bomb looks like this); shrink it or raise max_pixels",
    ),
    "no assistant turn": (
        lambda folder: llava("good.png", answer=None),
        "turns: there is no assistant turn, so nothing to learn from; add one or drop the record",
    ),
    "more pictures than placeholders": (
        lambda folder: llava(["good.png", "good.png"]),
        "1 x <image> in 'conversations' but 2 picture(s) in 'image'; add <image> in 'conversations' where each picture "
        "stands, or remove the surplus",
    ),
    "more placeholders than pictures": (
        lambda folder: llava("good.png", question="<image><image>what?"),
        "2 x <image> in 'conversations' but 1 picture(s) in 'image'; name the missing pictures in 'image', or remove",
    ),
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_record_is_refused(line, tmp_path, capsys):
    make, message = REFUSED[line]
    picture(tmp_path)
    file = tmp_path / "train.jsonl"
    file.write_text(f"{json.dumps(llava('good.png'))}\n{json.dumps(make(tmp_path))}\n")
    before = sorted(tmp_path.iterdir())
    status, said = lvlm(capsys, "data", "check", "--llava", file)
    assert status == 1
    assert f"\n  {file}:2: {message.format(folder=tmp_path)}" in said
    assert "2 records: 1 good, 1 bad" in said
    assert sorted(tmp_path.iterdir()) == before


def test_ids_out_of_range(tmp_path, capsys):
    llama_tiny().save_pretrained(tmp_path / "words")
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(llava(None, question="hi")))
    status, said = lvlm(capsys, "data", "check", "--llava", file, "--tokenizer", tmp_path / "words")
    assert status == 1
    assert f"{file}:1: token id " in said
    assert "rows; this tokenizer does not belong to this model, or tokens were added without growing the" in said


def test_context_overflow_that_would_cut_a_picture_in_half(tmp_path, capsys):
    picture(tmp_path)
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(llava("good.png")))
    status, said = lvlm(capsys, "data", "check", "--llava", file, "--length", 8)
    assert status == 1
    assert f"{file}:1: " in said
    assert (
        "tokens do not fit max_length 8: the context overflow would cut a picture in half (image 0 of 1 fills " in said
    )
    assert "raise max_length above" in said


@pytest.mark.parametrize(
    ("image", "marks", "count"), [("good.png", 1, 1), (["good.png"], 1, 1), (["good.png"] * 3, 3, 3)]
)
def test_image_as_a_string_or_a_list(image, marks, count, tmp_path, capsys):
    picture(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps([llava(image, question="<image>" * marks + "what is it?")]))
    status, said = lvlm(capsys, "data", "check", "--llava", tmp_path / "train.json")
    assert status == 0
    assert f"1 records: 1 good, 0 bad; {count} pictures (decoded)" in said


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that only look strange: the same patches as the plain picture


def turned(folder: Path, pixels: np.ndarray) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    PIL.Image.fromarray(np.rot90(pixels)).save(folder / "odd.png", exif=exif)


def deep(folder: Path, pixels: np.ndarray) -> None:
    PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "odd.png")
    PIL.Image.fromarray(pixels[..., 0]).save(folder / "good.png")


def inks(folder: Path, pixels: np.ndarray) -> None:
    PIL.Image.fromarray(pixels).convert("CMYK").save(folder / "odd.png", "JPEG", quality=100, subsampling=0)


def moving(folder: Path, pixels: np.ndarray) -> None:
    frames = [PIL.Image.fromarray(255 - pixels)] * 2
    PIL.Image.fromarray(pixels).save(folder / "odd.png", "GIF", save_all=True, append_images=frames)


ODD = {"EXIF rotation": (turned, 0), "16-bit": (deep, 0), "CMYK": (inks, 4), "animated": (moving, 0)}


@pytest.mark.parametrize("line", ODD)
def test_a_strange_picture_is_read_as_it_is_meant(line, tmp_path):
    make, apart = ODD[line]
    make(tmp_path, picture(tmp_path))
    odd, good = (np.asarray(load_image(tmp_path / name)).astype(int) for name in ("odd.png", "good.png"))
    assert odd.shape == good.shape
    assert np.abs(odd - good).max() <= apart  # a JPEG is never exact
    assert len(np.unique(good)) > 1


def test_placeholder_text_typed_by_a_user_stays_text():
    system, typed = tiny_system(), "what does <image> mean, and </s> or <s>?"
    for prompt in (typed, [{"role": "user", "content": typed}], [typed]):
        encoded = system.encode(_example(prompt))
        assert system.image_token_id not in encoded.tokens
        assert (encoded.visual < 0).all()
        assert encoded.tokens.tolist().count(system.tokenizer.eos_id) == 0
        assert system.tokenizer.decode(encoded.tokens[1:].tolist()).strip() == f"USER: {typed} ASSISTANT:"


def _example(prompt):
    from lvlm_jax.infer.prompt import as_example

    return as_example(prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: `lvlm train`

WORDS = {
    "config typo, in a field": (
        ["--config", "quickstart", "--config.stages.align.stpes=3"],
        "lvlm train: --config.stages.align.stpes=3: no such field 'stpes'; Did you mean \"steps\" instead of",
    ),
    "config typo, in a stage": (
        ["--config", "quickstart", "--config.stages.algin.steps=3"],
        "no such field 'algin'; Did you mean \"align\"",
    ),
    "config typo, in a value": (
        ["--config", "quickstart", "--config.mesh=FSPD"],
        "mesh='FSPD': choose one of ['DP', 'FSDP', 'FSDP_TP', 'FSDP_TP_SP']",
    ),
    "config typo, in the recipe's name": (
        ["--config", "quickstrat"],
        "--config=quickstrat: no such recipe (did you mean 'quickstart'?)",
    ),
    "override of another type": (
        ["--config", "quickstart:tiny", "--config.stages.align.steps=abc"],
        "lvlm train: --config.stages.align.steps=abc: expected int, as in --config.stages.align.steps=4\n",
    ),
    "override of a bool": (
        ["--config", "quickstart", "--config.export=maybe"],
        "lvlm train: --config.export=maybe: expected bool, as in --config.export=True\n",
    ),
    "override of no field": (
        ["--config", "quickstart", "--config.steps=3"],
        "--config.steps=3: no such field 'steps'",
    ),
    "a value out of range": (
        ["--config", "quickstart", "--config.stages.align.steps=0"],
        "lvlm train: config.stages.align.steps=0: must be at least 1",
    ),
    "a stage whose beginning does not run": (
        ["--config", "quickstart", "--config.run=instruct"],
        "stages.instruct.start.all.stage='align' does not run before; in config.run=('instruct',) name 'align' before "
        "it, or start from what another run left: --config.stages.instruct.start.all.stage= "
        "--config.stages.instruct.start.all.workdir=WORKDIR/align",
    ),
    "override without dashes": (
        ["--config", "quickstart", "config.seed=1"],
        "config.seed=1: overrides begin with two dashes and 'config.': did you mean --config.seed=1?",
    ),
    "override without config": (
        ["--config", "quickstart", "--stages.align.steps=1"],
        "did you mean --config.stages.align.steps=1?",
    ),
    "override without a value": (
        ["--config", "quickstart", "--config.seed"],
        "--config.seed: write the value behind an equals sign, --config.seed=VALUE",
    ),
}


@pytest.mark.parametrize("line", WORDS)
def test_a_command_line_is_refused(line, tmp_path, capsys):
    words, message = WORDS[line]
    status, said = lvlm(capsys, "train", *words, "--workdir", tmp_path / "run")
    assert status == 2
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("platforms", "error", "fix"),
    [
        (
            "cuda",
            AssertionError(),
            "(it finds none); it needs such a device and its extra (pip install 'lvlm-jax[cuda12]'",
        ),
        (
            "tpu,cpu",
            RuntimeError("no 'tpu'. (set JAX_PLATFORMS='')"),
            "(no 'tpu'); it needs such a device and its extra",
        ),
        ("gpus", RuntimeError("no 'gpus'"), "(no 'gpus'); the backends are cpu, cuda and tpu. Unset JAX_PLATFORMS"),
    ],
)
def test_a_backend_that_cannot_start(platforms, error, fix, checkpoint, monkeypatch, capsys):
    def start(*_):
        raise error

    before = jax.config.jax_platforms
    monkeypatch.setattr(jax, "devices", start)
    try:
        jax.config.update("jax_platforms", platforms)
        for words in (
            ["generate", checkpoint, "--prompt", "hi"],
            ["train", "--config", "quickstart:tiny", "--dry-run"],
        ):
            status, said = lvlm(capsys, *words)
            assert status == 2
            assert f"lvlm {words[0]}: JAX_PLATFORMS={platforms}: JAX cannot start this backend here {fix}" in said
            assert said.count("\n") == 1
    finally:
        jax.config.update("jax_platforms", before)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that are not where a user said: `lvlm data packing`, `lvlm eval`, `lvlm generate`


def test_pictures_that_lie_elsewhere(checkpoint, tmp_path, monkeypatch, capsys):
    """The folder that was searched, and how to name another one."""
    monkeypatch.chdir(tmp_path)
    Path("train.json").write_text(json.dumps([llava("good.png")]))
    message = (
        f"good.png: the file does not exist; check the path in the record and the image folder, {tmp_path} (set by "
    )
    for words in (["data", "packing", "--config", "quickstart:tiny"], ["eval", checkpoint]):
        status, said = lvlm(capsys, *words, "--llava", "train.json")
        assert status == 2
        assert f"{message}--images DIR, in a recipe by data.images" in said
    (tmp_path / "pictures").mkdir()
    picture(tmp_path / "pictures")
    words = ["data", "packing", "--llava", "train.json", "--images", "pictures", "--length", 64]
    assert lvlm(capsys, *words)[0] == 0


def test_a_split_that_there_is_not(tmp_path, capsys):
    """Found before the model is read."""
    status, said = lvlm(capsys, "eval", tmp_path / "gone", "--easy-vqa", "tset")
    message = "--easy-vqa tset (did you mean 'test'?): choose one of train, validation, test"
    assert (status, said) == (2, f"lvlm eval: {message}\n")


def test_words_of_a_beam_search_that_do_not_go_together(checkpoint, tmp_path, capsys):
    """Of `lvlm eval` found before the model is read."""
    status, said = lvlm(capsys, "eval", tmp_path / "gone", "--easy-vqa", "test", "--length-penalty", 0.5)
    assert status == 2
    assert said.startswith("lvlm eval: length_penalty=0.5 weighs the hypotheses of a beam search against each other, ")
    status, said = lvlm(capsys, "generate", checkpoint, "--prompt", "hi", "--beams", 3, "--temperature", 0.7)
    message = "beams=3 and temperature=0.7: a beam search draws nothing; leave one of them out"
    assert (status, said) == (2, f"lvlm generate: {message}\n")


def test_a_picture_that_no_record_names(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    missing = "the file does not exist; check the path"
    status, said = lvlm(capsys, "generate", checkpoint, "--prompt", "hi", "--image", "nope.png")
    assert status == 2
    assert said == f"lvlm generate: --image nope.png: {missing}, which starts in {tmp_path}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("/image /no/nope.png\n"))
    _, said = lvlm(capsys, "chat", checkpoint)
    assert f"/no/nope.png: {missing}\n" in said


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: `lvlm convert import`

WEIGHTS = "model.safetensors"
PROJECTOR = "multi_modal_projector.linear_1.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole small model as the torch library would find it."""
    system = tiny_system()
    folder = tmp_path_factory.mktemp("model") / "whole"
    return export_folder(folder, system.config, system.params, system.tokenizer, system.spec, system.template)


def tensors(change):
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return damage


def halved(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


DAMAGE = {
    "missing key": (
        tensors(lambda t: t.pop(PROJECTOR)),
        ["{folder}: this checkpoint does not fit the model", f"missing (1): {PROJECTOR}", "Is it another size"],
    ),
    "extra key": (
        tensors(lambda t: t.update({"language_model.model.gate.weight": np.zeros(3, np.float32)})),
        ["missing (0): none", "not used (1): language_model.model.gate.weight", "Is it another size"],
    ),
    "misshapen key": (
        tensors(lambda t: t.update({PROJECTOR: t[PROJECTOR][:, :-1].copy()})),
        [f"{{folder}}/{WEIGHTS}: tensor '{PROJECTOR}' has shape [32, 15], but config.json asks for [32, 16]"],
    ),
    "truncated safetensors": (
        halved,
        [f"{{folder}}/{WEIGHTS}: not a whole safetensors file (", "cut short or damaged: fetch or copy it again"],
    ),
    "pickle files": (
        pickled,
        ["{folder}: pytorch_model.bin is (or lists) a pickle, which runs code when it is read, so it is refused."],
    ),
}


@pytest.mark.parametrize("line", DAMAGE)
def test_a_checkpoint_is_refused(line, checkpoint, tmp_path, capsys):
    damage, messages = DAMAGE[line]
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    status, said = lvlm(capsys, "convert", "import", folder, tmp_path / "out")
    assert status == 2
    assert [m for m in messages if m.format(folder=folder) not in said] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_export_that_fails_leaves_what_was_there(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    status, said = lvlm(capsys, "convert", "export", checkpoint, tmp_path / "out")
    assert status == 2
    assert f"{tmp_path / 'out'}: there is something already; give a new folder, or ask to overwrite" in said
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
