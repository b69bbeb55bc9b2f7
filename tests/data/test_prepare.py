import json
import xml.etree.ElementTree as ET

import PIL.Image
import pytest

from lvlm_jax.data.prepare import LAYOUTS, prepare, svg
from lvlm_jax.processing.encode import DataError

PICTURES = ["coco/train2017/1.jpg", "gqa/images/2.jpg", "ocr_vqa/images/3.jpg", "textvqa/train_images/4.jpg"]
PICTURES += ["vg/VG_100K/5.jpg", "vg/VG_100K_2/6.jpg", "coco/train2017/7.jpg"]


def record(image=None, words="what is it?"):
    talk = [{"from": "human", "value": ("<image>\n" if image else "") + words}, {"from": "gpt", "value": "a cat"}]
    return {"id": "x", "conversations": talk} | ({"image": image} if image else {})


@pytest.fixture
def mix(tmp_path):
    """The 665K layout with seven pictures and two records without."""
    for name in PICTURES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / name)
    records = [record(name) for name in PICTURES] + [record(), record(words="and now?")]
    (tmp_path / LAYOUTS["665k"].file).write_text(json.dumps(records))
    return tmp_path


def test_the_published_counts_add_up():
    assert sum(LAYOUTS["665k"].parts.values()) == 665_298


def test_a_whole_set(mix):
    found = prepare(mix, progress=False)
    assert found.ok
    assert found.name == "665k"
    assert found.counts == {"coco": 2, "gqa": 1, "ocr_vqa": 1, "text only": 2, "textvqa": 1, "vg": 2}
    assert found.lengths.tolist() == [5] * 8 + [4]
    page = str(found)
    assert "9 records (published: 665,298)" in page
    assert "coco                 2 (published: 364,100)" in page
    assert "words a record:" in page
    assert page.endswith("complete")


def test_lengths_in_tokens(mix, encoder):
    found = prepare(mix, encode=encoder, progress=False)
    assert found.unit == "tokens"
    assert found.lengths.min() > 5


def test_missing_pictures_by_folder_missing_folders_and_bad_records(mix):
    (mix / "coco/train2017/7.jpg").unlink()
    (mix / "ocr_vqa/images/3.jpg").rename(mix / "ocr_vqa/images/3.gif")
    (mix / "vg/VG_100K_2/6.jpg").unlink()
    (mix / "vg/VG_100K_2").rmdir()
    records = json.loads((mix / LAYOUTS["665k"].file).read_text())
    (mix / LAYOUTS["665k"].file).write_text(json.dumps([*records, {"id": "y"}]))
    found = prepare(mix, progress=False)
    assert not found.ok
    assert found.absent == (str(mix / "vg/VG_100K_2"),)
    lacks = {folder.removeprefix(f"{mix}/"): (lack.count, lack.renamed) for folder, lack in found.missing.items()}
    assert lacks == {"coco/train2017": (1, 0), "ocr_vqa/images": (1, 1), "vg/VG_100K_2": (1, 0)}
    page = str(found)
    assert f"folder {mix}/vg/VG_100K_2 is not there" in page
    assert f"{mix}/coco/train2017: 1 pictures missing (7.jpg)" in page
    assert "(3.jpg); 1 stand there under another extension: rename them" in page
    assert "1 bad records:" in page
    assert "no field 'conversations'" in page
    assert "not complete; it comes from liuhaotian/LLaVA-Instruct-150K" in page


def test_the_alignment_set(tmp_path, capsys):
    (tmp_path / "images/00453").mkdir(parents=True)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "images/00453/a.jpg")
    (tmp_path / LAYOUTS["558k"].file).write_text(json.dumps([record("00453/a.jpg"), record("00453/b.jpg")]))
    found = prepare(tmp_path)
    assert found.counts == {"pictures": 2}
    assert [lack.names for lack in found.missing.values()] == [("b.jpg",)]
    assert "reading records" in capsys.readouterr().err


def test_a_folder_without_a_set(tmp_path):
    with pytest.raises(DataError, match=r"holds none of blip_laion_cc_sbu_558k\.json, .*nothing is downloaded here"):
        prepare(tmp_path)
    with pytest.raises(DataError, match="'700k' is no public layout; choose one of 558k, 665k"):
        prepare(tmp_path, "700k")


def test_the_histogram_is_a_picture(mix):
    found = prepare(mix, progress=False)
    tree = ET.fromstring(svg(found.lengths, found.unit, "a < b & c"))
    bars = [node for node in tree.iter() if node.tag.endswith("rect")]
    assert len(bars) == 40
    assert sum(int(node[0].text.rsplit(": ")[1]) for node in bars) == 9
    assert "a < b & c" in "".join(tree.itertext())
