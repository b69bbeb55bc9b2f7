import json

import numpy as np
import pytest

from lvlm_jax.evaluate.run import evaluate, plan
from lvlm_jax.infer.prompt import as_example
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.processing.schema import Example, Text, Turn
from tests.infer.tiny import few_shapes, tiny_system

TEXTS = ["What is it?", "dogs", "Which color is the big circle in the image?"]


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    few_shapes(monkeypatch)


@pytest.fixture(scope="module")
def system():
    return tiny_system()


@pytest.fixture(scope="module")
def samples(system):
    """Nine questions about three pictures, interleaved; the model's own answers are right for two of three."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(3)]
    examples = [as_example(TEXTS[i % 3], pictures[i // 3]) for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    answers = system.generate_batch(examples, max_new_tokens=4)
    told = [Example((*e.turns, Turn("assistant", (Text("hidden"),))), id=str(i)) for i, e in enumerate(examples)]
    return [(e, [a, *["other"] * 9] if i % 3 else ["wrong"] * 10) for i, (e, a) in enumerate(zip(told, answers))]


SETTINGS = {"max_new_tokens": 4, "batch_rows": 4, "progress": False}


def test_scores_and_records(system, samples, tmp_path):
    result = evaluate(system, samples, scores=("exact", "vqa"), out=tmp_path / "eval", **SETTINGS)
    assert result.scores["exact_match"] == pytest.approx(6 / 9)
    assert "vqa_accuracy" in result.scores
    lines = [json.loads(line) for line in (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()]
    assert lines == result.samples
    assert [line["id"] for line in lines] == [str(i) for i in range(9)]
    first = lines[0]
    assert first["prompt"] == "<s>USER: <image>\nWhat is it? ASSISTANT:"
    assert first["template"] == "vicuna_v1"
    assert first["references"] == ["wrong"] * 10
    assert first["scores"]["exact_match"] == 0.0
    assert first["decoding"] == {"method": "greedy", "max_new_tokens": 4}
    assert lines[1]["prediction"] == samples[1][1][0]
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert summary["scores"] == result.scores
    assert summary["samples"] == 9
    assert {"lvlm_jax", "jax", "transformers"} <= summary["versions"].keys()
    assert "exact match" in summary["variants"]["exact"]
    assert not list((tmp_path / "eval").glob("*.part"))


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        (Sampling(), {"method": "greedy"}),
        (Sampling(repetition_penalty=1.5), {"method": "greedy", "repetition_penalty": 1.5}),
        (
            Sampling(temperature=0.5),
            {
                "method": "sampling",
                "temperature": 0.5,
                "top_k": 0,
                "top_p": 1.0,
                "seed": 0,
                "repetition_penalty": 1.0,
            },
        ),
    ],
)
def test_the_records_say_how_answers_were_made(system, samples, sampling, said):
    result = evaluate(system, samples[:1], sampling=sampling, **SETTINGS)
    assert result.summary["decoding"] == result.samples[0]["decoding"] == said | {"max_new_tokens": 4}


def test_it_repeats_and_does_not_depend_on_the_batch(system, samples):
    once = evaluate(system, samples, **SETTINGS)
    again = evaluate(system, iter(samples), **(SETTINGS | {"batch_rows": 2}))
    assert once.samples == again.samples


def test_captions_are_scored_too(system, samples):
    result = evaluate(system, samples[:4], scores="caption", **SETTINGS)
    assert {"CIDEr-D", "BLEU-4", "ROUGE-L"} <= result.scores.keys()


def test_questions_about_one_picture_share_a_batch_and_its_vision_row(system, samples):
    encoded = [system.encode(example) for example, _ in samples]
    batches = plan(encoded, 3)
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    for batch in batches:
        assert len({id(encoded[i].images[0].source) for i in batch}) == 1
        assert system.generator.batch_of([encoded[i] for i in batch], 3).patches.shape[1] == 1


def test_batches_go_by_length_and_questions_without_pictures_stand_alone(system):
    encoded = [system.encode(as_example("dogs " * n)) for n in (30, 1, 29, 2, 31, 1)]
    assert plan(encoded, 3) == [[1, 3, 5], [0, 2, 4]]


def test_the_progress_bar_shows_the_running_score(system, samples, capsys):
    evaluate(system, samples, **(SETTINGS | {"progress": True}))
    shown = capsys.readouterr().err
    assert "exact=66.67%" in shown
    assert "9/9" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": ("exactly",)}, "unknown score 'exactly'; choose from caption, detection, exact"),
        ({"samples": []}, "nothing to evaluate"),
        ({"max_new_tokens": 190}, "sample: a prompt of .* context is 192|0: a prompt of"),
        ({"batch_rows": 0}, "batch_rows=0"),
        ({"scores": ("vqa",), "samples": "one answer each"}, "leaves one human answer out"),
    ],
)
def test_bad_settings_are_named_before_anything_runs(system, samples, tmp_path, changes, message):
    arguments = {"samples": samples, "out": tmp_path / "eval", **SETTINGS} | changes
    if arguments["samples"] == "one answer each":
        arguments["samples"] = [(example, "yes") for example, _ in samples]
    with pytest.raises(ValueError, match=message):
        evaluate(system, **arguments)
    assert not (tmp_path / "eval").exists()
