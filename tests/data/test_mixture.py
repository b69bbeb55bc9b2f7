import collections
import contextlib
import dataclasses
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvlm_jax import config as configs
from lvlm_jax.config import ConfigError, build
from lvlm_jax.data.lengths import measure_lengths
from lvlm_jax.data.loader import Loader
from lvlm_jax.data.mixture import LlavaYaml, Mixture, Part, sampled
from lvlm_jax.data.packing import PackingPlan, Shares
from lvlm_jax.data.sources import LlavaJson, Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.recipe import Data

from .conftest import Q, png
from .test_tars import shard


def test_which_records_take_part():
    assert sampled(10, "all").tolist() == list(range(10))
    assert sampled(10, "first:3").tolist() == [0, 1, 2]
    assert sampled(10, "end:30%").tolist() == [7, 8, 9]
    assert sampled(15, "first:10%").tolist() == [0, 1]  # rounded up, as LLaVA-NeXT does
    chosen = sampled(1000, "random:10%")
    assert len(set(chosen.tolist())) == 100
    assert chosen.tolist() == sorted(chosen.tolist()) == sampled(1000, "random:100").tolist()
    assert 350 < chosen.mean() < 650


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("some", r"members\.x\.sample='some': write all, first:N, end:N or random:N, N a count or a share like 10%"),
        ("first:11", "asks for 11 of 10 records"),
        ("random:0", "asks for 0 of 10 records"),
    ],
)
def test_a_sample_that_means_nothing(sample, message):
    with pytest.raises(DataError, match=message):
        sampled(10, sample, "x")


def test_numbers_run_from_part_to_part(album):
    source = LlavaJson(album)
    mixed = Mixture({"a": Part(source, "first:3"), "b": Part(source, "end:2")})
    assert isinstance(mixed, Source)
    assert [mixed[i].id for i in range(len(mixed))] == ["0", "1", "2", "38", "39"]
    assert mixed.origin(3) == source.origin(38)
    assert mixed.shares is None
    assert repr(mixed) != repr(Mixture({"a": Part(source, "first:3"), "b": Part(source, "first:2")}))
    weighed = Mixture({"a": Part(source, "first:3", 2.0), "b": Part(source, "end:2", 1.0)})
    assert repr(weighed) == repr(mixed)  # measured lengths serve both
    assert weighed.shares == Shares(sizes=(3, 2), weights=(2.0, 1.0))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, None), r"members\.b\.weight=None: give every member a weight, or none"),
        ((1.0, 0.0), r"members\.b\.weight=0\.0 must be above 0"),
    ],
)
def test_weights_that_mean_nothing(album, weights, message):
    source = LlavaJson(album)
    with pytest.raises(DataError, match=message):
        Mixture({name: Part(source, weight=weight) for name, weight in zip("ab", weights, strict=True)})


def test_shares_are_kept_and_every_record_comes_before_any_comes_again():
    shares = Shares(sizes=(100, 7), weights=(1.0, 3.0))
    used = np.delete(np.arange(107), [3, 105])
    drawn = np.concatenate([shares.draw(used, 5, epoch) for epoch in range(4)])
    assert len(drawn) == 4 * 105
    assert abs((drawn < 100).mean() - 0.25) < 0.01
    assert sorted(drawn[drawn < 100][:99].tolist()) == used[:99].tolist()
    few = drawn[drawn >= 100]
    assert all(set(few[n : n + 6]) == {100, 101, 102, 103, 104, 106} for n in range(0, len(few) - 6, 6))
    assert shares.draw(used, 5, 3).tolist() == drawn[-105:].tolist()  # nothing that came before is needed
    assert shares.draw(used, 6, 3).tolist() != drawn[-105:].tolist()
    with pytest.raises(ValueError, match=r"part 1 of the mixture has no record that can be used"):
        shares.draw(np.arange(100), 5, 0)


def test_a_plan_draws_by_shares():
    lengths, pictures = np.full(110, 10), np.ones(110, int)
    shares = Shares(sizes=(100, 10), weights=(1.0, 1.0))
    plan = PackingPlan(lengths, pictures, seed=1, rows=4, length=40, groups=2, vision_rows=8, shares=shares)
    assert plan.stats().examples == 110
    rows = [row for k in range(200) for row in plan.batch(k)]
    drawn = collections.Counter(i < 100 for row in rows for i in row)
    assert abs(drawn[True] / drawn.total() - 0.5) < 0.01
    again = PackingPlan(lengths, pictures, seed=1, rows=4, length=40, groups=2, vision_rows=8, shares=shares)
    assert again.batch(150) == plan.batch(150)
    with pytest.raises(ValueError, match="shares are of 110 examples, but there are 109 lengths"):
        PackingPlan(lengths[1:], pictures[1:], seed=1, rows=4, length=40, vision_rows=8, shares=shares)


