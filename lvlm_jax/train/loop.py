"""The loop: restore, step, hooks, save. It knows files and signals; the step it calls is pure."""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from lvlm_jax import mesh as meshes
from lvlm_jax import params as trees
from lvlm_jax.checkpoint import Checkpoints, damage, fingerprints, is_saved, load_params, save_params, to_disk
from lvlm_jax.checkpoint import saved_fingerprints as saved_prints
from lvlm_jax.errors import Diverged
from lvlm_jax.hosts import Watchdog
from lvlm_jax.nn import lora
from lvlm_jax.shapes import DTypeLike
from lvlm_jax.train.feed import Batches, Feed
from lvlm_jax.train.log import Log
from lvlm_jax.train.observe import Trace, memory
from lvlm_jax.train.program import Program
from lvlm_jax.train.stages import Stage, in_stage_dtype, trained_share
from lvlm_jax.train.step import LossFn, TrainState

Hook = Callable[[int, TrainState, dict], None]
"""hook(steps done, state, metrics of the last step): decides by the step number; must not keep the state."""


class IndexedBatches:
    """Batches from a function of the batch's number."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def iterate(self, start: int) -> Iterator[tuple[int, Any]]:
        """(k, make(k)) from k = start on."""
        return ((k, self.make(k)) for k in itertools.count(start))


class Preempted(SystemExit):
    """A signal asked the run to stop; everything is saved. Leaves the process with exit code 0."""

    def __init__(self, message: str) -> None:
        super().__init__(0)
        self.message = message


@contextlib.contextmanager
def stops_cleanly(folder: str | os.PathLike) -> Iterator[None]:
    """SIGTERM outside of a stage's steps (records are read, answers are scored) ends the run with status 0 too.

    Within the steps `fit` has a handler of its own, which saves first.
    """

    def stop(number: int, frame: Any) -> None:
        text = f"SIGTERM: what is finished is saved in {folder}; run the same command to resume"
        print(text, file=sys.stderr, flush=True)
        raise Preempted(text)

    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield
        return
    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old or signal.SIG_DFL)


def fit(
    stage: Stage,
    *,
    loss_fn: LossFn,
    params: Mapping,
    batches: Batches,
    workdir: str | os.PathLike,
    mesh: jax.sharding.Mesh | None = None,
    axes: Any = None,
    hooks: Sequence[Hook] = (),
    evaluate: Callable[[dict, int], dict[str, float]] | None = None,
    resume: bool = True,
    earlier: Iterable[str | os.PathLike] = (),
    frozen_dtype: DTypeLike | None = None,
    flops: float | None = None,
    writers: Sequence[str] = (),
    hang: float = 0.0,
    recipe: str = "",
    key: jax.Array | None = None,
) -> dict:
    """Runs one stage in ``workdir/<stage.name>`` and returns the parameters after it.

    The same call resumes an interrupted run exactly; a finished stage returns its parameters at once. The arrays of
    `params` stay valid: trained leaves are copied, frozen ones come back as the originals.

    Args:
      loss_fn: (params, batch) -> (loss_sum, weight_sum, dict of sums); with a `key`, (params, batch, key).
      mesh, axes: where to run (`lvlm_jax.mesh`) and the logical axis names of each leaf; None for one device.
      evaluate: called every `stage.eval_every` steps with (params, step); its numbers go to the log.
      earlier: folders of stages that ran before: frozen leaves that stand there are not stored again.
      frozen_dtype: dtype in which frozen leaves run; default by device (`mesh.compute_dtype`).
      flops: model FLOPs of one step, for MFU. writers: "tensorboard", "wandb".
      hang: seconds without a finished step after which the process ends (`hosts.Watchdog`); 0: never.
      recipe: digest of what the run was asked, kept in each checkpoint; those of another one are refused.
      key: of a loss that draws; see `step.make_train_step`.

    Raises:
      Diverged: `stage.spike.patience` skipped updates in a row.
      Preempted: SIGTERM or SIGINT came; the step was finished and saved.
      OutOfMemory: on a device; ``memory.prof`` in the stage's folder says what fills it.
      CheckpointError: a save failed (at the next step, since they are written in the background), nothing whole is
        there to resume from, or it is of another recipe or tree.
    """
    began, folder = time.perf_counter(), os.path.join(os.fspath(workdir), stage.name)
    saved = Checkpoints(os.path.join(folder, "checkpoints"), keep=stage.keep, recipe=recipe)
    start = saved.begin(resume)
    run = _Run(stage, loss_fn, params, mesh, axes, folder, tuple(earlier), frozen_dtype, bool(start), key)
    del params  # kernels that run in few bits leave the device, unless the caller holds them
    state = saved.restore(like=run.program.state) if start else run.fresh()
    start = int(state.step)  # an earlier one where the newest was damaged
    if start == stage.steps and is_saved(os.path.join(folder, "params")):
        return run.whole(state)
    log = Log(folder, stage=stage, start=start, trained=run.share, flops=flops, writers=writers, began=began)
    if start:
        log.note(f"{stage.name}: resuming after step {start} of {stage.steps} from {saved.folder}")
    if log.again:
        log.note(f"{stage.name}: steps {start + 1} to {log.again} had not been saved, and run again")
    watch, trace = _Watch(stage, folder, log), Trace(stage.profile, folder)
    with (
        _closing(log, saved, trace),
        meshes.use(mesh),
        memory(folder),
        Feed(batches, start, stage.steps, run.place) as feed,
        _Signals() as signals,
        Watchdog(hang, f"{stage.name}: no step was finished within {hang:.0f} s; where it stands:") as watchdog,
    ):
        due = _Due(stage, run, saved, log, watchdog, evaluate)
        trace(start)
        for step in range(start + 1, stage.steps + 1):
            saved.check()
            batch, waited = feed.get()
            state, metrics = run.program.step(state, run.frozen, batch)
            feed.busy = metrics["loss"]
            watch(step, metrics, saved)
            watchdog.heard()
            for hook in (log, *hooks):
                hook(step, state, metrics | {"data_wait": waited})
            trace(step, metrics)
            due(step, state, metrics, signals.stop(step))
        watch.last(saved)
    return run.finish(state)


@contextlib.contextmanager
def _closing(log: Log, saved: Checkpoints, trace: Trace) -> Iterator[None]:
    """Whatever ends the steps, what is being written is written to its end."""
    try:
        yield
    except Preempted as stopped:
        log.note(stopped.message)
        raise
    finally:
        trace.close()
        try:
            saved.wait()
        finally:
            log.close()


class _Due:
    """What follows a step by its number: a save, an evaluation; and the end of a run that is asked to stop."""

    def __init__(self, stage, run, saved, log, watchdog, evaluate) -> None:
        self.stage, self.run, self.saved, self.log = stage, run, saved, log
        self.watchdog, self.evaluate = watchdog, evaluate

    def __call__(self, step: int, state: TrainState, metrics: dict, stop: str) -> None:
        """stop: why to stop after this step, "" to go on."""
        stage, saved, run = self.stage, self.saved, self.run
        saves = stop or step == stage.steps or _every(stage.save_every, step)
        scores = self.evaluate is not None and _every(stage.eval_every, step)
        if saves or scores:
            jax.block_until_ready(metrics["loss"])  # while the watchdog listens
        with self.log.off_clock(), self.watchdog.asleep():
            if saves:
                saved.save(step, state)
            if scores:
                self.log.row(step, self.evaluate(trees.merge(run.result(state), run.frozen), step))
        if stop and step < stage.steps:
            saved.wait()
            raise Preempted(
                f"{stop}: saved step {step} of {stage.name!r} in {saved.folder}; run the same command to resume"
            )


def _every(steps: int, step: int) -> bool:
    """Whether it is due at this step; every 0 steps is never."""
    return bool(steps) and step % steps == 0


class _Run:
    """A stage's program, and its parameters placed on the devices."""

    def __init__(self, stage, loss_fn, params, mesh, axes, folder, earlier, frozen_dtype, resumed, key) -> None:
        self.folder, self.earlier, self.mesh, self.average = folder, earlier, mesh, stage.average
        mask = stage.mask(params)
        self.share = trained_share(params, mask)[-1].percent / 100
        trained, self.originals = trees.split(params, mask)
        self.originals = self._stored(self.originals, resumed)
        if frozen_dtype is None:
            frozen_dtype = meshes.compute_dtype()[0]
        trained, frozen = trees.split(in_stage_dtype(trees.merge(trained, self.originals), mask, frozen_dtype), mask)
        self.trained = trained
        if stage.lora and stage.lora.base:
            frozen = lora.quantized(frozen, lora.split(trained)[1], stage.lora.base)
            # Memory is saved only if the full weights leave the device; they wait on the host for the stage's end.
            self.originals = self.originals if jax.process_count() > 1 else jax.device_get(self.originals)
        self.program = Program(stage, loss_fn, trained, frozen, mesh, axes, key)
        self.frozen = jax.device_put(frozen, self.program.frozen)

    def fresh(self) -> TrainState:
        """The first state."""
        return self.program.fresh(self.trained)

    def _stored(self, frozen: dict, resumed: bool) -> dict:
        """The frozen leaves, saved once; on resume those that were saved, should the given ones differ."""
        store = os.path.join(self.folder, "frozen")
        if not frozen:
            return frozen
        if not (resumed and is_saved(store)):
            save_params(store, frozen, elsewhere=self._known())
            return frozen
        if fingerprints(to_disk(frozen)) == saved_prints(store):
            if what := damage(store):
                print(f"{store} is damaged ({what}) and is written again from the weights given", file=sys.stderr)
                save_params(store, frozen, elsewhere=self._known())
            return frozen
        print(f"the frozen weights given are not those of this run: reading {store}", file=sys.stderr)
        return load_params(store, like=frozen)

    def _known(self) -> list[str]:
        return [os.path.join(os.fspath(f), name) for f in self.earlier for name in ("frozen", "params")]

    def place(self, batch: Any) -> Any:
        """A host batch on the devices, its leading axis over the data axes of the mesh."""
        rows = self.program.batch
        if self.mesh is None:
            return jax.device_put(batch, rows)
        ways = meshes.data_shards(self.mesh)
        for leaf in jax.tree.leaves(batch):
            if leaf.shape[0] * jax.process_count() % ways:
                raise ValueError(
                    f"a batch with a leading axis of {leaf.shape[0]} does not divide over {ways} data shards of the "
                    f"mesh: choose rows and groups that are multiples of {ways}"
                )
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(rows, leaf), batch)

    def result(self, state: TrainState) -> dict:
        """The trained leaves that the stage hands on: the last ones, or their average."""
        return state.smooth if self.average and self.average.use else state.trained

    def whole(self, state: TrainState) -> dict:
        """All parameters after the stage: trained leaves from the state, frozen ones as they were given."""
        return trees.merge(self.result(state), self.originals)

    def finish(self, state: TrainState) -> dict:
        """Writes and returns all parameters."""
        params = self.whole(state)
        known = [os.path.join(self.folder, "frozen"), *self._known()]
        if self.average and not self.average.use:  # before the params, whose presence says that the stage is done
            average = trees.merge(state.smooth, self.originals)
            save_params(os.path.join(self.folder, "average"), average, elsewhere=known)
        save_params(os.path.join(self.folder, "params"), params, elsewhere=known)
        return params


