"""The training step: the program that ``lvlm train`` runs, against eager torch and, if asked for, torch.compile."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from lvlm_jax import assemble
from lvlm_jax import mesh as meshes
from lvlm_jax import params as trees
from lvlm_jax.bench.case import PAD, Case, make_examples, write_inputs
from lvlm_jax.bench.reference import ReferenceFailed
from lvlm_jax.bench.rounds import OURS, Row, clocked, interleaved
from lvlm_jax.bench.setting import Setting
from lvlm_jax.data.collate import collate
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.recipe import Data, Model, Recipe, StageRecipe
from lvlm_jax.train.optim import OptimizerConfig
from lvlm_jax.train.program import Program
from lvlm_jax.train.stages import in_stage_dtype

STAGES: dict[str, tuple[str, ...]] = {
    "all trained": ("vision/**", "connector/**", "llm/**"),
    "vision frozen": ("connector/**", "llm/**"),
}
"""What moves in each stage that is measured."""
# Small enough that the sign of a gradient near zero, which Adam's first step follows, does not drive the sides apart.
_OPTIMIZER = OptimizerConfig(learning_rate=1e-5, schedule="constant", clip=1.0)
_STEPS = 1_000_000


def recipe_of(case: Case, rows: int, dtype: str) -> Recipe:
    """The measured stages as a recipe, for what `lvlm train` reads off one."""
    config = case.config
    model = Model(
        vision=config.vision,
        connector={"kind": "mlp", **dataclasses.asdict(config.connector)},
        llm=config.llm,
        image=case.spec,
        tokenizer="easy_vqa",  # named, never opened: rows are made of numbers
        image_token_id=case.image_id,
    )
    data = Data(source="easy_vqa", rows=rows, length=case.length, pictures=rows, groups=rows)
    stages = {
        name: StageRecipe(trains=trains, steps=_STEPS, optimizer=_OPTIMIZER, data=data)
        for name, trains in STAGES.items()
    }
    return Recipe(name="bench", model=model, stages=stages, run=(), dtype=dtype, export=False)


class _Ours:
    """A stage's program with its state; called, it runs a step and gives its seconds."""

    def __init__(self, recipe: Recipe, name: str, folder: Path, batch: Any) -> None:
        stage = recipe.stages[name]
        self.mesh = meshes.make_mesh(recipe.mesh) if jax.device_count() > 1 else None
        model, _ = assemble.stage_model(recipe, stage)
        _, axes = assemble.stage_shapes(recipe, stage)
        params = import_folder(folder, mesh=self.mesh, scan=model.scan).params
        mask = stage.stage("bench").mask(params)
        self.flops = assemble.flops_of(recipe, stage, params)
        trained, frozen = trees.split(in_stage_dtype(params, mask, assemble.dtype_of(recipe)), mask)
        loss_fn = assemble.loss_of(stage, model, assemble.trains_head(mask), self.mesh)
        self.program = Program(stage.stage("bench"), loss_fn, trained, frozen, self.mesh, axes)
        self.state = self.program.fresh(trained)
        self.frozen = jax.device_put(frozen, self.program.frozen)
        self.batch = jax.device_put(batch, self.program.batch)
        self.losses: list[float] = []

    def __call__(self) -> float:
        with meshes.use(self.mesh):
            seconds = clocked(self._step)
        self.losses.append(float(self.loss))
        return seconds

    def _step(self) -> None:
        self.state, metrics = self.program.step(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, metrics))
        self.loss = metrics["loss"]


class _Theirs:
    """The same step on the torch side."""

    def __init__(self, setting: Setting, name: str, inputs: Path, frozen: list[str], compiled: bool) -> None:
        self.setting, self.name, self.losses = setting, f"{name}, {'compiled' if compiled else 'eager'}", []
        config = _OPTIMIZER
        optimizer = {"lr": config.learning_rate, "betas": [config.b1, config.b2], "eps": config.eps}
        optimizer |= {"weight_decay": config.weight_decay, "clip": config.clip}
        setting.reference.ask(
            "train_start",
            name=self.name,
            folder=str(setting.folder),
            batch=str(inputs),
            frozen=frozen,
            optimizer=optimizer,
            dtype=setting.dtype,
            compiled=compiled,
        )

    def __call__(self) -> float:
        answer = self.setting.reference.ask("train", name=self.name)
        self.losses.append(answer["loss"])
        return answer["seconds"]

    def stop(self) -> None:
        self.setting.reference.ask("stop", name=self.name)


def _compiled(setting: Setting, name: str, inputs: Path, frozen: list[str]) -> _Theirs | None:
    """torch.compile's step; None, and a word about it, where it cannot (no C++ compiler, an interpreter too new)."""
    try:
        return _Theirs(setting, name, inputs, frozen, compiled=True)
    except ReferenceFailed as error:
        setting.say(f"train, {name}: torch.compile is left out: {str(error).splitlines()[0]}")
        return None


def measure(setting: Setting) -> Iterator[Row]:
    """One row a stage. Losses are compared step by step, as both sides learn the same rows."""
    case, rows = setting.case, setting.rows
    examples = make_examples(case, rows)
    inputs = write_inputs(setting.folder / "train.npz", examples, case, labels=True)
    recipe = recipe_of(case, rows, setting.dtype)
    batch = collate(
        [[example] for example in examples],
        length=case.length,
        groups=rows,
        vision_rows=1,
        visual_tokens=case.config.visual_tokens,
        pad_id=PAD,
        spec=case.spec,
    )
    for name in STAGES:
        frozen = ["model.vision_tower."] if name == "vision frozen" else []
        ours, others = _Ours(recipe, name, setting.folder, batch), {}
        if setting.reference:
            others["torch eager"] = _Theirs(setting, name, inputs, frozen, compiled=False)
            if setting.compiled and (compiled := _compiled(setting, name, inputs, frozen)):
                others["torch.compile"] = compiled
        setting.say(f"train, {name}")
        sides: Mapping[str, Callable[[], float]] = {OURS: ours, **others}
        seconds = interleaved(sides, setting.rounds, setting.say)
        what = f"train, {name}, losses"
        found = [setting.compare(what, ours.losses, one.losses, side) for side, one in others.items()]
        for one in others.values():
            one.stop()
        yield Row(
            name=f"train, {name}",
            work=rows * case.length,
            unit="tokens",
            seconds=seconds,
            flops=ours.flops,
            difference=max(found, default=None),
        )
