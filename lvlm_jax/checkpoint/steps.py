"""The numbered checkpoints of a stage: written in the background, checked whole before one is restored."""

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from lvlm_jax import params as trees
from lvlm_jax.checkpoint import manifest
from lvlm_jax.checkpoint.layout import card_of, read, to_disk
from lvlm_jax.checkpoint.manifest import ARRAYS, MANIFEST, CheckpointError, cleared, is_saved, located
from lvlm_jax.errors import Ended
from lvlm_jax.hosts import agree


class SaveFailed(CheckpointError, Ended):
    """A checkpoint could not be written; says why, and which step is still good."""


class Checkpoints:
    """The numbered checkpoints of one stage, written in the background, the newest `keep` of them.

    save: returns when the arrays are off the device. latest: the newest complete step, or None. restore: into the
    structure, layout and shardings of `like`. check, wait: raise what went wrong in the background; wait blocks.
    recipe: digest of what the run was asked, kept in each manifest; a checkpoint of another one is not restored.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2, recipe: str = "") -> None:
        self.folder = located(folder)
        self.keep = keep
        self.recipe = recipe
        self._begun = False
        self._damaged: set[int] = set()
        self._saver: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, resume: bool = True) -> int:
        """Makes the folder, emptied unless `resume`, and returns the newest complete step, 0 if there is none.

        From now on the folder's absence is an error: where a disk was unmounted nothing may be written in its place.
        """
        if not resume:
            self.clear()
        elif jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._begun = True
        return self.latest() or 0

    def save(self, step: int, tree: Any) -> None:
        """Starts to write `tree` (any pytree of arrays) as this step; an older one of the same number is replaced."""
        import orbax.checkpoint as ocp

        self.wait()
        if not self._begun:
            self.begin()
        if self._saver is None:
            self._saver = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        flat = to_disk(tree)
        with self._named(step):
            cleared(self.folder / str(step), parents=False)
            self._saver.save(self.folder / str(step) / ARRAYS, args=ocp.args.PyTreeSave(trees.unflatten(flat)))
        leaves = {path: card_of(leaf) for path, leaf in flat.items()}
        self._thread = threading.Thread(target=self._finish, args=(step, leaves), name=f"checkpoint-{step}")
        self._thread.start()

    def _finish(self, step: int, leaves: dict) -> None:
        try:
            with self._named(step):
                self._saver.wait_until_finished()
                if jax.process_index() == 0:
                    manifest.write(self.folder / str(step), leaves, step=step, recipe=self.recipe)
                    self._damaged.discard(step)
            if jax.process_index() == 0:
                self._prune()
        except BaseException as error:
            self._error = error

    @contextlib.contextmanager
    def _named(self, step: int) -> Iterator[None]:
        """An error inside says what could not be saved, why, and what is still good."""
        try:
            yield
        except Exception as error:
            why = manifest.reason(error)
            with contextlib.suppress(OSError):
                if not self.folder.exists():
                    why = "the folder is gone; was it removed, or its disk unmounted?"
            raise SaveFailed(f"saving to {self.folder / str(step)} failed: {why}; {self._good()}") from error

    def _good(self) -> str:
        try:
            steps = self.steps()
        except OSError:
            steps = []
        return f"the last good step is {steps[-1]} in {self.folder}" if steps else "no complete step is there"

    def check(self) -> None:
        """Raises what went wrong in a save that has ended; does not wait for one under way."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Blocks until the save under way is complete on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def steps(self) -> list[int]:
        """Complete steps, ascending; not those that were cut off (they have no manifest) or were found damaged."""
        return [step for step in self._numbers() if step not in self._damaged and is_saved(self.folder / str(step))]

    def _numbers(self) -> list[int]:
        names = [entry.name for entry in self.folder.iterdir()] if self.folder.exists() else []
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> int | None:
        """The newest complete step, the same on every host."""
        self.wait()
        step = agree(max(self.steps(), default=-1))
        return None if step < 0 else step

    def restore(self, step: int | None = None, *, like: Any) -> Any:
        """The tree of a step. Without `step`: the newest whose files are whole, with a warning for each passed over.

        like: pytree of arrays or of `jax.ShapeDtypeStruct` with shardings (none: the first device).

        Raises:
          CheckpointError: no such step; damaged files; another recipe's; another tree, with the paths on both sides.
        """
        if step is not None:
            return self._read(step, like, verify=True)
        while (newest := self.latest()) is not None:
            folder = self.folder / str(newest)
            if not (damage := manifest.damage(folder, newest)):
                return self._read(newest, like, verify=False)
            warnings.warn(f"{folder} is damaged ({damage}); falling back to the checkpoint before it", stacklevel=2)
            self._damaged.add(newest)
        bad = f"; damaged: {sorted(self._damaged)}" if self._damaged else ""
        raise CheckpointError(f"{self.folder} holds no complete checkpoint{bad}")

    def _read(self, step: int, like: Any, verify: bool) -> Any:
        folder = self.folder / str(step)
        found = manifest.load(folder)
        theirs = found.get("recipe", "")
        if theirs and self.recipe and theirs != self.recipe:
            raise CheckpointError(
                f"{folder} was written by a run of another recipe: digest {theirs[:12]}, this run's is "
                f"{self.recipe[:12]}. Give another --workdir, or --restart to throw that run away"
            )
        if other := manifest.other_versions(found):
            warnings.warn(f"{folder} was written by {other}: what comes may differ in its last bits", stacklevel=3)
        return read(folder, like, verify=verify)

    def clear(self) -> None:
        """Deletes every checkpoint: a run that starts anew must not resume from the one before it."""
        self.wait()
        self._damaged.clear()
        cleared(self.folder)

    def _prune(self) -> None:
        """Deletes what is older than the steps to keep, cut-off ones too."""
        kept = self.steps()[-self.keep :]
        for step in self._numbers():
            if not kept or step >= kept[0]:
                continue
            folder = self.folder / str(step)
            try:
                (folder / MANIFEST).unlink(missing_ok=True)  # first: a half-deleted step is not taken for a whole one
                folder.rmtree()
            except OSError as error:
                warnings.warn(f"{folder} is no longer needed but cannot be deleted: {error}", stacklevel=2)