class _Watch:
    """Names each skipped update, one step late so that the device never waits for it; stops a run that diverged."""

    def __init__(self, stage: Stage, folder: str, log: Log) -> None:
        self.stage, self.folder, self.log = stage, folder, log
        self.before: tuple | None = None

    def __call__(self, step: int, metrics: dict, saved: Checkpoints) -> None:
        self.last(saved)
        self.before = step, {name: metrics[name] for name in ("skip", "streak", "loss", "grad_norm")}

    def last(self, saved: Checkpoints) -> None:
        """Looks at the step before."""
        if self.before is None:
            return
        step, values = self.before[0], jax.device_get(self.before[1])
        if not values["skip"]:
            return
        streak, what = int(values["streak"]), f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
        self.log.note(f"step {step}: update skipped ({what}); batch {step - 1}; {streak} in a row")
        if streak < self.stage.spike.patience:
            return
        report = {
            "batches": list(range(step - streak, step)),
            "last_good_step": step - streak,
            "last_checkpoint": saved.latest(),
        }
        path = os.path.join(self.folder, "diverged.json")
        if jax.process_index() == 0:
            from etils import epath

            epath.Path(path).write_text(json.dumps(report))
        raise Diverged(
            f"{streak} updates in a row were skipped, batches {report['batches'][0]} to {step - 1} ({what}). The last "
            f"good step is {report['last_good_step']}, the last checkpoint {report['last_checkpoint']}; see {path}. "
            "Look at these batches, lower the learning rate, or lengthen the warm-up"
        )


class _Signals:
    """Turns SIGTERM and a first SIGINT into a request to stop after the step; a second SIGINT interrupts as usual.

    With several processes JAX's own preemption service, which takes SIGTERM, decides at which step all of them stop;
    a first SIGINT is handed to it as one.
    """

    def __enter__(self) -> "_Signals":
        self._came = ""
        self._old: dict = {}
        if threading.current_thread() is threading.main_thread():
            ours = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
            self._old = {number: signal.signal(number, self._catch) for number in ours}
        return self

    def _catch(self, number: int, frame: Any) -> None:
        self._came = signal.Signals(number).name
        signal.signal(number, self._old[number] or signal.SIG_DFL)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(self, step: int) -> str:
        """Why to stop now, '' to go on."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return "preemption" if multihost_utils.reached_preemption_sync_point(step) else ""
        return self._came

    def __exit__(self, *exc: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old or signal.SIG_DFL)
