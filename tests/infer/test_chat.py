import io
import itertools

import PIL.Image
import pytest

from lvlm_jax.infer.prompt import as_example
from lvlm_jax.infer.terminal import repl, thumbnail
from lvlm_jax.processing.schema import Image, Text, Turn
from tests.infer.tiny import few_shapes

SHORT = {"max_new_tokens": 8}


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    few_shapes(monkeypatch)


def test_a_chat_remembers_words_and_pictures(system, pictures):
    chat = system.chat()
    first = chat.ask("What is it?", pictures[0], **SHORT)
    second = chat.ask("And these?", [pictures[1], pictures[2]], **SHORT)
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * 2
    told = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "And these?"}]},
    ]
    assert system.generate(told, pictures[:3], **SHORT) == second
    chat.reset()
    assert chat.turns == ()


def test_a_stream_that_is_left_early_keeps_what_came(system, pictures):
    chat = system.chat(system="Be brief.")
    pieces = chat.ask("What is it?", pictures[0], stream=True, max_new_tokens=8)
    heard = "".join(itertools.islice(pieces, 2))
    pieces.close()
    assert chat.turns[-1] == Turn("assistant", (Text(heard.strip()),))
    assert chat.turns[0].role == "system"
    whole = "".join(chat.ask("And now?", stream=True, **SHORT))
    assert chat.turns[-1] == Turn("assistant", (Text(whole.strip()),))
    chat.reset()
    assert [turn.role for turn in chat.turns] == ["system"]


def test_a_question_that_fails_leaves_the_chat_as_it_was(system, pictures, tmp_path):
    chat = system.chat()
    chat.ask("What is it?", pictures[0], **SHORT)
    before = chat.turns
    for text, image in (("dogs " * 300, None), ("and", tmp_path / "no.png")):
        with pytest.raises(ValueError, match=r"context|no\.png"):
            chat.ask(text, image, **SHORT)
        with pytest.raises(ValueError, match=r"context|no\.png"):
            list(chat.ask(text, image, stream=True, **SHORT))
    assert chat.turns == before


def test_a_file_that_goes_away_stays_in_the_conversation(system, pictures, tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.fromarray(pictures[0]).save(path)
    chat = system.chat()
    chat.ask("What is it?", path, **SHORT)
    path.unlink()
    assert isinstance(chat.ask("Really?", **SHORT), str)
    picture = chat.turns[0].segments[0]
    assert isinstance(picture, Image)
    assert isinstance(picture.source, PIL.Image.Image)


def talk(system, lines, **settings):
    out, prompts, lines = io.StringIO(), [], iter(lines)

    def read(prompt):
        prompts.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    repl(system, read=read, out=out, **(SHORT | settings))
    return out.getvalue(), prompts


def test_the_loop_answers_and_shows_pictures(system, pictures, tmp_path):
    path = tmp_path / "my picture.png"
    PIL.Image.fromarray(pictures[0]).save(path)
    said, prompts = talk(system, [f"/image '{path}'", "What is it?", "", "And?", "/quit", "never"], thumbnails=True)
    answer = system.generate(as_example("What is it?", path), **SHORT)
    assert answer in said
    assert "24 x 20" in said
    assert ";48;2;" in said
    assert [p.startswith("you [1 picture(s)]") for p in prompts] == [False, True, False, False, False]


def test_the_loop_survives_bad_pictures_commands_and_full_contexts(system, tmp_path):
    page = tmp_path / "page.jpg"
    page.write_text("<html>")
    lines = [f"/image {page}", "/image", "/image 'open", "/imagine x", "/help", "hi", "dogs " * 300, "/reset", "hi"]
    said, prompts = talk(system, lines)
    for words in ("page.jpg", "give the path", "No closing quotation", "/imagine: no such command", "start over with"):
        assert words in said
    assert "A new conversation." in said
    assert len(prompts) == len(lines) + 1
    assert said.count(system.generate("hi", **SHORT)) >= 2


def test_interrupting_an_answer_keeps_the_chat_going(system):
    class Impatient(io.StringIO):
        left = 2

        def flush(self):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    out, lines = Impatient(), iter(["hi", "/quit"])
    repl(system, read=lambda prompt: next(lines), out=out, max_new_tokens=8)
    assert "[stopped]" in out.getvalue()


def test_a_thumbnail_has_the_pictures_shape_and_colours():
    lines = thumbnail(PIL.Image.new("RGB", (40, 20), (255, 0, 0)), columns=8).splitlines()
    assert len(lines) == 2
    assert lines[0].count("▀") == 8
    assert "38;2;255;0;0" in lines[0]
