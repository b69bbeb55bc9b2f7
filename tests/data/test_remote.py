"""Every source from a bucket: etils and fsspec as in a run, the bucket in memory."""

import io
import json
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lvlm_jax.data.check import check
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.image import ImageError, load_image
from lvlm_jax.recipe import Data

from .conftest import png

TALK = [{"from": "human", "value": "<image>what is the shape?"}, {"from": "gpt", "value": "circle"}]
FLAMINGO = {"text_list": ["red circle"], "image_info": []}


class Bucket(MemoryFileSystem):
    """s3:// in memory."""

    protocol = ("s3",)
    store = {}  # noqa: RUF012 (as in the class above it)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3:/"))


@pytest.fixture(scope="module")
def bucket():
    fsspec.register_implementation("s3", Bucket, clobber=True)
    files = fsspec.filesystem("s3")

    def put(name, data):
        with files.open(f"s3://data/{name}", "wb") as out:
            out.write(data)

    put("p/a.png", png())
    put("train.jsonl", json.dumps({"image": "a.png", "conversations": TALK}).encode())
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [png()] * 2, "conversations": [TALK] * 2}), table)
    put("train.parquet", table.getvalue())
    for n in range(2):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for name, data in (("k.png", png()), ("k.txt", b"red circle"), ("k.json", json.dumps(FLAMINGO).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        put(f"s-{n}.tar", packed.getvalue())
    put("mmc4.jsonl", json.dumps(FLAMINGO).encode())
    put("mix.yaml", json.dumps({"datasets": [{"json_path": "train.jsonl"}]}).encode())
    return "s3://data"


SOURCES = {
    "llava_json": ({"path": "train.jsonl", "images": "p"}, 1),
    "llava_yaml": ({"path": "mix.yaml", "images": "p"}, 1),
    "parquet": ({"path": "train.parquet"}, 2),
    "webdataset": ({"path": "s-{0..1}.tar"}, 2),
    "mmc4": ({"path": "mmc4.jsonl"}, 1),
    "mmc4_tar": ({"path": "s-*.tar"}, 2),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_is_read_from_a_bucket(bucket, kind, tmp_path):
    fields, count = SOURCES[kind]
    data = Data(source=kind, **{name: f"{bucket}/{value}" for name, value in fields.items()})
    assert data.absent() == []
    source = data.open(cache=tmp_path)
    assert len(source) == count
    example = source[count - 1]
    assert example.origin.startswith(f"{bucket}/")
    assert all(load_image(image).size == (8, 8) for image in example.images)
    assert repr(data.open(cache=tmp_path)) == repr(source)


def test_the_report_decodes_pictures_of_a_bucket(bucket, encoder):
    source = Data(source="llava_json", path=f"{bucket}/train.jsonl", images=f"{bucket}/p").open()
    report = check(source, encoder, progress=False)
    assert report.ok
    assert report.pictures.tolist() == [1]


def test_what_is_not_in_the_bucket(bucket):
    with pytest.raises(DataError, match=r"s3://data/gone\.jsonl does not exist"):
        Data(source="llava_json", path=f"{bucket}/gone.jsonl").open()
    with pytest.raises(ImageError, match=r"s3://data/p/gone\.png: the file does not exist; check the path"):
        load_image(f"{bucket}/p/gone.png")
    with pytest.raises(ImageError, match="leads outside the image folder"):
        load_image(f"{bucket}/p/a.png", root="pictures")
    with pytest.raises(ImageError, match="is an address, and nothing is fetched here"):
        load_image("https://data/p/a.png")
