"""Prefill and decoding: the engine behind ``lvlm generate`` against the torch library's `generate`, greedy."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.bench.case import make_examples, prompt_of, write_inputs
from lvlm_jax.bench.rounds import OURS, Row, interleaved
from lvlm_jax.bench.setting import Setting, SidesDiffer
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.infer.generate import Generator
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.models.lvlm import LVLM

ROWS = (1, 8)
"""Prompts that are answered at a time."""


class _Ours:
    """The engine with a batch of prompts, pictures prepared."""

    def __init__(self, setting: Setting, rows: int) -> None:
        case = setting.case
        params = import_folder(setting.folder, dtype=setting.dtype).params
        model = LVLM(case.config, dtype=jnp.dtype(setting.dtype))
        self.generator = Generator(model, params, spec=case.spec, rows=rows)
        prompts = [prompt_of(example, case) for example in make_examples(case, rows)]
        self.batch = self.generator.batch_of(prompts, rows)

    def run(self, new_tokens: int) -> dict[str, Any]:
        """Seconds to the first token of each row, from there to the last, and the tokens [B, new_tokens]."""
        began, moments, taken = time.perf_counter(), [], []
        for tokens in self.generator.tokens(self.batch, new_tokens, Sampling()):
            moments.append(time.perf_counter())
            taken.append(tokens)
        return {"first": moments[0] - began, "rest": moments[-1] - moments[0], "tokens": np.stack(taken, 1).tolist()}

    def logits(self) -> np.ndarray:
        """Of the next token of each row [B, V]."""
        model = self.generator.model

        def last(params: Any, batch: Any) -> Any:
            hidden, _ = model.apply({"params": params}, batch)
            return model.apply({"params": params}, hidden[:, -1], method="logits")

        return np.asarray(jax.jit(last)(self.generator.params, self.batch))


def prefill(setting: Setting) -> Iterator[Row]:
    """One row a number of prompts: from prepared pictures and ids to the first new token."""
    for rows in ROWS:
        yield _measured(setting, "prefill", rows, 1, "first", rows * setting.case.prompt)


def decode(setting: Setting) -> Iterator[Row]:
    """One row a number of prompts: from the first new token to the last one of the answer."""
    new_tokens = setting.case.answer
    for rows in ROWS:
        yield _measured(setting, "decode", rows, new_tokens, "rest", rows * (new_tokens - 1))


def _measured(setting: Setting, part: str, rows: int, new_tokens: int, which: str, work: int) -> Row:
    name = f"{part}, {rows} row{'s' if rows > 1 else ''}"
    setting.say(name)
    ours, last = _Ours(setting, rows), {}  # last: what each side answered in its last measurement

    def timed(side: str, run: Callable[[], dict[str, Any]]) -> Callable[[], float]:
        def once() -> float:
            last[side] = run()
            return last[side][which]

        return once

    sides = {OURS: timed(OURS, lambda: ours.run(new_tokens))}
    difference = None
    if setting.reference:
        ask = setting.reference.ask
        prompts = [prompt_of(example, setting.case) for example in make_examples(setting.case, rows)]
        inputs = write_inputs(setting.folder / f"{part}{rows}.npz", prompts, setting.case, labels=False)
        ask("generate_start", name=name, folder=str(setting.folder), batch=str(inputs), dtype=setting.dtype)
        out = setting.folder / f"{part}{rows}.npy"
        ask("logits", name=name, out=str(out))
        difference = setting.compare(f"{name}, logits", ours.logits(), np.load(out), "torch")
        sides["torch generate"] = timed("torch generate", lambda: ask("generate", name=name, new_tokens=new_tokens))
    seconds = interleaved(sides, setting.rounds, setting.say)
    if setting.reference:
        ask("stop", name=name)
        _same_tokens(setting, name, last[OURS]["tokens"], last["torch generate"]["tokens"])
    return Row(name=name, work=work, unit="tokens", seconds=seconds, difference=difference)


def _same_tokens(setting: Setting, name: str, ours: list, theirs: list) -> None:
    """Greedy answers are equal where rounding cannot turn them, in float32."""
    shapes = [np.shape(ours), np.shape(theirs)]
    if shapes[0] != shapes[1] or (setting.dtype == "float32" and ours != theirs):
        raise SidesDiffer(f"{name}: the answers of this library and of torch differ: {ours} and {theirs}")
