import pickle
import threading

import numpy as np
import pytest

from lvlm_jax.data.packing import PackingPlan


def llava_like(n, seed=0, text_only=0.06):
    rng = np.random.default_rng(seed)
    pictures = (rng.random(n) >= text_only).astype(int)
    return np.clip(rng.lognormal(5, 0.8, n).astype(int) + 10, 12, 1400) + 576 * pictures, pictures


def epoch_rows(plan, groups_of_epoch, epoch=0):
    """All rows of one epoch, read through `batch`."""
    first = sum(groups_of_epoch[:epoch]) * plan.rows_per_group
    last = first + groups_of_epoch[epoch] * plan.rows_per_group
    rows = [row for k in range(first // plan.rows, -(-last // plan.rows)) for row in plan.batch(k)]
    return rows[first % plan.rows :][: last - first]


SIZES = [
    dict(rows=16, length=2048, groups=4, vision_rows=12),
    dict(rows=16, length=2048, groups=16, vision_rows=2),  # pictures are scarce
    dict(rows=12, length=4096, groups=1, vision_rows=100),
    dict(rows=8, length=2048, groups=2, vision_rows=4, pack=False),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_every_example_once_an_epoch_within_both_limits(sizes):
    lengths, pictures = llava_like(1500)
    plan = PackingPlan(lengths, pictures, seed=3, window=400, **sizes)
    plan.batch(400)
    groups = np.diff(plan._starts).tolist()
    assert len(groups) >= 2
    for epoch in range(2):
        rows = epoch_rows(plan, groups, epoch)
        assert sorted(i for row in rows for i in row) == list(range(1500))
    for k in range(40):
        rows = plan.batch(k)
        assert len(rows) == sizes["rows"]
        assert all(lengths[list(row)].sum() <= sizes["length"] for row in rows if row)
        for start in range(0, len(rows), plan.rows_per_group):
            group = [i for row in rows[start : start + plan.rows_per_group] for i in row]
            assert pictures[group].sum() <= sizes["vision_rows"]


def test_batch_k_is_a_function_of_seed_and_k():
    lengths, pictures = llava_like(600)
    make = lambda seed: PackingPlan(lengths, pictures, seed=seed, rows=8, length=2048, groups=2, vision_rows=12)  # noqa: E731
    forward = make(1)
    wanted = [forward.batch(k) for k in range(120)]  # several epochs
    assert forward.epoch(119) > 3
    fresh = make(1)
    assert fresh.batch(119) == wanted[119]
    assert [fresh.batch(k) for k in (0, 60, 7, 118, 1)] == [wanted[k] for k in (0, 60, 7, 118, 1)]
    assert pickle.loads(pickle.dumps(fresh)).batch(33) == wanted[33]
    assert make(2).batch(0) != wanted[0]
    epochs = [[row for row in wanted[k] if row] for k in range(120)]
    assert epochs[0] != epochs[int(forward.stats().batches_per_epoch) + 1]
    found = {}
    threads = [threading.Thread(target=lambda k=k: found.update({k: forward.batch(k)})) for k in range(119, 0, -9)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(found[k] == wanted[k] for k in found)


def naive_best_fit_decreasing(lengths, room):
    rows = []
    for size in sorted(lengths, reverse=True):
        fitting = [i for i, used in enumerate(rows) if used + size <= room]
        if fitting:
            rows[max(fitting, key=lambda i: rows[i])] += size
        else:
            rows.append(size)
    return len(rows)


@pytest.mark.parametrize("text_only", [0.06, 0.5])
def test_fill_is_that_of_best_fit_decreasing(text_only):
    lengths, pictures = llava_like(2000, text_only=text_only)
    bound = naive_best_fit_decreasing(lengths.tolist(), 2048)
    whole = PackingPlan(lengths, pictures, seed=0, rows=8, length=2048, groups=8, vision_rows=3)
    assert whole.stats().rows <= bound + 8
    windows = PackingPlan(lengths, pictures, seed=0, rows=8, length=2048, groups=2, vision_rows=12, window=256)
    assert windows.stats().rows <= bound * 1.02
    alone = PackingPlan(lengths, pictures, seed=0, rows=8, length=2048, groups=2, vision_rows=12, pack=False)
    assert alone.stats().text_fill < whole.stats().text_fill / 2
    assert whole.stats().vision_fill == pytest.approx(pictures.sum() / (whole.stats().rows * 3))
    assert f"{whole.stats().text_fill:.1%}" in str(whole.stats())


def test_rows_with_few_pictures_lend_room_to_rows_with_many():
    # Four examples fill a row each; one needs five of the group's six picture slots.
    lengths, pictures = [100] * 4, [5, 1, 0, 0]
    plan = PackingPlan(lengths, pictures, seed=0, rows=4, length=100, groups=1, vision_rows=6)
    assert sorted(i for row in plan.batch(0) for i in row) == [0, 1, 2, 3]
    # Two such examples cannot share a group, so the plan gives each a group of its own.
    plan = PackingPlan([100] * 4, [5, 5, 0, 0], seed=0, rows=4, length=100, groups=2, vision_rows=6)
    rows = plan.batch(0)
    assert sorted(i for row in rows for i in row) == [0, 1, 2, 3]
    assert sum(i in (0, 1) for row in rows[:2] for i in row) == 1


def test_text_alone_needs_no_picture_slots():
    plan = PackingPlan([5, 6, 7, 3], [0] * 4, seed=0, rows=2, length=12, vision_rows=0)
    assert plan.stats().vision_fill == 0
    assert sorted(i for row in plan.batch(0) for i in row) == [0, 1, 2, 3]


def test_without_packing_rows_follow_the_permutation_and_without_seed_the_source():
    plan = PackingPlan(np.full(10, 5), np.zeros(10), seed=None, rows=4, length=8, groups=2, pack=False)
    assert [row for k in range(3) for row in plan.batch(k)] == [(i,) for i in range(10)] + [(0,), (1,)]
    assert plan.stats().batches_per_epoch == 2.5
    shuffled = PackingPlan(np.full(10, 5), np.zeros(10), seed=4, rows=5, length=8, pack=False)
    order = np.random.default_rng([4, 0]).permutation(10)
    assert [row[0] for k in range(2) for row in shuffled.batch(k)] == order.tolist()


def test_length_zero_leaves_an_example_out():
    plan = PackingPlan([4, 0, 4, 0], [1, 9, 1, 0], seed=0, rows=2, length=4, vision_rows=2)
    assert sorted(i for k in range(3) for row in plan.batch(k) for i in row) == [0, 0, 0, 2, 2, 2]
    assert plan.stats().left_out == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lengths=[4, 30, 5]), "example 1 has 30 tokens but a row holds 16; raise the row length to at least 30"),
        (
            dict(pictures=[0, 0, 3]),
            "has 3 pictures, tiles or frames but a group holds 2; raise vision_rows to at least 3",
        ),
        (dict(groups=3), "4 rows do not divide into 3 groups"),
        (dict(lengths=[0, 0, 0]), "no example to plan"),
        (dict(pictures=[0]), "must be two equal lists"),
        (dict(length=0), "length is 0; it must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    sizes = dict(lengths=[4, 6, 5], pictures=[1, 0, 1], seed=0, rows=4, length=16, groups=2, vision_rows=2) | change
    with pytest.raises(ValueError, match=message):
        PackingPlan(sizes.pop("lengths"), sizes.pop("pictures"), **sizes)


def test_no_batch_before_the_first():
    with pytest.raises(ValueError, match="numbered from 0"):
        PackingPlan([4], [0], seed=0, rows=1, length=4).batch(-1)
