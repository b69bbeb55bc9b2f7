"""CogVLM's prompts: the ids that the hub's code makes of them, written down here once more from its description."""

import pytest

from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.golden.test_templates import ONE, PICTURE, Q, encoded, messages, say, trained_text
from tests.tokenizers_tiny import llama_tiny

PROMPTS = {
    "cogvlm_base": "What is the color?",
    "cogvlm_chat": "Question: What is the color? Answer:",
    "cogvlm_vqa": "Question: What is the color? Short answer:",
    "cogvlm_inst": " [INST] What is the color? [/INST] ",
}
SECOND = {
    "cogvlm_chat": "Question: What is the color? Answer: a red circle\nQuestion: Sure? Answer:",
    "cogvlm_vqa": "Question: What is the color? Short answer: a red circle\nQuestion: Sure? Short answer:",
    "cogvlm_inst": " [INST] What is the color? [/INST] a red circle [INST] Sure? [/INST] ",
}
ROUNDS = (*ONE, say("user", "Sure?"), say("assistant", "yes"))


@pytest.fixture(params=[True, False], ids=["legacy", "metaspace"])
def tokenizer(request):
    return Tokenizer(llama_tiny(legacy=request.param))


def ids(tokenizer, prompt, answer=None, picture=True):
    """Start, the picture's places, the prompt as a text of its own, the answer as another, end."""
    text = tokenizer.hf.encode(prompt, add_special_tokens=False)
    if answer is not None:
        text += [*tokenizer.hf.encode(answer, add_special_tokens=False), tokenizer.eos_id]
    return [tokenizer.bos_id, *[tokenizer.special_id("<image>")] * (Q * picture), *text]


@pytest.mark.parametrize("name", PROMPTS)
def test_one_round(tokenizer, name):
    got = encoded(ONE, TEMPLATES[name], tokenizer)
    assert got.tokens.tolist() == ids(tokenizer, PROMPTS[name], "a red circle")
    answer = tokenizer.hf.encode("a red circle", add_special_tokens=False)
    assert got.weights.tolist() == [0.0] * (len(got.tokens) - len(answer) - 1) + [1.0] * (len(answer) + 1)
    prompt = encoded(ONE, TEMPLATES[name], tokenizer, generate=True)
    assert prompt.tokens.tolist() == ids(tokenizer, PROMPTS[name])
    text = (say("user", "What is the color?"), ONE[1])
    got = encoded(text, TEMPLATES[name], tokenizer)
    assert got.tokens.tolist() == ids(tokenizer, PROMPTS[name], "a red circle", picture=False)


@pytest.mark.parametrize("name", SECOND)
def test_earlier_rounds_stand_in_the_prompt(tokenizer, name):
    prompt = encoded(ROUNDS, TEMPLATES[name], tokenizer, generate=True)
    assert prompt.tokens.tolist() == ids(tokenizer, SECOND[name])
    got = encoded(ROUNDS, TEMPLATES[name], tokenizer)
    assert got.tokens.tolist() == ids(tokenizer, SECOND[name], "yes")
    assert [text.strip() for text in trained_text(got, tokenizer)] == ["a red circle", "yes</s>"]


def test_golden_words():
    tokenizer = Tokenizer(llama_tiny(legacy=False))
    got = tokenizer.hf.convert_ids_to_tokens(encoded(ONE, TEMPLATES["cogvlm_chat"], tokenizer).tokens.tolist())
    assert got[: 1 + Q] == ["<s>", *["<image>"] * Q]
    assert "".join(got[1 + Q :]) == "▁Question:▁What▁is▁the▁color?▁Answer:▁a▁red▁circle</s>"
    tokenizer.hf.chat_template = TEMPLATES["cogvlm_chat"].jinja()
    said = tokenizer.hf.apply_chat_template(messages(ROUNDS[:3]), tokenize=False, add_generation_prompt=True)
    assert said == f"<image>{SECOND['cogvlm_chat']}"


@pytest.mark.parametrize("name", SECOND)
def test_jinja_writes_the_same_words(name):
    tokenizer = Tokenizer(llama_tiny())
    tokenizer.hf.chat_template = TEMPLATES[name].jinja()
    write = lambda turns: tokenizer.hf.apply_chat_template(messages(turns), tokenize=False)  # noqa: E731
    assert write(ONE[:1]) == f"<image>{PROMPTS[name]}"
    assert write(ROUNDS) == f"<image>{SECOND[name]}yes</s>"
    later = (*ONE, say("user", PICTURE, "Sure?"))
    assert write(later).endswith(f"a red circle<image>{PROMPTS[name].replace('What is the color?', 'Sure?')}")


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        ("cogvlm_base", ROUNDS, "takes one question and one answer, this conversation has 4 turns; use cogvlm_chat"),
        ("cogvlm_chat", (say("system", "Be brief."), *ONE), "no place for a system text"),
        ("cogvlm_vqa", (ONE[0], say("assistant", PICTURE)), r"turn 1 \(assistant\): a picture in the answer"),
    ],
)
def test_what_they_cannot_write(name, turns, message):
    with pytest.raises(DataError, match=message):
        encoded(turns, TEMPLATES[name], Tokenizer(llama_tiny()))
