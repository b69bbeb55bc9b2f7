import contextlib
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lvlm_jax.data.collate import collate
from lvlm_jax.data.loader import Loader, fingerprint, measure_lengths
from lvlm_jax.data.packing import PackingPlan
from lvlm_jax.data.sources import LlavaJson
from lvlm_jax.processing.augment import augment
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.image import load_image, to_patches
from lvlm_jax.processing.schema import NEWLINE
from lvlm_jax.processing.tiles import Tiles

Q = 4


def plan_of(source, encoder, **sizes):
    lengths, pictures, _ = measure_lengths(source, encoder, progress=False)
    return PackingPlan(
        lengths, pictures, **({"seed": 1, "rows": 8, "length": 40, "groups": 4, "vision_rows": 5} | sizes)
    )


def make(album, encoder, spec, **options):
    source = LlavaJson(album)
    return Loader(source, encoder, spec, plan=plan_of(source, encoder), visual_tokens=Q, pad_id=0, **options)


def take(loader, start, count):
    with contextlib.closing(loader.iterate(start)) as batches:
        return list(itertools.islice(batches, count))


def fields(batch):
    found = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: array for name, array in found.items() if array is not None}


def same(a, b):
    return all(type(x) is np.ndarray and np.array_equal(x, y) for x, y in zip(fields(a).values(), fields(b).values()))


def joined(parts):
    """What the hosts hold together."""
    arrays = {name: np.concatenate([fields(p)[name] for p in parts]) for name in fields(parts[0])}
    return dataclasses.replace(parts[0], **arrays)


MOVES = functools.partial(augment, flip=True, shift=2)


# Two worker processes take seconds to start: one such case in the default run, the whole table in the slow one.
TABLE = [(hosts, workers) for workers in (0, 2) for hosts in (1, 2, 4)]


@pytest.mark.parametrize(
    ("hosts", "workers"), [pytest.param(*case, marks=[pytest.mark.slow] if case[1] else []) for case in TABLE]
)
def test_hosts_and_workers_give_the_same_global_batches(album, encoder, spec, hosts, workers):
    alone = make(album, encoder, spec, augment=MOVES)
    loaders = [make(album, encoder, spec, augment=MOVES, host=h, hosts=hosts, workers=workers) for h in range(hosts)]
    parts = [take(loader, 3, 7) for loader in loaders]
    assert alone.plan.epoch(9) > 1  # an epoch ends on the way
    for number, k in enumerate(range(3, 10)):
        assert {part[number][0] for part in parts} == {k}
        assert same(joined([part[number][1] for part in parts]), alone.build(k))


def test_a_host_with_workers_gives_its_share_of_the_global_batch(album, encoder, spec):
    alone = make(album, encoder, spec, augment=MOVES)
    for k, part in take(make(album, encoder, spec, augment=MOVES, host=1, hosts=2, workers=2), 2, 6):
        wanted = alone.build(k)
        share = {name: np.split(array, 2)[1] for name, array in fields(wanted).items()}
        assert same(part, dataclasses.replace(wanted, **share))


@pytest.mark.slow
def test_a_script_that_never_closes_its_workers_ends_quietly(album, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, script, album], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "(2, 40)\n"
    assert done.stderr == ""


SCRIPT = """
import functools, sys
from lvlm_jax.data.easy_vqa import word_tokenizer
from lvlm_jax.data.loader import Loader, measure_lengths
from lvlm_jax.data.packing import PackingPlan
from lvlm_jax.data.sources import LlavaJson
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import encode
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.tokenizer import Tokenizer

if __name__ == "__main__":
    source, tokenizer = LlavaJson(sys.argv[1]), Tokenizer(word_tokenizer())
    template = TEMPLATES["vicuna_v1"].with_system("")
    bound = functools.partial(encode, template=template, tokenizer=tokenizer, visual_tokens=4, image_token_id=4)
    lengths, pictures, _ = measure_lengths(source, bound, progress=False)
    plan = PackingPlan(lengths, pictures, seed=0, rows=2, length=40, vision_rows=5)
    spec = ImageSpec(size=16, patch=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    batches = Loader(source, bound, spec, plan=plan, visual_tokens=4, pad_id=0, workers=2).iterate()
    print(next(batches)[1].tokens.shape)
"""


def test_a_restart_goes_on_where_the_run_stopped(album, encoder, spec):
    loader = make(album, encoder, spec, threads=2)
    whole = take(loader, 0, 9)
    for (k, batch), (again, repeated) in zip(whole[5:], take(loader, 5, 4), strict=True):
        assert k == again
        assert same(batch, repeated)


