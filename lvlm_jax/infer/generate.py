"""Batched generation: one prefill, then one step a token, each compiled once per shape.

Prompts are padded on the left to a bucket of lengths, so that all rows write the same cache slot and few programs are
compiled. The cache is donated from call to call; its layers, like the weights, stand one by one: stacked weights cost a
factor of 2 to 3 at decode time.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lvlm_jax import mesh as M
from lvlm_jax.data.loader import collate, picture_key
from lvlm_jax.infer.beam import Beams
from lvlm_jax.infer.grammar import PictureGrammar
from lvlm_jax.infer.rows import bucket, left_padded, power
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.infer.steps import Model, decode, prefill, search
from lvlm_jax.infer.text import Decode, TextStream, whole_text
from lvlm_jax.models.lvlm import dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.params import unstack_layers
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.schema import Batch, Encoded
from lvlm_jax.shapes import Array, Float, Int, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote.

    tokens: without the token that ended it. text: cut before a stop string. reason: "stop" for an end token or a stop
    string, "length" when max_new_tokens ran out. prompt_tokens: positions of the prompt, pictures included.
    """

    tokens: tuple[int, ...]
    text: str
    reason: Literal["stop", "length"]
    prompt_tokens: int


@functools.partial(jax.jit, static_argnames=("model",))
def _embed(model: Model, params: Params, patches: Array, positions: Array, segments: Array) -> Array:
    return model.apply({"params": params}, patches, positions, segments, method="embed_images")


def _no_text(tokens: Sequence[int]) -> str:
    return ""