def mixture(album):
    source = LlavaJson(album)
    return Mixture({"a": Part(source, "first:25", 1.0), "b": Part(source, "random:25%", 2.0)})


def loader(album, encoder, spec, **options):
    source = mixture(album)
    measured = measure_lengths(source, encoder, progress=False)
    sizes = {"rows": 8, "length": 40, "groups": 4, "vision_rows": 5}
    plan = PackingPlan(measured.lengths, measured.pictures, seed=1, shares=source.shares, **sizes)
    return Loader(source, encoder, spec, plan=plan, visual_tokens=Q, pad_id=0, **options)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_in_the_middle_on_other_hosts_and_workers_the_batches_are_the_same(album, encoder, spec, workers):
    alone = loader(album, encoder, spec)
    start = 9
    assert alone.plan.epoch(start) > 1
    parts = []
    for host in range(2):
        with contextlib.closing(loader(album, encoder, spec, host=host, hosts=2, workers=workers).iterate(start)) as it:
            parts.append(list(itertools.islice(it, 4)))
    for number in range(4):
        wanted = alone.build(start + number)
        for field in dataclasses.fields(wanted):
            if getattr(wanted, field.name) is None:  # of models of other kinds
                continue
            halves = [getattr(part[number][1], field.name) for part in parts]
            np.testing.assert_array_equal(np.concatenate(halves), getattr(wanted, field.name))


def test_a_recipe_names_members_and_overrides_reach_them(album, tmp_path):
    files = {"source": "llava_json", "path": str(album)}
    values = {"source": "mixture", "members": {"a": {**files, "weight": 1.0}, "b": {**files, "weight": 3.0}}}
    data = build(Data, values, "config.data")
    opened = data.open()
    assert len(opened) == 80
    assert opened.shares.weights == (1.0, 3.0)
    assert data.absent() == []
    gone = build(Data, {"source": "mixture", "members": {"a": {**files, "path": "no.json"}}}, "config.data")
    assert gone.absent() == ["members.a.path='no.json' does not exist; check the path"]
    with pytest.raises(ConfigError, match=r"config\.data\.members\.a: source='llava' .*: choose one of"):
        build(Data, {"source": "mixture", "members": {"a": {"source": "llava"}}}, "config.data")
    with pytest.raises(ConfigError, match="members: mixture needs it; give its members"):
        Data(source="mixture")
    with pytest.raises(
        ConfigError, match=r"members=.* is not read by source='llava_json', whose fields are path, images"
    ):
        build(Data, {**values, **files}, "config.data")
    recipe = tmp_path / "mixed.py"
    recipe.write_text(RECIPE.format(album=album))
    from lvlm_jax.recipe import load

    words = ["--config.stages.align.data.members.vqa.weight=4.0", "--config.stages.align.data.members.vqa.sample=end:3"]
    member = load(str(recipe), words).stages["align"].data.members["vqa"]
    assert (member.weight, member.sample) == (4.0, "end:3")
    assert configs.to_dict(load(str(recipe)))["stages"]["align"]["data"]["members"]["vqa"]["path"] == str(album)


RECIPE = """
'''A mixture.'''
from lvlm_jax.config import load


def get_config(arg=""):
    c = load("quickstart").unlock()
    c.stages.align.data = {{
        "source": "mixture", "rows": 8, "groups": 8, "pictures": 80, "length": 128,
        "members": {{"vqa": {{"source": "llava_json", "path": "{album}"}}, "easy": {{"source": "easy_vqa"}}}},
    }}
    return c
"""


