import dataclasses
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.infer.prompt import as_example, as_images
from lvlm_jax.processing.image import ImageError
from lvlm_jax.processing.schema import Example, Image, Text, Turn
from tests.infer.tiny import few_shapes

PIXELS = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    few_shapes(monkeypatch)


def test_every_form_of_a_prompt_becomes_the_same_conversation():
    picture = Image(PIXELS)
    wanted = (Turn("user", (picture, Text("what is it"))),)
    part = {"type": "text", "text": "what is it"}
    for prompt, images in [
        ("what is it", PIXELS),
        ("what is it", [picture]),
        ([PIXELS, "what is it"], None),
        ([{"role": "user", "content": "what is it"}], PIXELS),
        ([{"role": "user", "content": [{"type": "image"}, part]}], [PIXELS]),
        ([{"role": "user", "content": [{"type": "image", "image": PIXELS}, part]}], None),
        (list(wanted), None),
        (Example(wanted), None),
    ]:
        turns = as_example(prompt, images).turns
        assert [(t.role, [getattr(s, "text", None) for s in t.segments]) for t in turns] == [
            ("user", [None, "what is it"])
        ]
        assert turns[0].segments[0].source is PIXELS


def test_pictures_come_from_anywhere_in_any_number():
    pil = PIL.Image.fromarray(PIXELS)
    assert as_images(None) == ()
    assert as_images("a.png") == as_images(Path("a.png")) == (Image("a.png"),)
    assert as_images(["a.png", Path("b.png")]) == (Image("a.png"), Image("b.png"))
    assert [image.source for image in as_images(pil)] == [pil]
    assert len(as_images(PIXELS)) == len(as_images(b"bytes")) == 1
    assert len(as_images(np.stack([PIXELS, PIXELS]))) == 2


def test_a_system_text_replaces_the_conversations_own():
    turns = as_example([{"role": "system", "content": "old"}, {"role": "user", "content": "a"}], system="new").turns
    assert [t.segments[0].text for t in turns] == ["new", "a"]


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        (3, None, "int is no prompt"),
        ([], None, "is no prompt"),
        ([3.5], None, "float among the segments"),
        ([{"role": "tool", "content": "a"}], None, r"messages\[0\].role: 'tool' is not one of"),
        ([{"role": "user"}], None, r"messages\[0\].content: NoneType"),
        ([{"role": "user", "content": [{"type": "audio"}]}], None, "is no part"),
        ([{"role": "user", "content": [{"type": "video"}]}], None, r"1 place\(s\) for a video, but videos has 0"),
        ([{"role": "user", "content": [{"type": "image"}]}], None, r"1 place\(s\) for a picture, but images has 0"),
        ([{"role": "user", "content": [{"type": "image"}]}], ["a", "b"], "but images has 2"),
        ([{"role": "assistant", "content": "a"}], "a.png", "no user turn"),
    ],
)
def test_a_prompt_of_another_form_is_an_error_that_says_so(prompt, images, message):
    with pytest.raises(ValueError, match=message):
        as_example(prompt, images)


def test_what_is_typed_stays_text(system):
    typed = "<image> </s> <s> what"
    prompt = system.encode(as_example(typed))
    assert not prompt.images
    assert not np.isin(prompt.tokens[1:], [system.image_token_id, 1, 2]).any()
    assert typed in system.tokenizer.decode(prompt.tokens)
    system.generate(typed, max_new_tokens=8)


def test_generate_streams_what_it_returns(system, pictures):
    settings = {"max_new_tokens": 8}
    whole = system.generate("What is it?", pictures[:2], **settings)
    assert isinstance(whole, str)
    pieces = list(system.generate("What is it?", pictures[:2], stream=True, **settings))
    assert "".join(pieces).strip() == whole
    assert len(pieces) > 1
    assert system.generate("What is it?", pictures[1::-1], **settings) != whole


def test_a_batch_is_its_prompts_one_by_one(system, pictures):
    prompts = ["dogs", [pictures[0], "What is it?"], as_example("And here?", pictures[1:3])]
    batch = system.generate_batch(prompts, max_new_tokens=8)
    assert batch == [system.generate(p, max_new_tokens=8) for p in prompts]
    assert system.generate_batch([], max_new_tokens=8) == []


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("images", r" Put each picture into its prompt: \[\[Path\('a.png'\), 'What is this\?'\], ...\]$"),
        ("temperature", r" Give sampling=Sampling\(temperature=...\)$"),
        ("beams", r" Give sampling=Beams\(count=...\)$"),
        ("length_penalty", r" Give sampling=Beams\(length_penalty=...\)$"),
        ("foo", ""),
    ],
)
def test_a_batch_says_what_it_takes(system, name, fix):
    known = r"^generate_batch\(\) takes no %s=; beside the prompts it takes max_new_tokens=, sampling=, stop=, rows="
    with pytest.raises(TypeError, match=known % name + (r"\." + fix if fix else "$")):
        system.generate_batch(["a"], **{name: [1]})


def test_new_tokens_default_to_what_the_context_leaves(system, fresh):
    generator = fresh.generator
    generator.eos_ids = frozenset()
    answer = fresh.answer_batch(["dogs"])[0]
    assert answer.prompt_tokens + len(answer.tokens) == system.config.llm.context
    with pytest.raises(ValueError, match="context is 192"):
        system.generate("dogs " * 300)


def test_the_templates_ends_end_an_answer(system):
    plain = dataclasses.replace(system, template=dataclasses.replace(system.template, stop=("</s>", "\n", "###")))
    assert plain.stop_strings == ("\n", "###")
    assert plain.generator.eos_ids == {2}
    extra = dataclasses.replace(system, stop_ids=(7,))
    assert extra.generator.eos_ids == {2, 7}


def test_pictures_are_embedded_as_the_model_sees_them(system, pictures):
    seen = system.embed_images(pictures)
    assert seen.shape == (6, system.config.visual_tokens, system.config.llm.width)
    assert np.allclose(system.embed_images(pictures[4])[0], seen[4], atol=1e-5)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    with pytest.raises(ValueError, match="images: none"):
        system.embed_images([])


def test_a_bad_picture_is_named(system, tmp_path):
    bad = tmp_path / "page.jpg"
    bad.write_text("<html>not found</html>")
    for picture in (bad, str(bad), tmp_path / "absent.png"):
        with pytest.raises(ImageError, match=r"page\.jpg|absent\.png"):
            system.generate("what", picture, max_new_tokens=8)


def test_a_picture_size_that_is_not_the_towers_is_an_error(system):
    with pytest.raises(ValueError, match="vision tower reads 4 of 192"):
        dataclasses.replace(system, spec=dataclasses.replace(system.spec, size=32))


def test_prompt_text_shows_what_was_asked(system):
    text = system.prompt_text(as_example("what is it", PIXELS))
    assert text == "<s>USER: <image>\nwhat is it ASSISTANT:"