class Generator:
    """Runs a model on encoded prompts.

    Example:
      >>> generator = Generator(model, params, spec=spec, pad_id=0, eos_ids=(2,), decode=tokenizer.decode)
      >>> [answer.text for answer in generator.generate(encoded, max_new_tokens=32)]

    Args:
      model: scanned or not; decoding runs layer by layer either way.
      params: plain tree in either shape of the stack; placed on the mesh when there is one.
      spec: how a picture becomes patches.
      pad_id, eos_ids: the token that fills a row, and those that end an answer.
      decode: ids -> text; without it answers have tokens only, and there are no stop strings and no streaming.
      rows: the most prompts of one batch.
      mesh: devices to run on; rows are cut over its data axes.
      grammar: which tokens may come where, for a model that writes pictures.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        spec: ImageSpec,
        pad_id: int = 0,
        eos_ids: Sequence[int] = (),
        decode: Decode | None = None,
        rows: int = 16,
        mesh: Mesh | None = None,
        grammar: PictureGrammar | None = None,
    ):
        self.model, self.grammar = model.clone(scan=False, remat="none"), grammar
        self.spec, self.pad_id, self.eos_ids = spec, pad_id, frozenset(eos_ids)
        self.decode, self.rows, self.mesh = decode, rows, mesh
        self.groups = 1 if mesh is None else _ways(mesh)
        params = unstack_layers(params)
        if mesh is not None:
            shapes, axes = abstract(self.model, dummy_batch(model.config))
            params = jax.device_put(params, M.shardings(mesh, axes, shapes))
        self.params = params

    def generate(
        self,
        encoded: Sequence[Encoded],
        *,
        max_new_tokens: int,
        sampling: Sampling | Beams | None = None,
        stop: Sequence[str] = (),
        rows: int | None = None,
    ) -> list[Answer]:
        """One answer a prompt, in order.

        Args:
          sampling: how tokens are chosen, or `Beams` for a beam search; default greedy.
          stop: strings that end an answer, also across token borders; a beam search ends at tokens alone, and its best
            answer is cut.
          rows: the most prompts of one batch, instead of the generator's.

        Raises:
          ValueError: a prompt that leaves no room for max_new_tokens in the model's context.
        """
        rows = rows or self.rows
        batches = [encoded[i : i + rows] for i in range(0, len(encoded), rows)]
        results = self.batches(batches, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, rows=rows)
        return list(itertools.chain.from_iterable(results))

    def batches(
        self,
        batches: Iterable[Sequence[Encoded]],
        *,
        max_new_tokens: int,
        sampling: Sampling | Beams | None = None,
        stop: Sequence[str] = (),
        rows: int | None = None,
    ) -> Iterator[list[Answer]]:
        """The answers of each batch; the next batch's pictures are read while this one runs."""
        sampling, rows, batches = sampling or Sampling(), rows or self.rows, list(batches)
        for prompt in itertools.chain.from_iterable(batches):
            self.check(prompt, max_new_tokens)
        firsts = itertools.accumulate(map(len, batches), initial=0)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.batch_of, batches[0], rows) if batches else None
            for number, (prompts, first) in enumerate(zip(batches, firsts)):
                batch = ahead.result()
                if number + 1 < len(batches):
                    ahead = reader.submit(self.batch_of, batches[number + 1], rows)
                yield self._answers(prompts, self.tokens(batch, max_new_tokens, sampling, first), max_new_tokens, stop)

    def stream(
        self,
        prompt: Encoded,
        *,
        max_new_tokens: int,
        sampling: Sampling | Beams | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The answer to one prompt in pieces: whole characters, nothing of a stop string. They join to the answer."""
        self.check(prompt, max_new_tokens)
        steps = self.tokens(self.batch_of([prompt], 1), max_new_tokens, sampling or Sampling(), 0)
        return self._pieces(steps, TextStream(self._decoder(), stop))

    def _pieces(self, steps: Iterator[np.ndarray], text: TextStream) -> Iterator[str]:
        for tokens in steps:
            if int(tokens[0]) in self.eos_ids:
                break
            if piece := text.feed(int(tokens[0])):
                yield piece
            if text.stopped:
                return
        if piece := text.finish():
            yield piece

    def check(self, prompt: Encoded, max_new_tokens: int) -> None:
        """Raises ValueError when the prompt and its answer do not fit the context, or there is nothing to do."""
        used, context = len(prompt.tokens), self.model.config.llm.context
        if max_new_tokens < 1 or not used:
            raise ValueError(f"max_new_tokens={max_new_tokens} and {used} prompt tokens: each must be at least 1")
        if used + max_new_tokens > context:
            raise ValueError(
                f"a prompt of {used} tokens ({len(prompt.images)} picture(s) included) and max_new_tokens="
                f"{max_new_tokens} need {used + max_new_tokens} positions, but the model's context is {context}; "
                "lower max_new_tokens, shorten the prompt or use fewer pictures"
            )

    def embed_images(
        self, patches: Float[np.ndarray, "N P C"], positions: Int[np.ndarray, "N P 2"]
    ) -> Float[np.ndarray, "N Q D"]:
        """Pictures -> what the language model sees of them; runs in batches of at most `rows`."""
        out = []
        for i in range(0, len(patches), self.rows):
            part, place = patches[i : i + self.rows], positions[i : i + self.rows]
            fill = [(0, power(len(part), self.rows) - len(part)), (0, 0), (0, 0)]
            grid = np.pad(part, fill)[None], np.pad(place, fill)[None]
            seen = _embed(self.model, self.params, *grid, np.ones(grid[0].shape[:3], np.int32))[0]
            out.append(np.asarray(seen.astype(jnp.float32)).reshape(grid[0].shape[1], -1, seen.shape[-1])[: len(part)])
        return np.concatenate(out)

    def _decoder(self) -> Decode:
        if self.decode is None:
            raise ValueError("streaming and stop strings need Generator(decode=...), e.g. tokenizer.decode")
        return self.decode

    def batch_of(self, prompts: Sequence[Encoded], rows: int) -> Batch:
        """Prompts as a batch of one of a few shapes: rows, length and pictures rounded up, rows padded on the left."""
        count = -(-power(len(prompts), max(rows, len(prompts))) // self.groups) * self.groups
        filled = [[p] for p in prompts] + [[] for _ in range(count - len(prompts))]
        # Rows about one picture share it, but not where what stands for it in a row depends on the row.
        share, shared = count // self.groups, self.model.config.shares_pictures
        pictures = max(_vision_rows(filled[i : i + share], shared) for i in range(0, count, share))
        # Of a model that may shrink a grid, all pictures run in the program of one that does.
        limited = self.spec.tiles is not None and self.spec.tiles.most is not None
        batch = collate(
            filled,
            length=bucket(max(len(p.tokens) for p in prompts)),
            groups=self.groups,
            vision_rows=power(pictures) if pictures else 0,
            visual_tokens=self.model.config.visual_tokens,
            pad_id=self.pad_id,
            spec=self.spec,
            share=shared,
            blend=bool(pictures) if limited else None,
            frames=getattr(self.model.config, "pools_frames", False),
        )
        return left_padded(batch)

    def tokens(
        self, batch: Batch, max_new_tokens: int, sampling: Sampling | Beams, first: int = 0
    ) -> Iterator[Int[np.ndarray, "B"]]:
        """The new tokens of each step for a `batch_of` prompts, read one step late, so that the device never waits.

        Rows that have ended go on. first: number of the batch's first prompt, which with the seed makes a row's key.
        """
        if isinstance(sampling, Beams):
            if self.model.config.fusion is not None:  # keys of pictures belong to a group, not to a hypothesis
                raise ValueError("beams: not for a model whose text looks at pictures between its layers; use Sampling")
            yield from self._searched(batch, max_new_tokens, sampling)
            return
        # One step a call, not a compiled loop of steps. Measured on 2 cores (jax 0.10.2; width 96, 3 layers, 256 rows),
        # prefill and 4 new tokens: calls 85 ms, scan 85, while-loop 85, unrolled 84; 64 tokens: calls 460, scan 395,
        # while-loop 515, each within the noise of its repeats. So the loop that can stream and stop early is the one
        # there is; on newer jax a while-loop is slower by 1.7.
        static = (self.model, self.mesh, sampling.mode)
        room = power(max(max_new_tokens, 4))
        keys = None
        if sampling.mode != "greedy":
            numbers = jnp.arange(first, first + len(batch.tokens))
            keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(sampling.seed)))(numbers)
        if self.mesh is not None:
            batch = jax.device_put(batch, M.batch_sharding(self.mesh))
        held, numbers = {part: self.params[part] for part in self.model.config.decoding}, sampling.numbers
        with M.use(self.mesh):
            left = None if self.grammar is None else jnp.int32(max_new_tokens)
            cache, place = prefill(*static, room, self.params, batch, keys, numbers, self.grammar, left)
        for _ in range(max_new_tokens - 1):
            newest = place.tokens
            with M.use(self.mesh):
                cache, place = decode(*static, held, cache, place, numbers, self.grammar)
            yield np.asarray(newest)
        yield np.asarray(place.tokens)

    def _searched(self, batch: Batch, max_new_tokens: int, beams: Beams) -> Iterator[Int[np.ndarray, "B"]]:
        """The steps of each row's best hypothesis; behind its end, the end again."""
        static = (self.model, self.mesh, beams.mode, tuple(sorted(self.eos_ids)), power(max(max_new_tokens, 4)))
        if self.mesh is not None:
            batch = jax.device_put(batch, M.batch_sharding(self.mesh))
        with M.use(self.mesh):
            found = search(*static, self.params, batch, beams.numbers, jnp.int32(max_new_tokens))
        tokens, last = np.asarray(found.tokens[:, 0]), np.maximum(np.asarray(found.lengths[:, 0]) - 1, 0)
        for at in range(last.max() + 1):
            yield tokens[np.arange(len(tokens)), np.minimum(at, last)]

    def _answers(
        self, prompts: Sequence[Encoded], steps: Iterator[np.ndarray], max_new_tokens: int, stop: Sequence[str]
    ) -> list[Answer]:
        """Listens to every row until all have ended."""
        texts = [TextStream(self._decoder(), stop) for _ in prompts] if stop else []
        pieces: list[list[str]] = [[] for _ in prompts]
        taken: list[list[int]] = [[] for _ in prompts]
        live = set(range(len(prompts)))
        for tokens in steps:
            for row, token in zip(sorted(live), tokens[sorted(live)].tolist()):
                if token in self.eos_ids:
                    live.discard(row)
                    continue
                taken[row].append(token)
                if texts:
                    pieces[row].append(texts[row].feed(token))
                    if texts[row].stopped:
                        live.discard(row)
            if not live:
                break
        decode = self.decode or _no_text
        return [
            Answer(
                tokens=tuple(taken[row]),
                text="".join(pieces[row]) + texts[row].finish() if texts else whole_text(decode, taken[row]),
                reason="length" if row in live else "stop",
                prompt_tokens=len(prompt.tokens),
            )
            for row, prompt in enumerate(prompts)
        ]


def _ways(mesh: Mesh) -> int:
    """Data shards of a mesh: the groups that a batch must have."""
    axes = M.batch_sharding(mesh).spec[0]
    return int(np.prod([mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes)]))


def _vision_rows(rows: Sequence[Sequence[Encoded]], shared: bool) -> int:
    """Vision rows of the pictures of some rows; where they are shared, one that stands in several counts once."""
    pictures = [(picture_key(image), n) for row in rows for e in row for image, n in zip(e.images, e.rows)]
    return sum(dict(pictures).values() if shared else (n for _, n in pictures))