def test_documents_among_conversations_are_written_down_as_documents(album, tmp_path):
    from lvlm_jax import assemble
    from lvlm_jax.recipe import load

    (tmp_path / "d.jsonl").write_text(json.dumps({"text_list": ["red circle", "blue"], "image_info": []}) + "\n")
    talk = {"source": "llava_json", "path": str(album), "sample": "first:1"}
    members = {"docs": {"source": "mmc4", "path": str(tmp_path / "d.jsonl")}, "talk": talk}
    data = build(Data, {"source": "mixture", "members": members, "length": 256}, "config.data")
    assert data.member_templates == ("document",)
    model = load("quickstart").model
    tokenizer = assemble.tokenizer_of(model)
    encoder = assemble.encoder_of(model, tokenizer, data)
    mixed = data.open()
    assert [mixed[i].template for i in range(2)] == ["document", ""]
    written = [tokenizer.decode(encoder(mixed[i]).tokens, skip_special=False) for i in range(2)]
    assert "USER:" not in written[0]
    assert "USER:" in written[1]
    assert encoder(mixed[0]).weights[1:].all()
    measured = measure_lengths(mixed, encoder, tmp_path / "cache", progress=False)
    assert measured.lengths[0] == len(encoder(mixed[0]).tokens)
    with pytest.raises(DataError, match="template 'document' is not among vicuna_v1"):
        assemble.encoder_of(model, tokenizer, Data(source="easy_vqa"))(mixed[0])
    captions = build(Data, {"source": "mixture", "members": {"a": {**talk, "template": "plain"}}}, "config.data")
    assert captions.member_templates == ("plain",)
    with pytest.raises(ConfigError, match=r"members\.a: template='plan': choose one of"):
        build(Data, {"source": "mixture", "members": {"a": {**talk, "template": "plan"}}}, "config.data")
    alone = Data(source="mmc4", path=str(tmp_path / "d.jsonl"))
    assert assemble.encoder_of(model, tokenizer, alone).keywords["template"].name == "document"


def test_a_stage_reads_a_table_and_shards_with_weights(tmp_path, capsys):
    from lvlm_jax import assemble
    from lvlm_jax.recipe import load

    talk = [{"from": "human", "value": "<image>what is the shape?"}, {"from": "gpt", "value": "circle"}]
    pq.write_table(pa.table({"image": [png()] * 30, "conversations": [talk] * 30}), tmp_path / "t.parquet")
    members = []
    for n in range(20):
        score = {"similarity": 0.1 if n < 5 else 0.5}
        members += [(f"{n:03d}.png", png()), (f"{n:03d}.txt", "red circle"), (f"{n:03d}.json", score)]
    shard(tmp_path / "s.tar", members)
    pairs = {"source": "webdataset", "path": str(tmp_path / "s.tar"), "score": "similarity", "min_score": 0.3}
    parts = {
        "table": {"source": "parquet", "path": str(tmp_path / "t.parquet"), "weight": 1.0},
        "pairs": {**pairs, "weight": 3.0, "template": "plain"},
    }
    sizes = {"rows": 4, "groups": 2, "length": 128, "pictures": 24, "weigh_by": "example", "on_bad": "skip"}
    data = build(Data, {"source": "mixture", "members": parts, **sizes}, "config.data")
    recipe = load("quickstart")
    stage = dataclasses.replace(recipe.stages["instruct"], data=data)
    loader = assemble.loader_of(recipe, stage, assemble.tokenizer_of(recipe.model), cache=tmp_path / "cache")
    assert "5 records below min_score (pairs) left out of" in capsys.readouterr().err
    batches = [loader.build(k) for k in range(6)]
    drawn = collections.Counter(i < 30 for k in range(60) for row in loader.plan.batch(k) for i in row)
    assert abs(drawn[True] / drawn.total() - 0.25) < 0.02
    for batch in batches:
        examples = sum(len(set(row[row > 0].tolist())) for row in batch.segments)
        assert batch.weights.sum() == pytest.approx(examples, rel=1e-5)
        assert (batch.patch_segments.max(-1) > 0).sum() == examples


def test_a_yaml_of_llava_next(album, tmp_path):
    listed = [{"json_path": album.name, "sampling_strategy": "first:2"}, {"json_path": str(album)}]
    (tmp_path / "mix.yaml").write_text(json.dumps({"datasets": listed}))
    source = LlavaYaml(tmp_path / "mix.yaml")
    assert len(source) == 42
    assert [source[i].id for i in (0, 1, 2)] == ["0", "1", "0"]
    assert Data(source="llava_yaml", path=str(tmp_path / "mix.yaml")).open()[41].id == "39"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [", r"mix\.yaml: broken YAML"),
        ("data: []", r"mix\.yaml: no list 'datasets'; write datasets:"),
        ("datasets: [{json: x}]", r"mix\.yaml: datasets\[0\] must hold json_path and sampling_strategy, and only them"),
    ],
)
def test_a_yaml_that_is_none(tmp_path, text, message):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        LlavaYaml(tmp_path / "mix.yaml")
