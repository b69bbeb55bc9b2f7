import jax
import jax.numpy as jnp
import pytest

from lvlm_jax.errors import OutOfMemory
from lvlm_jax.train.loop import IndexedBatches, fit
from lvlm_jax.train.observe import Trace
from tests.train import tiny


def _fit(folder, loss_fn=tiny.loss_fn, **changes):
    stage = tiny.stage(**({"steps": 6} | changes))
    fit(stage, loss_fn=loss_fn, params=tiny.params(), batches=IndexedBatches(tiny.batch), workdir=folder)


@pytest.mark.parametrize("profile", [(1, 2), (3, 4), (6, 6)])
def test_a_trace_of_some_steps(tmp_path, profile):
    _fit(tmp_path, profile=profile)
    traces = list((tmp_path / "align" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000


def test_which_steps_are_traced(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, profiler_options: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    for begin in (0, 4, 5):  # as if resumed there
        trace = Trace((4, 5), tmp_path)
        trace(begin)
        for step in range(begin + 1, 8):
            seen.append(step)
            trace(step)
        seen.append("end")
    assert seen == [1, 2, 3, "start", 4, 5, "stop", 6, 7, "end", "start", 5, "stop", 6, 7, "end", 6, 7, "end"]


def test_no_trace_unless_asked(tmp_path):
    _fit(tmp_path)
    assert not (tmp_path / "align" / "profile").exists()


def test_profile_says_what_it_takes(tmp_path):
    for profile in ((3,), (0, 2), (5, 7)):
        with pytest.raises(ValueError, match=r"stages.align.profile=\(.*\): the first and the last step"):
            _fit(tmp_path, profile=profile)


def test_out_of_memory_says_what_fills_it(tmp_path):
    def too_much(params, batch):
        loss, weight, sums = tiny.loss_fn(params, batch)
        # 4 TiB. Not a sort: on Python 3.13's newest jaxlib XLA divides by zero as it compiles one of this size.
        wide = jnp.sin(jax.lax.broadcasted_iota(jnp.float32, (1 << 20, 1 << 20), 1) * loss)
        return loss + (wide @ wide)[0, 0] + jnp.cumsum(wide, 0)[5, 5], weight, sums

    with pytest.raises(OutOfMemory, match=r"memory\.prof.*accumulate") as error:
        _fit(tmp_path, loss_fn=too_much)
    assert "Out of memory allocating" in str(error.value)
    assert (tmp_path / "align" / "memory.prof").stat().st_size > 100