def test_a_batch_holds_what_its_examples_say(album, encoder, spec):
    loader = make(album, encoder, spec)
    batch, rows = loader.build(0), loader.plan.batch(0)
    per_group = len(rows) // loader.plan.groups
    assert batch.patches.shape == (4, 5, spec.patches, spec.values)
    taken = np.zeros((4, 5), bool)
    for row, examples in enumerate(rows):
        at, group = 0, row // per_group
        for segment, index in enumerate(examples, start=1):
            encoded = encoder(loader.source[index])
            here = np.s_[row, at : at + len(encoded.tokens)]
            assert (batch.segments[here] == segment).all()
            assert (batch.positions[here] == np.arange(len(encoded.tokens))).all()
            assert (batch.tokens[here] == encoded.tokens).all()
            assert (batch.weights[here] == encoded.weights).all()
            assert ((batch.image_index[here] < 0) == (encoded.visual < 0)).all()
            for j, image in enumerate(encoded.images):
                flat = batch.image_index[here][encoded.visual // Q == j]
                slot = flat[0] // Q
                assert (flat == slot * Q + np.arange(Q)).all()
                patches, positions = to_patches(load_image(image.source), spec)
                assert (batch.patches[group, slot] == patches).all()
                assert (batch.patch_positions[group, slot] == positions).all()
                assert (batch.patch_segments[group, slot] == 1).all()
                assert not taken[group, slot]
                taken[group, slot] = True
            at += len(encoded.tokens)
        rest = np.s_[row, at:]
        assert not batch.segments[rest].any()
        assert not batch.weights[rest].any()
        assert (batch.image_index[rest] == -1).all()
    assert not batch.patch_segments[~taken].any()
    assert not batch.patches[~taken].any()


def test_examples_of_a_group_may_share_a_picture(album, encoder, spec):
    source = LlavaJson(album)
    index = next(i for i in range(len(source)) if len(source[i].images) == 1)
    one = encoder(source[index])
    sizes = dict(length=80, groups=2, vision_rows=1, visual_tokens=Q, pad_id=0, spec=spec)
    rows = [[one, one], [one], [one], []]
    shared = collate(rows, share=True, **sizes)
    assert [sorted(set(r[r >= 0].tolist())) for r in shared.image_index] == [[0, 1, 2, 3]] * 3 + [[]]
    assert (shared.patches[0] == shared.patches[1]).all()
    with pytest.raises(DataError, match=r"group 0 needs more than 1 vision rows .*; raise vision_rows"):
        collate(rows, **sizes)
    apart = collate(rows, **{**sizes, "vision_rows": 3})
    assert sorted(set(apart.image_index[0][apart.image_index[0] >= 0] // Q)) == [0, 1]
    assert set(apart.image_index[1][apart.image_index[1] >= 0] // Q) == {2}


@pytest.mark.parametrize("most", [None, 1])
def test_pictures_of_any_resolution_take_the_rows_they_need(album, encoder, spec, most):
    tiled = dataclasses.replace(spec, tiles=Tiles(pinpoints=((16, 32), (32, 16), (32, 32)), most=most))
    bound = functools.partial(encoder, spec=tiled)
    source = LlavaJson(album)
    lengths, rows, _ = measure_lengths(source, bound, progress=False)
    examples = [bound(source[index]) for index in range(len(source))]
    assert rows.tolist() == [encoded.vision_rows for encoded in examples]
    assert set(rows.tolist()) >= {0, 3, 6}  # none, a picture of three rows, two of them
    sizes = {"seed": 1, "rows": 8, "length": 80, "groups": 4, "vision_rows": 12}
    plan = PackingPlan(lengths, rows, **sizes)
    options = {"plan": plan, "visual_tokens": Q, "pad_id": 0, "augment": MOVES, "blend": most is not None}
    loader = Loader(source, bound, tiled, **options)
    halves = [Loader(source, bound, tiled, **options, host=h, hosts=2) for h in range(2)]
    for k in range(2):
        batch = loader.build(k)
        assert same(joined([half.build(k) for half in halves]), batch)
        assert (batch.blend_weight is not None) is bool(most)
        newlines = batch.image_index == 12 * Q  # one past the group's own tokens
        for row, packed in enumerate(plan.batch(k)):
            visual = np.concatenate([examples[i].visual for i in packed] or [[]])
            assert newlines[row].sum() == (visual == NEWLINE).sum()
            assert (batch.image_index[row] >= 0).sum() == (visual != -1).sum()
            tokens = batch.image_index[row][(batch.image_index[row] >= 0) & ~newlines[row]]
            assert len(np.unique(tokens)) == len(tokens)
            assert batch.patch_segments[row // 2].any(-1)[np.unique(tokens // Q).astype(int)].all()


def test_pictures_of_their_own_shape_leave_the_rest_of_their_row_empty(album, encoder, spec):
    """As SigLIP 2 is trained: pictures apart from the text, each in as many patches as it has."""
    shaped = dataclasses.replace(spec, fit="naflex", max_patches=6)
    bound = functools.partial(encoder, visual_tokens=0, spec=shaped)
    source = LlavaJson(album)
    one = next(bound(source[i]) for i in range(len(source)) if len(source[i].images) == 2)
    batch = collate([[one]], length=80, groups=1, vision_rows=3, visual_tokens=0, pad_id=0, spec=shaped)
    assert batch.patches.shape == (1, 3, 6, 192)
    for row, image in enumerate(one.images):
        patches, positions = to_patches(load_image(image.source), shaped)
        count = len(patches)
        assert 1 < count <= 6
        np.testing.assert_array_equal(batch.patches[0, row, :count], patches)
        np.testing.assert_array_equal(batch.patch_positions[0, row, :count], positions)
        assert batch.patch_segments[0, row].tolist() == [1] * count + [0] * (6 - count)
    assert not batch.patch_segments[0, 2].any()
    with pytest.raises(DataError, match=r"fit='naflex'\) have no fixed number of visual tokens.*use fit='squash'"):
        bound(source[next(i for i in range(len(source)) if source[i].images)], visual_tokens=Q)


def test_a_picture_that_changed_its_size_is_an_error(album, encoder, spec):
    tiled = dataclasses.replace(spec, tiles=Tiles(pinpoints=((16, 32), (32, 16), (32, 32))))
    source = LlavaJson(album)
    one = encoder(source[next(i for i in range(len(source)) if len(source[i].images) == 1)])  # without the tiles
    sizes = dict(length=80, groups=1, vision_rows=8, visual_tokens=Q, pad_id=0, spec=tiled)
    with pytest.raises(
        DataError, match=r"png: the picture takes \d vision row\(s\), but its positions were made for 1"
    ):
        collate([[one]], **sizes)


def test_collate_refuses_what_does_not_fit(album, encoder, spec):
    source = LlavaJson(album)
    one = encoder(source[next(i for i in range(len(source)) if source[i].images)])
    sizes = dict(length=80, groups=1, vision_rows=4, visual_tokens=Q, pad_id=0, spec=spec)
    with pytest.raises(DataError, match=r"row 0 has .* tokens or more but T is 5"):
        collate([[one]], **{**sizes, "length": 5})
    with pytest.raises(DataError, match=r"4 visual positions for a picture of 1 x 9 tokens"):
        collate([[one]], **{**sizes, "visual_tokens": 9})
    with pytest.raises(ValueError, match="1 rows do not divide into 2 groups"):
        collate([[one]], **{**sizes, "groups": 2})


def test_text_alone_has_empty_vision(encoder, tmp_path):
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "red"}]
    path = tmp_path / "t.jsonl"
    path.write_text((json.dumps({"conversations": turns}) + "\n") * 6)
    source = LlavaJson(path)
    plan = plan_of(source, encoder, vision_rows=0, rows=2, groups=2)
    batch = Loader(source, encoder, None, plan=plan, visual_tokens=0, pad_id=0).build(0)
    assert batch.patches.shape == (2, 0, 0, 0)
    assert (batch.image_index == -1).all()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_in_a_worker_names_the_record(album, encoder, spec, workers):
    loader = make(album, encoder, spec, workers=workers)
    source = loader.source
    index = next(i for i in (i for k in (1,) for row in loader.plan.batch(k) for i in row) if source[i].images)
    name = source[index].images[0].source
    with open(name, "wb") as file:
        file.write(b"<html>not found</html>")
    users = [source.origin(i) for i in range(len(source)) if name in {image.source for image in source[i].images}]
    with pytest.raises(ValueError) as caught, contextlib.closing(loader.iterate(1)) as batches:  # noqa: PT011
        next(batches)
    assert any(f"{origin}: " in str(caught.value) for origin in users)
    assert name in str(caught.value)


def test_bad_numbers_are_refused(album, encoder, spec):
    source = LlavaJson(album)
    plan = plan_of(source, encoder)
    rest = dict(plan=plan, visual_tokens=Q, pad_id=0)
    with pytest.raises(ValueError, match="4 groups do not divide among 3 hosts"):
        Loader(source, encoder, spec, hosts=3, **rest)
    with pytest.raises(ValueError, match="host 2 of 2"):
        Loader(source, encoder, spec, host=2, hosts=2, **rest)
    short = PackingPlan([5], [0], seed=0, rows=1, length=8)
    with pytest.raises(ValueError, match="1 lengths in the plan but 40 records; measure again"):
        Loader(source, encoder, spec, **{**rest, "plan": short})


def test_a_plan_made_for_another_template_is_noticed(album, encoder, spec):
    loader = make(album, encoder, spec)
    template = encoder.keywords["template"].with_system("what is the color")
    loader.encode = functools.partial(encoder, template=template)
    with pytest.raises(DataError, match=r"but the plan was made for .* measure again \(lvlm train --restart"):
        loader.build(0)


def test_lengths_are_measured_once_and_found_by_content(album, encoder, tmp_path, capsys):
    source, cache = LlavaJson(album), tmp_path / "cache"
    lengths, pictures, bad = measure_lengths(source, encoder, cache, progress=False)
    assert lengths.tolist() == [len(encoder(source[i]).tokens) for i in range(40)]
    assert pictures.tolist() == [len(source[i].images) for i in range(40)]
    assert bad == ()

    class Unread(LlavaJson):
        def __getitem__(self, index):
            raise AssertionError("read again")

    unread = Unread(album)
    Unread.__repr__ = lambda self: repr(source)
    assert (measure_lengths(unread, encoder, cache, progress=False).lengths == lengths).all()
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    assert (measure_lengths(source, encoder, cache, progress=False).lengths == lengths).all()
    assert f"{kept} is damaged" in capsys.readouterr().err
    assert kept.read_bytes() == whole
    other = functools.partial(encoder, template=encoder.keywords["template"].with_system("x"))
    assert fingerprint(source, encoder) == fingerprint(LlavaJson(album), functools.partial(encoder))
    assert fingerprint(source, encoder) != fingerprint(source, other)
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(ValueError, match="no repr that names its content"):
        fingerprint(source, functools.partial(encoder, template=object()))


def test_bad_records_are_raised_or_skipped_and_counted(album, encoder, spec, tmp_path):
    lines = album.read_text().splitlines()
    lines[3] = '{"id": '
    lines[5] = json.dumps({"conversations": [{"from": "human", "value": "hi"}]})
    album.write_text("\n".join(lines) + "\n")
    source = LlavaJson(album)
    lost = source[next(i for i in range(10, 40) if source[i].images)].images[0].source
    with open(lost, "wb") as file:
        file.write(b"")
    with pytest.raises(DataError, match=r"album\.jsonl:4: broken JSON .* on_bad='skip'"):
        measure_lengths(source, encoder, progress=False)
    for _ in range(2):  # measured, then read from the cache
        lengths, pictures, bad = measure_lengths(source, encoder, tmp_path / "c", progress=False, on_bad="skip")
        users = {i for i in range(40) if i not in (3, 5) and lost in {image.source for image in source[i].images}}
        assert {entry.index for entry in bad} == {3, 5} | users
        assert "no assistant turn" in next(str(entry) for entry in bad if entry.index == 5)
        assert not lengths[[3, 5]].any()
    plan = PackingPlan(lengths, pictures, seed=0, rows=8, length=40, groups=4, vision_rows=5)
    assert plan.stats().left_out == len(bad)
    loader = Loader(source, encoder, spec, plan=plan, visual_tokens=Q, pad_id=0)
    assert len(take(loader, 0, 6)) == 6
    with pytest.raises(ValueError, match="valid: 'raise', 'skip'"):
        measure_lengths(source, encoder, on_bad="ignore")


@pytest.mark.parametrize(("by", "power"), [("sqrt", 0.5), ("example", 1.0)])
def test_examples_are_weighed_before_they_are_packed(album, encoder, spec, by, power):
    plain, weighed = (make(album, encoder, spec, weigh_by=name).build(2) for name in ("token", by))
    assert weighed.segments.max() > 1  # several in a row
    for row, segments in enumerate(plain.segments):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            own = plain.weights[row, here]
            np.testing.assert_allclose(weighed.weights[row, here], own / own.sum() ** power, rtol=1e-6)


def test_how_examples_are_packed_does_not_change_their_weighed_loss(album, encoder, spec):
    """sum_i sum_t w l / sum w is the same for the same examples, packed or one a row."""
    source = LlavaJson(album)
    losses = []
    for rows in (1, 40):
        plan = plan_of(source, encoder, rows=rows, length=2000, groups=1, vision_rows=60, pack=rows == 1)
        batch = Loader(source, encoder, spec, plan=plan, visual_tokens=Q, pad_id=0, weigh_by="sqrt").build(0)
        assert batch.segments.max() == 40 // rows
        each = 1 + batch.tokens % 7  # any number that belongs to the token
        losses.append(float((batch.weights * each).sum() / batch.weights.sum()))
    np.testing.assert_allclose(*losses, rtol=1e-5)
