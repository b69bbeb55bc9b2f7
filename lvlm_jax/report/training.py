"""The page a training run ends with: what was trained, how the loss fell, what the model answers."""

import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lvlm_jax.processing.boxes import Box, form_of, read_boxes
from lvlm_jax.processing.drawing import draw
from lvlm_jax.processing.picture import load_image
from lvlm_jax.report import page

SHOWN = 48  # sample cards on a page; failures come first, so these are what a reader wants
# Scores that are fractions begin with one of these.
PERCENT = ("exact", "vqa", "accuracy", "bleu", "rouge", "mean_iou", "without_box", "f1", "precision", "recall")
PERCENT += ("drawn", "written_and_drawn")


def _is_fraction(name: str) -> bool:
    return name.casefold().startswith(PERCENT)


def score_text(name: str, value: float | int) -> str:
    """Fractions as percentages with two decimals, everything else with four digits."""
    return f"{100 * value:.2f} %" if _is_fraction(name) else f"{value:.4g}"


def _title_case(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _count(number: int) -> str:
    """A number of weights in a width that fits a tile: 66.3 K, 6.74 B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if number >= limit:
            scale = 1e3 if unit == "K" else limit
            return f"{number / scale:.3g} {unit}"
    return f"{number:,}"


def _share(stage: Mapping[str, Any]) -> float:
    return stage["trained_params"] / stage["total_params"] if stage["total_params"] else 0.0


def _last_step(stage: Mapping[str, Any]) -> int:
    return int(stage["rows"][-1]["step"]) if stage["rows"] else 0


def _floor_beside(name: str, evaluation: Mapping[str, Any]) -> float | int | None:
    """The floor, where it is comparable with this score: it is a share of right answers."""
    return evaluation.get("floor") if _is_fraction(name) else None


def _tiles(stages: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The figures to read first: last score, floor, questions asked, size, steps."""
    tiles: list[tuple[str, str]] = []
    if evaluations and evaluations[-1]["scores"]:
        last = evaluations[-1]
        name, value = next(iter(last["scores"].items()))
        tiles.append((score_text(name, float(value)), f"{_title_case(name)} {last['when']}"))
        floor = _floor_beside(name, last)
        if floor is not None:
            tiles.append((score_text(name, floor), "Floor: the question alone, no picture"))
        tiles.append((f"{last['count']:,}", "Held-out questions"))
    if stages:
        tiles.append((_count(max(stage["total_params"] for stage in stages)), "Weights in the model"))
        tiles.append(
            (
                f"{sum(_last_step(stage) for stage in stages):,}",
                "Steps in 1 stage" if len(stages) == 1 else f"Steps in {len(stages)} stages",
            )
        )
    cells = "\n".join(
        f'<li class="card"><div class="value">{page.escape(value)}</div><p class="soft">{page.escape(text)}</p></li>'
        for value, text in tiles
    )
    return f'<ul class="grid tiles">\n{cells}\n</ul>' if tiles else ""


def _evaluations(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The score table; a bar beside the first score shows its way up from the floor."""
    if not evaluations:
        return ""
    names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation["scores"]))
    floors = any(evaluation.get("floor") is not None for evaluation in evaluations)
    header = ["When", *map(_heading, names), *(["Floor"] if floors else []), "Questions"]
    rows = []
    for evaluation in evaluations:
        floor = evaluation.get("floor")
        row = [page.escape(_title_case(evaluation["when"]))]
        row += [_score_cell(name, evaluation, with_bar=name == names[0]) for name in names]
        if floors:
            row.append("–" if floor is None else page.escape(score_text("accuracy", floor)))
        rows.append([*row, f"{evaluation['count']:,}"])
    note = "Scores on held-out data."
    if floors:
        tick = ", the tick on the bar," if names and _is_fraction(names[0]) else ""
        note += f" The floor{tick} is the question-only floor: what the question gives away with no picture to look at."
    return (
        f'<h2>Evaluation</h2>\n<p class="soft note">{note}</p>\n{page.table("Scores on held-out data", header, rows)}'
    )


def _heading(name: str) -> str:
    """A score's name that breaks between words and never at the hyphen of CIDEr-D."""
    return " ".join(f'<span class="keep">{page.escape(word)}</span>' for word in _title_case(name).split())


def _score_cell(name: str, evaluation: Mapping[str, Any], *, with_bar: bool) -> str:
    if name not in evaluation["scores"]:
        return "–"
    value = float(evaluation["scores"][name])
    drawn = page.bar(value, _floor_beside(name, evaluation)) if with_bar and _is_fraction(name) else ""
    return page.escape(score_text(name, value)) + drawn


def _note(row: Mapping[str, Any]) -> str:
    """All numbers of a log row in one line."""
    values = (f"{key} {value:.4g}" for key, value in row.items() if key != "step" and isinstance(value, numbers.Real))
    return f"step {row['step']:,}: {', '.join(values)}"


def _stage(stage: Mapping[str, Any]) -> str:
    """One card: name, what it trained, its loss curve."""
    rows = [row for row in stage["rows"] if row.get("loss") is not None]
    facts = f"{stage['trained_params']:,} of {stage['total_params']:,} weights trained ({100 * _share(stage):.3g} %)."
    label = f"Loss of stage {stage['name']}: no step was logged."
    if rows:
        ends = f"loss {float(rows[0]['loss']):.4g} → {float(rows[-1]['loss']):.4g}"
        facts += f" {ends[:1].upper()}{ends[1:]} at step {rows[-1]['step']:,}."
        label = f"Loss of stage {stage['name']} up to step {rows[-1]['step']:,}: {ends}."
    curve = lambda rows: [(float(row["step"]), float(row["loss"]), _note(row)) for row in rows]  # noqa: E731
    other = stage.get("beside", {"name": "", "rows": []})
    beside = curve([row for row in other["rows"] if row.get("loss") is not None])
    if beside:
        facts += f" Dashed: the same stage of {other['name']}, loss {beside[-1][1]:.4g} at step {beside[-1][0]:,.0f}."
    chart = page.line_chart(curve(rows), beside, label=label, x_name="step", y_name="loss")
    return (
        f'<section class="card"><h3>{page.escape(_title_case(stage["name"]))}</h3>\n'
        f'<p class="soft">{page.escape(facts)}</p>{page.bar(_share(stage))}\n{chart}</section>'
    )


MEANT, SAID = "#1c6b3c", "#d2452f"
"""Colours of the boxes of the answer, green, and of the model, red."""


def _boxes(text: str) -> list[Box]:
    form = form_of(text)
    return read_boxes(text, form, on_bad="skip").boxes if form else []


def _picture(sample: Mapping[str, Any]) -> str:
    """The picture, with the boxes of both answers over it where they say any."""
    image, alt = sample["image"], "Picture to the question below"
    for name, colour in (("answer", MEANT), ("prediction", SAID)):
        if boxes := _boxes(sample[name]):
            image, alt = draw(load_image(image), boxes, colour=colour), f"{alt}, boxes of the {name} drawn"
    return page.picture(image, alt)


def _sample(sample: Mapping[str, Any]) -> str:
    """One card: picture, question, both answers, and in words whether they agree."""
    kind, verdict = ("good", "✓ Correct") if sample["correct"] else ("bad", "✗ Wrong")
    return (
        f'<li class="card sample {kind}-answer">{"" if sample["image"] is None else _picture(sample)}\n'
        f'<p class="question">{page.escape(sample["question"])}</p>\n'
        f"<dl><dt>Answer</dt><dd>{page.escape(sample['answer'])}</dd>"
        f"<dt>Model</dt><dd>{page.escape(sample['prediction']) or '(nothing)'}</dd></dl>\n"
        f'<span class="badge {kind}">{verdict}</span></li>'
    )


def _samples(samples: Sequence[Mapping[str, Any]], shown: int) -> str:
    if not samples:
        return ""
    ordered = sorted(samples, key=lambda sample: bool(sample["correct"]))  # stable: otherwise in the order given
    wrong = sum(not sample["correct"] for sample in samples)
    cards = "\n".join(_sample(sample) for sample in ordered[:shown])
    cut = f" The first {shown:,} are shown." if len(samples) > shown else ""
    summary = f"{wrong:,} of {len(samples):,} answers here are wrong; they come first.{cut}"
    if not wrong:
        summary = f"All {len(samples):,} answers here are right.{cut}"
    if any(_boxes(sample["answer"]) for sample in ordered[:shown]):
        summary += " Boxes of the answer are green, the model's are red."
    heading = f'<h2>Held-out pictures</h2>\n<p class="soft">{summary}</p>'
    return f'{heading}\n<ul class="grid samples">\n{cards}\n</ul>'


def render(
    title: str,
    recipe_text: str,
    stages: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    *,
    shown: int = SHOWN,
) -> str:
    """The page as a string; the arguments are those of ``write``."""
    parts = [
        f'<p class="overline">lvlm_jax training run</p>\n<h1>{page.escape(title)}</h1>',
        _tiles(stages, evaluations),
        _evaluations(evaluations),
    ]
    if stages:
        cards = "\n".join(_stage(stage) for stage in stages)
        parts.append(f'<h2>Stages</h2>\n<div class="grid stages">\n{cards}\n</div>')
    parts.append(_samples(samples, shown))
    if recipe_text:
        listing = f'<pre tabindex="0">{page.escape(recipe_text)}</pre>'
        summary = "<summary>The resolved recipe</summary>"
        parts.append(f'<h2>Recipe</h2>\n<details class="card">{summary}{listing}</details>')
    return page.document(title, "\n".join(part for part in parts if part))


def write(
    path: str | os.PathLike,
    title: str,
    recipe_text: str,
    stages: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    *,
    shown: int = SHOWN,
) -> None:
    """Write the self-contained report of a training run.

    stages: {"name", "trained_params", "total_params", "rows": [{"step", "loss", "lr", ...}]}, one loss curve each;
        every number of a row appears when the pointer rests on its step. "beside": {"name", "rows"} of another run,
        drawn dashed into the same chart.
    evaluations: {"when": "before align", "scores": {name: value}, "floor": fraction or None, "count": questions}, in
        order; the last one's first score is the headline.
    samples: {"image": image bytes, path, uint8 array [height, width, 3] or PIL image, "question", "answer",
        "prediction", "correct"}; failures are shown first, ``shown`` cards in all.

    The file appears whole or not at all; everything a user or a model wrote is escaped.
    """
    from etils import epath

    text = render(title, recipe_text, stages, evaluations, samples, shown=shown)
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial"
    partial.write_text(text)
    partial.replace(target)


def chosen(samples: list[dict], most: int = 48) -> list[dict]:
    """What the report shows of an evaluation: failures first, at most half; pictures read back by their paths."""
    right = [next(iter(sample["scores"].values())) >= 0.5 for sample in samples]  # half of the annotators, for VQA
    wrong = [i for i in range(len(samples)) if not right[i]][: most // 2]
    good = [i for i in range(len(samples)) if right[i]]
    # The right ones from all over the data set, whose neighbours are questions about one picture.
    order = [*wrong, *good[:: max(1, len(good) // (most - len(wrong)))][: most - len(wrong)]]
    return [
        {
            "image": samples[i]["images"][0] if samples[i]["images"] else None,
            "question": samples[i]["question"],
            "answer": ", ".join(samples[i]["references"]),
            "prediction": samples[i]["prediction"],
            "correct": right[i],
        }
        for i in order
    ]
