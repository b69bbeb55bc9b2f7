"""Scores of a model that reads and writes text and pictures: does it name what it sees, and draw what it is told?

Three questions, each answered freely: the name of every picture, a picture of every name, and name and picture out of
one call without any prompt. A drawing is recognised where the picture of the data set that is nearest to it, pixel by
pixel, is one of the concept that was asked for.
"""

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax.evaluate.run import PACKAGES, Result, write
from lvlm_jax.evaluate.vqa import EXACT_VARIANT, exact_match
from lvlm_jax.infer.beam import Beams
from lvlm_jax.infer.interleaved import InterleavedSystem, Written
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.processing.image import load_image, preprocess
from lvlm_jax.processing.schema import Example, Image
from lvlm_jax.progress import bar as progress_bar
from lvlm_jax.shapes import Float
from lvlm_jax.versions import versions

DRAWN = "drawn"
"""Folder beside the samples with the pictures that the model drew."""
NEAR = 10
"""A drawing among so many nearest concepts counts as near."""
FREE = 64
"""Answers to no prompt at all."""
DRAWN_VARIANT = (
    f"drawn@k: share of drawings whose own concept is among the k concepts with the nearest picture, by the mean "
    f"squared difference of prepared pixels over all pictures of the evaluation; k is 1 and {NEAR}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gallery:
    """The pictures of a data set by concept.

    names: each concept once. pixels: prepared, one row a picture; concept: which each picture is of.
    """

    names: tuple[str, ...]
    pixels: Float[np.ndarray, "M C"]
    concept: np.ndarray

    def ranks(self, drawn: Float[np.ndarray, "N C"], names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """(how many concepts are nearer to each drawing than its own, the name of the nearest).

        A name that no picture has is behind all others.
        """
        square = lambda x: np.square(x).sum(1)  # noqa: E731
        away = square(drawn)[:, None] + square(self.pixels)[None] - 2 * drawn @ self.pixels.T
        best = np.full((len(drawn), len(self.names)), np.inf, np.float32)
        for number in range(len(self.names)):
            best[:, number] = away[:, self.concept == number].min(1)
        places = {name: number for number, name in enumerate(self.names)}
        own = np.asarray([places.get(name, -1) for name in names])
        distance = np.where(own < 0, np.inf, best[np.arange(len(drawn)), own])
        ranks = np.where(own < 0, len(self.names), (best < distance[:, None]).sum(1))
        return ranks, [self.names[number] for number in best.argmin(1)]


def evaluate(
    system: InterleavedSystem,
    samples: Iterable[tuple[Example, Any]],
    *,
    scores: Sequence[str] = ("exact",),
    batch_rows: int = 64,
    max_new_tokens: int = 16,
    sampling: Sampling | Beams | None = None,
    progress: bool = True,
    out: str | os.PathLike | None = None,
    data: str = "",
) -> Result:
    """Names and drawings of every sample, scored.

    Args:
      samples: (conversation that ends with a picture's question, its names); a last assistant turn is taken off. A
        sample without a picture is no sample.
      scores: ("exact",): a name is right or wrong, and drawings have their own score (`DRAWN_VARIANT`).
      batch_rows: prompts a batch. max_new_tokens: of a name.
      sampling: of drawings, default greedy, which names always are; answers to no prompt are always sampled, at
        temperature 1 where it is greedy.
      out: folder for the samples, the summary and the drawings.

    Raises:
      ValueError: no samples with a picture, another score, or beams.
    """
    if isinstance(sampling, Beams):
        raise ValueError("beams: not for answers of text and pictures, whose tokens a grammar chooses; use Sampling")
    if tuple(scores) != ("exact",):
        raise ValueError(f"scores={tuple(scores)}: a model that writes text and pictures is scored by ('exact',) alone")
    pairs = [(example, references) for example, references in samples if example.images]
    if not pairs:
        raise ValueError("0 samples with a picture: there is nothing to name and nothing to draw")
    began, sampling = time.perf_counter(), sampling or Sampling()
    system = dataclasses.replace(system, rows=batch_rows)
    gallery = gallery_of(system, pairs)
    free = min(FREE, len(gallery.names))
    with progress_bar(len(pairs) + len(gallery.names) + free, "evaluate", unit="answer", show=progress) as bar:
        said = _named(system, pairs, max_new_tokens)
        bar.update(len(pairs))
        drawn, drawings = _drawn(system, gallery, sampling)
        bar.update(len(gallery.names))
        both, pictures = _both(system, gallery, free, max_new_tokens, sampling)
        bar.update(free)
    rows = [row for group in _in_turn(drawn, said, both) for row in group]
    values = _means(said, drawn, both) | _by_kind(said)
    decoding = dataclasses.asdict(sampling) | {"max_new_tokens": max_new_tokens}
    summary = {"data": data, "scores": values, "samples": len(rows), "decoding": decoding, "batch_rows": batch_rows}
    summary |= _about(system) | {"seconds": round(time.perf_counter() - began, 3)}
    if out is not None:
        _keep(Path(out), [*zip(drawn, drawings), *zip(both, pictures)])
        write(Path(out), rows, summary)
    return Result(scores=values, samples=rows, summary=summary)


def _about(system: InterleavedSystem) -> dict[str, Any]:
    """What of the summary is the same for all data."""
    return {
        "variants": {"exact": EXACT_VARIANT, "drawn": DRAWN_VARIANT},
        "model": system.name,
        "dtype": np.dtype(system.model.dtype).name,
        "versions": versions(PACKAGES),
    }


def _in_turn(*groups: list[dict]) -> Iterable[list[dict]]:
    """The first of each group, the second of each, and so on, as long as there are some."""
    for number in range(max(map(len, groups))):
        yield [group[number] for group in groups if number < len(group)]


def gallery_of(system: InterleavedSystem, pairs: Sequence[tuple[Example, Any]]) -> Gallery:
    """All pictures of the samples, each under its first name."""
    names = [references[0] for _, references in pairs]
    known = tuple(dict.fromkeys(names))
    places = {name: number for number, name in enumerate(known)}
    pixels = [preprocess(load_image(example.images[0].source), system.spec) for example, _ in pairs]
    flat = np.stack(pixels).reshape(len(pixels), -1)
    return Gallery(names=known, pixels=flat, concept=np.asarray([places[name] for name in names]))


def _named(system: InterleavedSystem, pairs: Sequence[tuple[Example, Any]], max_new_tokens: int) -> list[dict]:
    """What the model says of each picture."""
    prompts = [_prompt(example) for example, _ in pairs]
    answers = system.generate_batch(prompts, max_new_tokens=max_new_tokens)
    rows = []
    for (example, references), answer in zip(pairs, answers):
        text = text_of(answer)
        rows.append(
            {
                "id": example.id,
                "origin": example.origin,
                "images": [example.images[0].source if isinstance(example.images[0].source, str) else None],
                "question": "What is drawn here?",
                "prediction": text,
                "references": list(references),
                "scores": {"exact_match": float(exact_match(text, references))},
            }
        )
    return rows


def _drawn(system: InterleavedSystem, gallery: Gallery, sampling: Sampling) -> tuple[list[dict], np.ndarray]:
    """A picture of each name."""
    need = system.config.visual_tokens + 1
    answers = system.generate_batch(list(gallery.names), picture=True, max_new_tokens=need, sampling=sampling)
    pictures = np.stack([answer[0] for answer in answers])
    return _scored(system, gallery, list(gallery.names), pictures, "Draw: ", "drawn"), pictures


def _both(
    system: InterleavedSystem, gallery: Gallery, count: int, max_new_tokens: int, sampling: Sampling
) -> tuple[list[dict], Any]:
    """A name and a picture of it out of one call, with nothing to go by; one that is not both has no picture."""
    if sampling.mode == "greedy":
        sampling = Sampling(temperature=1.0, seed=sampling.seed)
    most = max_new_tokens + system.config.visual_tokens + 2
    answers = system.generate_batch([""] * count, max_new_tokens=most, sampling=sampling)
    whole = [answer for answer in answers if len(pictures_of(answer)) == 1 and text_of(answer)]
    names = [text_of(answer) for answer in whole]
    pictures = [pictures_of(answer)[0] for answer in whole]
    rows = _scored(system, gallery, names, np.stack(pictures), "Write and draw: ", "written") if whole else []
    for row in rows:
        row["scores"] = {"written_and_drawn": float(row["rank"] < NEAR)}
    nothing = {"question": "Write and draw", "prediction": "(not one text and one picture)", "references": []}
    short = [{**nothing, "images": [], "scores": {"written_and_drawn": 0.0}} for _ in range(count - len(whole))]
    return rows + short, pictures


def _scored(
    system: InterleavedSystem, gallery: Gallery, names: list[str], pictures: np.ndarray, asked: str, kind: str
) -> list[dict]:
    """One row a drawing: which concept it looks like, and how many look more like it than its own."""
    pixels = np.stack([preprocess(load_image(picture), system.spec) for picture in pictures])
    ranks, nearest = gallery.ranks(pixels.reshape(len(pixels), -1), names)
    return [
        {
            "images": [f"{DRAWN}/{kind}_{number:05d}.png"],
            "question": f"{asked}{name}",
            "prediction": f"looks like {like} ({rank} concepts are nearer than its own)",
            "references": [name],
            "rank": int(rank),
            "scores": {"drawn@1": float(rank < 1), f"drawn@{NEAR}": float(rank < NEAR)},
        }
        for number, (name, rank, like) in enumerate(zip(names, ranks, nearest))
    ]


def _means(*groups: list[dict]) -> dict[str, float]:
    """The mean of every score."""
    mean = lambda rows, name: float(np.mean([row["scores"][name] for row in rows]))  # noqa: E731
    return {name: mean(rows, name) for rows in groups if rows for name in rows[0]["scores"]}


def _by_kind(said: list[dict]) -> dict[str, float]:
    """The share of right names by what an id begins with (a vendor, a split), where there are several of those."""
    kinds = dict.fromkeys(row["id"].partition("/")[0] for row in said)
    if not 1 < len(kinds) <= NEAR:
        return {}
    of = {kind: [row for row in said if row["id"].partition("/")[0] == kind] for kind in kinds}
    return {f"exact_match[{kind}]": value for kind, rows in of.items() for value in _means(rows).values()}


def _prompt(example: Example) -> list[Any]:
    """The last question, its pictures as paths or arrays."""
    asked = next(turn for turn in reversed(example.turns) if turn.role == "user")
    shown = lambda source: Path(source) if isinstance(source, str) else source  # noqa: E731
    return [shown(part.source) if isinstance(part, Image) else part.text for part in asked.segments]


def text_of(written: Written) -> str:
    """All texts of an answer."""
    return " ".join(part.strip() for part in written if isinstance(part, str)).strip()


def pictures_of(written: Written) -> list[np.ndarray]:
    """All pictures of an answer."""
    return [part for part in written if not isinstance(part, str)]


def _keep(folder: Path, drawn: list[tuple[dict, np.ndarray]]) -> None:
    """Writes the pictures; rows then name them by their whole path."""
    import PIL.Image

    (folder / DRAWN).mkdir(parents=True, exist_ok=True)
    for row, picture in drawn:
        row["images"] = [str(folder / row["images"][0])]
        PIL.Image.fromarray(picture).save(row["images"][0])
