"""Runs a recipe: its stages in order, evaluations between, export and report at the end.

The workdir holds everything: the resolved recipe, one folder a stage, ``evaluation/<when>/``, ``export/`` and
``report.html``. The same command resumes wherever it was stopped.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from lvlm_jax import assemble, checkpoint, compilation, hosts, starts
from lvlm_jax import mesh as meshes
from lvlm_jax import params as trees
from lvlm_jax import recipe as recipes
from lvlm_jax import workdir as workdirs
from lvlm_jax.api import EXPORT, export_line
from lvlm_jax.config import ConfigError, convert, to_dict
from lvlm_jax.data.files import write_whole
from lvlm_jax.data.loader import LateLoader, Loader
from lvlm_jax.evaluate import drawings
from lvlm_jax.evaluate import run as evaluations
from lvlm_jax.hub.convert import export_folder
from lvlm_jax.infer.beam import Beams
from lvlm_jax.infer.interleaved import InterleavedSystem
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.infer.system import System
from lvlm_jax.kinds import KINDS, Asking, Kind
from lvlm_jax.nn import lora
from lvlm_jax.nn.linear import abstract, init
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.recipe import Data, Evaluation, Recipe, StageRecipe
from lvlm_jax.report import training
from lvlm_jax.train.log import curve
from lvlm_jax.train.loop import fit, stops_cleanly
from lvlm_jax.train.stages import Share, share_text, trained_share

EVALUATION = "evaluation"
"""Folder of the workdir with one folder a time that the model was scored."""
CACHE = "cache"
"""Folder of the workdir with what reading the records found."""


def train(recipe: Recipe, workdir: str | os.PathLike, resume: bool = True, keep_compiled: bool = False) -> dict:
    """Runs all stages of a recipe in `workdir`; returns the final parameters. The same call resumes.

    keep_compiled: keep compiled programs in the workdir for the next start, a setting of the whole process.

    Raises:
      ConfigError: the workdir belongs to another recipe or another process, or something to read is not there.
      DataError: a bad record, before any weight is made.
    """
    meshes.default_devices()  # a backend that cannot start is said first
    if hosts.several():
        hosts.compare(hosts.facts(recipe=to_dict(recipe), workdir=os.fspath(workdir), resume=resume))
    run = Run(recipe, workdir)
    with stops_cleanly(run.folder):
        run.written(resume)  # a wrong workdir is said before anything is looked for or fetched
        ahead = run.ahead(resume)
        with run.claim(resume):
            if keep_compiled:
                compilation.keep(run.folder / CACHE / "compiled")
            _say(describe(recipe))
            run.prepare(ahead)
            params: dict = {}
            for name in recipe.run:
                params = run.stage(name, resume)
            run.finish(params)
    return params


def describe(recipe: Recipe) -> str:
    """What a run will do, with the share of the weights that each stage trains: what ``--dry-run`` prints."""
    devices = meshes.default_devices()
    lines = [
        f"recipe {recipe.name}: mesh {recipe.mesh} on {len(devices)} {devices[0].device_kind} device(s)",
        assemble.dtype_line(recipe),
    ]
    for name in recipe.run:
        stage = recipe.stages[name]
        sources = ", ".join(f"{part} from {start.origin}" for part, start in stage.start.items())
        begins = f"; {sources}" if sources else ""
        lines.append(f"\nstage {name}: {stage.steps:,} steps of {stage.data.rows} rows x {stage.data.length}{begins}")
        lines.append(share_text(share_of(recipe, name)))
    return "\n".join(lines)


def share_of(recipe: Recipe, name: str) -> list[Share]:
    """What one stage trains of each part, and last of the whole; nothing is computed but shapes."""
    stage = recipe.stages[name]
    shapes, _ = assemble.stage_shapes(recipe, stage)
    return trained_share(shapes, stage.stage(name).mask(shapes))


class Run:
    """One recipe in one workdir: what its stages share."""

    def __init__(self, recipe: Recipe, workdir: str | os.PathLike) -> None:
        if "://" in os.fspath(workdir):
            raise ConfigError(f"--workdir={workdir}: give a folder; mount a bucket (gcsfuse) and give its path")
        self.recipe, self.folder = recipe, Path(workdir)
        self.mesh = recipe.make_mesh() if jax.device_count() > 1 else None
        self.loaders: dict[str, Loader] = {}
        self.results: list[dict] = []
        self.samples: list[dict] = []
        self.questions: list | None = None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the recipe; fetched when it is first asked for."""
        return assemble.tokenizer_of(self.recipe.model)

    def ahead(self, resume: bool) -> list[str]:
        """The stages that are still to run. Raises ConfigError where something that they read is not there."""
        done = lambda name: resume and checkpoint.is_saved(self.folder / name / "params")  # noqa: E731
        ahead = [name for name in self.recipe.run if not done(name)]
        if gone := assemble.absent(self.recipe, ahead):
            raise ConfigError("; ".join(gone))
        for name in ahead:  # a later stage, too, before the first one runs
            stage, shards = self.recipe.stages[name], meshes.data_shards(self.mesh)
            stage.data.check_divides(f"stages.{name}.data", shards, stage.accumulate)
        _ = self.tokenizer  # fetched before anything is written
        return ahead

    def prepare(self, stages: Sequence[str]) -> None:
        """Reads and measures the records of all stages to come, so that a bad one is found before a weight is made."""
        for name in stages:
            self.loaders[name] = self.loader(name)
        if any(self.recipe.stages[name].evaluate or self.recipe.stages[name].eval_every for name in stages):
            self.asked()

    def asked(self) -> list:
        """What the evaluation asks, read once."""
        if self.questions is None:
            self.questions = assemble.asked(self.recipe.evaluation, self.folder / CACHE)
        return self.questions

    @contextlib.contextmanager
    def claim(self, resume: bool) -> Iterator[None]:
        """Holds the workdir; no second process trains in it meanwhile."""
        if jax.process_index() != 0:
            self._claim(resume)
            yield
            return
        import filelock

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        try:
            with lock:
                self._claim(resume)
                yield
        except filelock.Timeout:
            raise ConfigError(f"{self.folder}: another process trains in this workdir; wait, or give another") from None

    def written(self, resume: bool) -> dict | None:
        """The recipe in the workdir, if any. Raises ConfigError where a run of another one has begun there."""
        if not resume or not (self.folder / workdirs.RECIPE).exists():
            return None
        theirs, mine = workdirs.recipe_of(self.folder), to_dict(self.recipe)
        if any((self.folder / name).exists() for name in (EVALUATION, *theirs["run"], *mine["run"])):
            with contextlib.suppress(ConfigError):  # fields that did not exist when it was written: their defaults
                theirs = to_dict(recipes.resolve(theirs))
            workdirs.check_same(self.folder, theirs, mine)
        return theirs

    def _claim(self, resume: bool) -> None:
        """Writes the resolved recipe into the workdir, or makes sure that the one there is the same.

        A recipe whose first stage never began (its data were bad, a path was wrong) claims nothing: it may be mended.
        Without `resume` all that the run before left goes, now: what a kill left of it would be taken up later.
        """
        file, mine = self.folder / workdirs.RECIPE, to_dict(self.recipe)
        theirs = self.written(resume)
        hosts.agree(0)  # all have read it before it is written again
        if jax.process_index() == 0:
            for stale in () if resume or not file.exists() else (EVALUATION, EXPORT, *self.recipe.stages):
                shutil.rmtree(self.folder / stale, ignore_errors=True)
            if not resume:  # pictures may have been mended; the indices of shards know when their file changed
                for measured in (self.folder / CACHE).glob("lengths-*"):
                    measured.unlink()
            self.folder.mkdir(parents=True, exist_ok=True)
            if theirs != mine:
                write_whole(epath.Path(file), json.dumps(mine, indent=1).encode())
        hosts.agree(0)
        workdirs.find(self.folder)

    def stage(self, name: str, resume: bool) -> dict:
        """Runs one stage (or takes up its result) with the evaluations around it."""
        recipe, stage = self.recipe, self.recipe.stages[name]
        model, batch = assemble.stage_model(recipe, stage)
        shapes, axes = assemble.stage_shapes(recipe, stage)
        params = self.start(name, stage, model, batch)
        if stage.lora:
            where = None if self.mesh is None else meshes.shardings(self.mesh, axes, shapes)
            params = lora.add(params, lora.split(axes)[0], stage.lora, self.key(name, 1), where)
        mask = stage.stage(name).mask(params)
        share = trained_share(params, mask)[-1]
        done = "; done before" if resume and checkpoint.is_saved(self.folder / name / "params") else ""
        _say(f"\nstage {name}: trains {share.trained:,} of {share.total:,} weights, {share.percent:.2f}%{done}")
        kind = KINDS[stage.loss]
        if "before" in stage.evaluate:
            self.evaluate(f"before {name}", params, kind)
        work = assemble.flops_of(recipe, stage, params)
        handed = [params]  # no reference of ours stays, so that what runs in few bits need not stand whole beside it
        del params
        params = fit(
            stage.stage(name),
            loss_fn=assemble.loss_of(stage, model, assemble.trains_head(mask), self.mesh),
            params=handed.pop(),
            batches=LateLoader(lambda: self.loaders.pop(name, None) or self.loader(name)),
            workdir=self.folder,
            mesh=self.mesh,
            axes=axes,
            evaluate=(lambda p, step: self.evaluate(f"{name} step {step}", p, kind)) if stage.eval_every else None,
            resume=resume,
            frozen_dtype=assemble.frozen_dtype(recipe, stage),
            earlier=[self.folder / before for before in recipe.run[: recipe.run.index(name)]],
            flops=work,
            writers=recipe.log_to,
            hang=recipe.hang,
            recipe=workdirs.digest(recipe),
            key=self.key(name, 3) if kind.draws else None,
        )
        if "after" in stage.evaluate:
            self.evaluate(f"after {name}", params, kind)
        return params

    def start(self, name: str, stage: StageRecipe, model: Any, batch: Any) -> dict:
        """The parameters a stage begins with: random, then each part from where the recipe says."""
        shapes, axes = abstract(model, batch)
        if self.mesh is not None:
            where = meshes.shardings(self.mesh, axes, shapes)
            shapes = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, where)
        like = trees.flatten(shapes)
        leaves = starts.leaves(self.recipe, self.folder, f"stages.{name}.start", stage.start, like, self.mesh)
        given = dict(leaves)  # nothing that a start names is begun anew
        if missing := set(like) - set(leaves):
            fresh = lambda key: _some(trees.flatten(init(model, key, batch)), missing)  # noqa: E731
            cut = None if self.mesh is None else {path: like[path].sharding for path in missing}
            with meshes.use(self.mesh):
                leaves |= jax.jit(fresh, out_shardings=cut)(self.key(name))
        params, begin = trees.unflatten({path: leaves[path] for path in like}), KINDS[stage.loss].begin
        if begin is None or checkpoint.is_saved(self.folder / name / "params"):
            return params
        batch = lambda: self.loader(name, whole=True).build(0)  # noqa: E731
        begun = begin(self.recipe, stage, model, params, batch, self.key(name, 2))
        return trees.unflatten(trees.flatten(begun) | given)

    def key(self, name: str, more: int | None = None) -> jax.Array:
        """The random key of a stage's fresh weights, or of what else is drawn for it."""
        key = jax.random.fold_in(jax.random.key(self.recipe.seed), self.recipe.run.index(name))
        return key if more is None else jax.random.fold_in(key, more)

    def loader(self, name: str, whole: bool = False) -> Loader:
        """The batches of a stage; its records are read and measured here, or were before."""
        stage = self.recipe.stages[name]
        return assemble.loader_of(self.recipe, stage, self.tokenizer, cache=self.folder / CACHE, whole=whole)

    def evaluate(self, when: str, params: dict, kind: Kind) -> dict[str, float]:
        """Scores the model; what stands in the workdir already is not generated again."""
        folder, ask = self.folder / EVALUATION / when.replace(" ", "_"), self.recipe.evaluation
        result = evaluations.load(folder)
        if result is None:
            asking = Asking(
                samples=self.asked(),
                tokenizer=self.tokenizer,
                dtype=assemble.dtype_of(self.recipe),
                mesh=self.mesh,
                out=folder if jax.process_index() == 0 else None,
            )
            result = kind.evaluate(self.recipe, lora.merge(params), asking)
        floor, count = assemble.floor_of(ask), len(result.samples)
        self.results.append({"when": when, "scores": result.scores, "floor": floor, "count": count})
        self.samples = result.samples
        beside = f"   (question-only floor {floor:.2%})" if floor is not None else ""
        _say(_score_line(when, result) + beside)
        return result.scores

    def finish(self, params: dict) -> None:
        """Export, report, and the line to try next."""
        recipe, out = self.recipe, self.folder / EXPORT
        if jax.process_index() != 0:
            return
        if recipe.report:
            page = self.folder / "report.html"
            stages = [stage_rows(recipe, self.folder, name) for name in recipe.run]
            if recipe.beside:
                stages = [stage | {"beside": curve(recipe.beside, stage["name"])} for stage in stages]
            shown = json.dumps(to_dict(recipe), indent=1)
            training.write(page, f"lvlm_jax: {recipe.name}", shown, stages, self.results, training.chosen(self.samples))
            print(f"\nreport: {page}")
        if not recipe.export:
            return
        here = jax.process_count() == 1
        if not here and all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
            params, here = jax.tree.map(np.asarray, params), True  # what follows is this process's alone
        if not here:  # no host holds all weights, but each can read them
            print(f"trained and saved; lvlm eval, chat and generate need, on one host: {export_line(self.folder)}")
            return
        kind = KINDS[recipe.stages[recipe.run[-1]].loss]
        if not (out / "config.json").exists():
            whole = lora.merge(params)
            export_folder(out, params=whole, tokenizer=self.tokenizer, overwrite=out.exists(), **kind.exported(recipe))
        print(f"model:  {out}\ntry:    {kind.hint(out, self.samples)}")


