"""MiniGPT-4's and VideoChat's templates: ids and weights against their own rule, restated: text cut at the pictures."""

import pytest

from lvlm_jax.processing.boxes import Box, read_boxes, write_boxes
from lvlm_jax.processing.chat_tagged import MINIGPT4_SYSTEM
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import DataError, encode
from lvlm_jax.processing.schema import Clip, Example, Image, Video
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.golden.test_templates import CONVERSATIONS, PICTURE, Q, messages, say
from tests.tokenizers_tiny import llama_tiny

ONE = (say("user", PICTURE, "What is this?"), say("assistant", "a red circle"))
TWO = (*ONE, say("user", "Sure?"), say("assistant", "yes"))
NAMES = (
    *("minigpt4", "minigpt4_align", "minigpt4_llama2", "minigpt4_llama2_align"),
    *("minigpt_v2", "videochat_align", "videochat"),
)
IMAGE_ID = 480


def made(name, turns, generate=False):
    tokenizer = Tokenizer(llama_tiny(legacy=True))
    example = Example(tuple(turns), origin="a.json:1")
    return tokenizer.hf, encode(example, TEMPLATES[name], tokenizer, Q, IMAGE_ID, generate)


def cut(hf, text):
    """Their ids: BOS, each part of a text that is cut at its pictures by itself, Q positions for a picture."""
    out = [hf.bos_token_id]
    for number, part in enumerate(text.split("<ImageHere>")):
        out += [IMAGE_ID] * (Q if number else 0) + hf(part, add_special_tokens=False)["input_ids"]
    return out


PROMPTS = {
    # conversation.py, CONV_VISION_Vicuna0; train_configs/minigpt4_stage2_finetune.yaml with prompts/alignment.txt
    "minigpt4": f"{MINIGPT4_SYSTEM}###Human: <Img><ImageHere></Img> What is this?###Assistant: ",
    "minigpt4_align": "###Human: <Img><ImageHere></Img> What is this? ###Assistant: ",
    "minigpt4_llama2": f"{MINIGPT4_SYSTEM}<s>[INST] <Img><ImageHere></Img> What is this? [/INST] ",
    "minigpt4_llama2_align": "[INST] <Img><ImageHere></Img> What is this? [/INST] ",
    "minigpt_v2": "[INST] <Img><ImageHere></Img> What is this? [/INST]",
    # config_7b_stage1.py, prompt_template with prompts/concise_image_description.txt
    "videochat_align": "###Human: <Image><ImageHere></Image> What is this? ###Assistant: ",
    # conversation.py, `get_prompt` and `upload_img`
    "videochat": "###Human: <Image><ImageHere></Image>\n###Human: What is this?\n###Assistant:",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt(name):
    hf, got = made(name, ONE, generate=True)
    assert got.tokens.tolist() == cut(hf, PROMPTS[name])
    assert (got.visual >= 0).tolist() == (got.tokens == IMAGE_ID).tolist()
    assert not got.weights.any()


ANSWERS = {
    "minigpt4_align": ("a red circle###",),
    "videochat_align": ("a red circle###",),
    "minigpt4_llama2_align": ("a red circle</s>",),
    "minigpt_v2": ("a red circle</s>", "<s>[INST] Sure? [/INST]", "yes</s>"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_learnt(name):
    """minigpt_base.py, `preparing_embedding` and `tokenize_conversation`: each answer by itself, with its end."""
    hf, got = made(name, TWO if name == "minigpt_v2" else ONE)
    ids, weights = cut(hf, PROMPTS[name]), [0.0] * len(cut(hf, PROMPTS[name]))
    for number, part in enumerate(ANSWERS[name]):
        more = hf(part, add_special_tokens=False)["input_ids"]
        ids, weights = ids + more, weights + [1.0 - number % 2] * len(more)
    assert (got.tokens.tolist(), got.weights.tolist()) == (ids, weights)


def test_an_earlier_answer_in_a_prompt_is_part_of_the_text():
    hf, got = made("minigpt4", (*TWO[:3],), generate=True)
    assert got.tokens.tolist() == cut(hf, PROMPTS["minigpt4"] + "a red circle###Human: Sure?###Assistant: ")


def test_videochat_as_it_trains():
    """it_dataset.py, `process_qa`, and what videochat_it.py masks: the video's turn and the questions."""
    clip = Image(Clip(Video("a.mp4"), (0, 4), (0.0, 1.5), 4.0, 3.0))
    sentence = "The video contains 2 frames sampled at 0.0, 1.5 seconds."
    turns = (say("user", clip, sentence + "\n", "What is this?"), *TWO[1:])
    tokenizer = Tokenizer(llama_tiny(legacy=True))
    got = encode(Example(turns), TEMPLATES["videochat_instruct"], tokenizer, Q, IMAGE_ID)
    text = tokenizer.hf.convert_ids_to_tokens(got.tokens[got.visual < 0].tolist())
    said = "".join(text).replace("▁", " ").replace("<0x0A>", "\n")
    assert said == (
        f"<s> ###Human: <Video> </Video> {sentence} ###Human: What is this? ###Assistant: a red circle "
        "###Human: Sure? ###Assistant: yes ###"
    )
    learnt = "".join(tokenizer.hf.convert_ids_to_tokens(got.tokens[got.weights > 0].tolist())).replace("▁", " ")
    assert learnt.replace(" ", "") == "###Human:###Assistant:aredcircle###Human:###Assistant:yes###"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turns", ["one", "rounds", "text", "empty question"])
def test_the_jinja_says_the_same_text(name, turns):
    """As one string: where the text is cut before it is tokenized is beyond a chat template."""
    hf, got = made(name, CONVERSATIONS[turns][:-1], generate=True)
    hf.chat_template = TEMPLATES[name].jinja()
    text = hf.apply_chat_template(messages(CONVERSATIONS[turns][:-1]), tokenize=False, add_generation_prompt=True)
    theirs = [i for n, part in enumerate(text.split("<image>")) for i in [IMAGE_ID] * (Q if n else 0) + whole(hf, part)]
    assert got.tokens.tolist() == [hf.bos_token_id, *theirs]


def whole(hf, text):
    return hf(text, add_special_tokens=False)["input_ids"] if text else []


def test_task_tags_and_boxes_are_words():
    """MiniGPT-v2: a tag before the question, a box of hundredths as the answer (coco_dataset.py)."""
    box = Box(y0=0.1, x0=0.2, y1=0.5, x1=0.6)
    answer = write_boxes([box], "minigptv2")
    assert answer == "{<20><10><60><50>}"
    turns = (say("user", PICTURE, "[refer] give me the location of a cat"), say("assistant", answer))
    hf, got = made("minigpt_v2", turns)
    learnt = hf.decode(got.tokens[got.weights > 0].tolist(), skip_special_tokens=True)
    assert read_boxes(learnt, "minigptv2").boxes == [box]
    asked = hf.decode(got.tokens[(got.weights == 0) & (got.visual < 0)].tolist())
    assert "</Img> [refer] give me the location of a cat [/INST]" in asked


def test_a_picture_in_an_answer():
    with pytest.raises(DataError, match="a picture in an answer, which this template cannot write"):
        made("minigpt_v2", (ONE[0], say("assistant", PICTURE)))


def test_what_ends_an_answer():
    assert {name: TEMPLATES[name].stop for name in NAMES} == {
        **dict.fromkeys(("minigpt4", "minigpt4_align", "videochat_align", "videochat"), ("###",)),
        **dict.fromkeys(("minigpt4_llama2", "minigpt4_llama2_align", "minigpt_v2"), ("</s>",)),
    }
