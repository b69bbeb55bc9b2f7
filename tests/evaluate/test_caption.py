"""Caption scores against values of the COCO caption evaluation, written down once from pycocoevalcap 1.2 and Java."""

import pytest

from lvlm_jax.evaluate import caption

REFERENCES = [
    ["a red apple on the left of a lion.", "an apple next to a lion"],
    ["a yellow bus on a road"],
    ["two dogs play with a ball", "a pair of dogs and a ball"],
]
PREDICTIONS = ["a red apple next to a lion", "a yellow car on a road", "two dogs play with a ball"]

# Repeated words (clipping), a short candidate (brevity, closest length), no match at all, a long repetition.
HARD_REFERENCES = [
    ["the cat sat on the mat", "there is a cat on the mat"],
    ["he reads the book because he is interested in world history", "a man reads"],
    ["green trees"],
    ["a small dog runs over the wet grass near a house"],
]
HARD_PREDICTIONS = [
    "the the the the the the the",
    "he reads the book",
    "blue sea under sky",
    "a dog runs over the grass a dog runs over the grass",
]


def close(values):
    return pytest.approx(values, rel=1e-12, abs=1e-15)


def test_cider_d_golden():
    total, each = caption.cider_d(PREDICTIONS, REFERENCES, tokenize=str.split)
    assert total == close(4.674025263159438)
    assert each == close([4.426992819185688, 3.827860225972295, 5.76722274432033])
    total, each = caption.cider_d(HARD_PREDICTIONS, HARD_REFERENCES, tokenize=str.split)
    assert total == close(0.9772170185514363)
    assert each == close([0.0893626898692998, 1.7997133388163018, 0.0, 2.0197920455201435])


def test_cider_d_of_one_picture_is_zero():
    assert caption.cider_d(["a cat"], [["a cat"]]) == (0.0, [0.0])


def test_bleu_golden():
    total, each = caption.bleu(PREDICTIONS, REFERENCES, tokenize=str.split)
    assert total == close([0.9473684210027701, 0.9104654679479144, 0.8310146972424751, 0.7318954202649333])
    assert [sample[3] for sample in each] == close([0.7952707286160441, 8.034284186199331e-05, 0.9999999995958335])
    total, each = caption.bleu(HARD_PREDICTIONS, HARD_REFERENCES, tokenize=str.split)
    assert total == close([0.4814814814636489, 0.35440635536652915, 0.29792238150818606, 0.24367559341044534])
    assert each[1] == close([0.9999999997500002, 0.9999999997083335, 0.9999999996388892, 0.9999999994791672])
    assert each[3] == close([0.5833333332847223, 0.39886201757398354, 0.3168777796754753, 0.24384183191076964])


def test_bleu_brevity_uses_the_closest_length_and_the_shorter_at_a_tie():
    # Length 4, references of 3 and 5: the shorter is taken, so no brevity penalty.
    (score, *_), _ = caption.bleu(["a b c d"], [["a b c d e", "a b c"]], tokenize=str.split)
    assert score == pytest.approx(1.0, abs=1e-8)


def test_rouge_l_golden():
    total, each = caption.rouge_l(PREDICTIONS, REFERENCES, tokenize=str.split)
    assert total == close(0.8711281614094913)
    assert each == close([0.7800511508951408, 0.8333333333333334, 1.0])
    total, each = caption.rouge_l(HARD_PREDICTIONS, HARD_REFERENCES, tokenize=str.split)
    assert total == close(0.3543654228388652)
    assert each == close([0.31202046035805625, 0.49193548387096775, 0.0, 0.6135057471264368])


@pytest.mark.parametrize("score", [caption.cider_d, caption.bleu, caption.rouge_l])
def test_an_empty_prediction_scores_zero(score):
    _, each = score(["", "a cat"], [["a dog"], ["a cat"]])
    assert each[0] == close([0.0] * 4 if isinstance(each[0], list) else 0.0)


@pytest.mark.parametrize("score", [caption.cider_d, caption.bleu, caption.rouge_l])
def test_misshapen_input_is_named(score):
    with pytest.raises(ValueError, match="2 predictions for 1 reference lists"):
        score(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="0 predictions"):
        score([], [])
    with pytest.raises(ValueError, match=r"references\[1\] is 'a cat'"):
        score(["a", "b"], [["a"], "a cat"])
    with pytest.raises(ValueError, match=r"references\[0\] is \[\]"):
        score(["a"], [[]])


def test_scores_are_tokenised_unless_told_otherwise():
    predictions, references = ["A Dog's bone!", "two cats"], [["a dog 's bone"], ["a cat"]]
    assert caption.rouge_l(predictions, references)[1][0] == 1.0
    assert caption.rouge_l(predictions, references, tokenize=str.split)[1][0] == 0.0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man isn't riding a horse.", "a man is n't riding a horse"),
        ("It's a dog's bone; the dogs' house!", "it 's a dog 's bone the dogs house"),
        ("I can't, won't, cannot and don't.", "i ca n't wo n't can not and do n't"),
        ("We're gonna gotta go, I'm sure they've left", "we 're gon na got ta go i 'm sure they 've left"),
        ("A t-shirt, black/white (large)", "a t-shirt black/white -lrb- large -rrb-"),
        ("$5.00 for 50% of 3,000 at 10:30 p.m. today", "$ 5.00 for 50 % of 3,000 at 10:30 p.m. today"),
        ("The U.S. flag and Mr. Smith.", "the u.s. flag and mr. smith"),
        ("\"Hello\" said the man, 'quoted' text", "hello said the man quoted text"),
        ("Wait... what?! -- no", "wait what ?! no"),
        ("[something] {else} <tag> & more", "-lsb- something -rsb- -lcb- else -rcb- <tag> & more"),
        ("a red-and-white bus, No. 7 #1", "a red-and-white bus no. 7 # 1"),
        ("3.5 meters and .5 inches, 1/2 cup", "3.5 meters and .5 inches 1/2 cup"),
        ("café “quoted” it\u2019s word—dash …", "café quoted it 's word dash"),
        ("semi;colon comma,separated words", "semi colon comma separated words"),
        ("multi   space\ttab", "multi space tab"),
        ("-5 degrees +3 =4 ~7 back`tick", "-5 degrees +3 = 4 ~ 7 back tick"),
        ("100. 12. cats from the 1990's", "100 12 cats from the 1990 's"),
        ("I'd've shouldn't've 'tis y'all", "i 'd 've should n't 've 't is y' all"),
        ("two men -one tall- x-ray--machine", "two men one tall x-ray machine"),
        ("", ""),
    ],
)
def test_tokens_are_those_of_the_java_tokenizer(text, tokens):
    assert caption.ptb_tokenize(text) == tokens.split()
