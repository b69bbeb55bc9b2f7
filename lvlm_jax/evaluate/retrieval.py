"""Pictures found by their texts and texts by their pictures, among all of a data set: recall at k.

Source of the two steps: BLIP-2 (arXiv 2301.12597), section 4.4 (`evaluate.rerank`).
"""

import functools
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.data.collate import picture_key
from lvlm_jax.evaluate.rerank import match_pairs, rerank
from lvlm_jax.evaluate.run import PACKAGES, Result, write
from lvlm_jax.models.image_text import ImageText
from lvlm_jax.processing.captions import bert_ids, cleaned
from lvlm_jax.processing.image import ImageSpec, load_image, to_rows
from lvlm_jax.processing.schema import Batch, Example
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.shapes import Float, Int, Params
from lvlm_jax.versions import versions

AT = (1, 5, 10)
"""Recall at these."""
MATCHED = 128
"""How many candidates of each query are matched (LAVIS: k_test)."""


def evaluate(
    model: ImageText,
    params: Params,
    samples: Iterable[tuple[Example, Sequence[str]]],
    *,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    length: int = 32,
    rows: int = 64,
    out: str | os.PathLike | None = None,
    data: str = "",
    name: str = "",
) -> Result:
    """Recall of texts by pictures ("to_text") and of pictures by texts ("to_image"), by contrast, and re-ranked.

    Args:
      samples: (example with one picture, its captions); each caption is a query, and equal pictures are one.
      length: positions of a text. rows: pictures or texts a batch. out: folder for samples and summary.

    Raises:
      ValueError: no samples with a picture.
    """
    began = time.perf_counter()
    pairs = [(example, text) for example, texts in samples if example.images for text in texts]
    if not pairs:
        raise ValueError("0 samples with a picture and a text: there is nothing to find")
    pictures = {picture_key(example.images[0]): example.images[0] for example, _ in pairs}
    places = {key: number for number, key in enumerate(pictures)}
    of_text = np.asarray([places[picture_key(example.images[0])] for example, _ in pairs])
    tokens, segments = _texts([text for _, text in pairs], tokenizer, length)
    features, image = _pictures(model, params, [load_image(one.source) for one in pictures.values()], spec, rows)
    text = _in_batches(functools.partial(_embed_text, model, params), rows, tokens, segments)
    # Of a picture its best query speaks; those of all pictures at once would be 16 GB for COCO's 5,000.
    parts = (image[i : i + rows] for i in range(0, len(image), rows))
    scores = np.concatenate([np.einsum("NQE,BE->NBQ", part, text, optimize=True).max(-1) for part in parts])
    match = functools.partial(_match, model, params, jnp.asarray(features), jnp.asarray(tokens), jnp.asarray(segments))
    found = {}
    own = of_text[None] == np.arange(len(pictures))[:, None]
    for way, table, right in (("to_text", scores, own), ("to_image", scores.T, own.T)):
        ranked = np.argsort(-table, axis=1, kind="stable")
        again, _ = rerank(jnp.asarray(table), functools.partial(match, way=way), MATCHED)
        found |= {f"recall_{way}@{k}": _recall(ranked, right, k) for k in AT}
        found |= {f"recall_{way}_matched@{k}": _recall(np.asarray(again), right, k) for k in AT}
    best = np.argsort(-scores.T, axis=1, kind="stable")[:, 0]
    lines = [_line(*pair, mine, first, pictures) for pair, mine, first in zip(pairs, of_text, best)]
    summary = {"data": data, "scores": found, "samples": len(pairs), "pictures": len(pictures), "model": name}
    summary |= {"matched": MATCHED, "versions": versions(PACKAGES), "seconds": round(time.perf_counter() - began, 3)}
    if out is not None:
        write(Path(out), lines, summary)
    return Result(scores=found, samples=lines, summary=summary)


def _texts(
    texts: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """(ids padded on the right, 0 where they are)."""
    ids = [bert_ids(cleaned(text), tokenizer, length) for text in texts]
    tokens, segments = np.full((len(ids), length), tokenizer.pad_id, np.int32), np.zeros((len(ids), length), np.int32)
    for row, one in enumerate(ids):
        tokens[row, : len(one)], segments[row, : len(one)] = one, 1
    return tokens, segments


def _pictures(
    model: ImageText, params: Params, pictures: Sequence[Any], spec: ImageSpec, rows: int
) -> tuple[Float[np.ndarray, "N P D"], Float[np.ndarray, "N Q E"]]:
    """(features, unit vectors of the queries) of every picture."""
    patches, positions = (np.concatenate(parts) for parts in zip(*(to_rows(one, spec) for one in pictures)))
    shown = np.ones(patches.shape[:2], np.int32)
    features = _in_batches(functools.partial(_features, model, params), rows, patches, positions, shown)
    return features, _in_batches(functools.partial(_embed_images, model, params), rows, features)


def _in_batches(run: Any, rows: int, *arrays: np.ndarray) -> np.ndarray:
    """A function of rows on all of them, so many at a time; the last batch is filled up and cut."""
    parts = []
    for start in range(0, len(arrays[0]), rows):
        piece = [array[start : start + rows] for array in arrays]
        fill = rows - len(piece[0])
        full = [np.pad(one, [(0, fill), *[(0, 0)] * (one.ndim - 1)], mode="edge") for one in piece]
        parts.append(np.asarray(run(*full), np.float32)[: rows - fill])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=0)
def _features(model: ImageText, params: Params, patches: Any, positions: Any, segments: Any) -> Any:
    text = jnp.zeros((len(patches), 1), jnp.int32)
    batch = Batch(
        tokens=text,
        weights=text.astype(jnp.float32),
        positions=text,
        segments=text,
        image_index=text,
        patches=patches[None],
        patch_positions=positions[None],
        patch_segments=segments[None],
    )
    return model.apply({"params": params}, batch, method="features")


@functools.partial(jax.jit, static_argnums=0)
def _embed_images(model: ImageText, params: Params, features: Any) -> Any:
    return model.apply({"params": params}, features, method="embed_images")


@functools.partial(jax.jit, static_argnums=0)
def _embed_text(model: ImageText, params: Params, tokens: Any, segments: Any) -> Any:
    return model.apply({"params": params}, tokens, segments, method="embed_text")


@functools.partial(jax.jit, static_argnames=("model", "way"))
def _match(model: ImageText, params: Params, features: Any, tokens: Any, segments: Any, found: Any, way: str) -> Any:
    """The matching logit of each query with its candidates."""
    own = jnp.broadcast_to(jnp.arange(len(found))[:, None], found.shape)
    images, texts = (own, found) if way == "to_text" else (found, own)
    return match_pairs(model, params, features, tokens, segments, images, texts)


def _recall(ranked: np.ndarray, right: np.ndarray, k: int) -> float:
    """The share of queries with a right one among the first k."""
    return float(np.take_along_axis(right, ranked[:, :k], 1).any(1).mean())


def _line(example: Example, text: str, own: int, first: int, pictures: dict) -> dict[str, Any]:
    """One line of the samples: a text, and the picture that it finds first."""
    shown = list(pictures.values())[first].source
    return {
        "id": example.id,
        "origin": example.origin,
        "images": [shown if isinstance(shown, str) else None],
        "question": f"Find: {text}",
        "prediction": "the picture above",
        "references": [text],
        "scores": {"recall_to_image@1": float(own == first)},
    }