def _some(parts: dict, names: set[str]) -> dict:
    return {name: part for name, part in parts.items() if name in names}


def _say(text: str) -> None:
    """Prints a line, once for all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


SCORED = {InterleavedSystem: drawings.evaluate}
"""What asks and scores a kind of system; all others `evaluate.run.evaluate`."""


def evaluate_folder(
    folder: str,
    system: System | InterleavedSystem,
    *,
    data: Data | None = None,
    scores: tuple[str, ...] = (),
    max_new_tokens: int | None = None,
    sampling: Sampling | Beams | None = None,
    rows: int | None = None,
    limit: int = 0,
    out: str | None = None,
) -> str:
    """``lvlm eval``: the scores as text, with those that a run of ``lvlm train`` in this folder found on its way.

    Args:
      folder: what `system` was loaded from; a workdir brings its recipe's evaluation as the default.
      out: folder for samples and summary; default ``evaluation/lvlm_eval`` in `folder` (of a hub name: here).
    """
    ask, lines = None, []
    samples = Path(out) if out else (Path(folder) if Path(folder).is_dir() else Path()) / EVALUATION / "lvlm_eval"
    if (Path(folder) / workdirs.RECIPE).exists():
        ask = convert(Evaluation | None, workdirs.recipe_of(folder)["evaluation"], "evaluation")
        for kept in sorted((Path(folder) / EVALUATION).glob("*/summary.json"), key=lambda file: file.stat().st_mtime):
            if kept.parent != samples:
                lines.append(_score_line(kept.parent.name.replace("_", " "), evaluations.load(kept.parent)))
    if data is None and ask is None:
        raise ConfigError("what to score it on? Give --llava, --messages, --source KIND with --path, or --easy-vqa")
    ask = Evaluation(data=data) if data is not None else ask
    ask = dataclasses.replace(ask, rows=rows or ask.rows, limit=limit or ask.limit, scores=scores or ask.scores)
    if ask.temperature and sampling in (None, Sampling()):
        sampling = Sampling(temperature=ask.temperature)
    result = SCORED.get(type(system), evaluations.evaluate)(
        system,
        assemble.asked(ask),
        scores=ask.scores,
        batch_rows=ask.rows,
        max_new_tokens=max_new_tokens or ask.max_new_tokens,
        sampling=sampling,
        out=samples,
        data=ask.data.label,
    )
    floor = assemble.floor_of(ask)
    lines.append(_score_line("now", result) + (f"   question-only floor {floor:.2%}" if floor is not None else ""))
    return "\n".join([*lines, f"samples: {samples / evaluations.SAMPLES}"])


def _score_line(when: str, result: Any) -> str:
    shown = ", ".join(f"{name} {training.score_text(name, value)}" for name, value in result.scores.items())
    data = result.summary.get("data")
    return f"{when}: {shown} of {len(result.samples):,}" + (f" ({data})" if data else "")


def stage_rows(recipe: Recipe, folder: Path, name: str) -> dict:
    """What the report draws of a stage, from its metrics.jsonl."""
    stage = recipe.stages[name]
    shapes, _ = assemble.stage_shapes(recipe, stage)
    share = trained_share(shapes, stage.stage(name).mask(shapes))[-1]
    return {
        "name": name,
        "trained_params": share.trained,
        "total_params": share.total,
        "rows": curve(folder, name)["rows"],
    }
