"""COCO's official files and Karpathy's as sources."""

import json
import pickle

import pytest

from blip_jax.data import datasets, offsets, sources

COCO = {
  "info": {"year": 2014, "contributor": ["COCO"]},
  "licenses": [{"id": 1, "name": "CC"}],
  "images": [
    {"id": 9, "file_name": "nine.jpg", "license": 1, "coco_url": "http://c/9"},
    {"id": 4, "file_name": "four.jpg", "license": 2, "coco_url": "http://c/4"},
    {"id": 5, "file_name": "five.jpg", "license": 3, "coco_url": "http://c/5"},
  ],
  "annotations": [
    {"id": 70, "image_id": 4, "caption": "A {four}."},
    {"id": 71, "image_id": 9, "caption": 'A "nine".'},
    {"id": 72, "image_id": 4, "caption": "Two fours."},
    {"id": 73, "image_id": 5, "caption": "A five."},
  ],
}


def _karpathy(number, split, **further):
  sentences = [
    {"raw": f"{text} {number}.", "tokens": [text], "imgid": number, "sentid": 0}
    for text in ("One", "Two")
  ]
  name = f"{number}.jpg"
  image = {"filename": name, "imgid": number, "sentids": [0, 1]}
  return image | {"sentences": sentences, "split": split} | further


KARPATHY = {
  "images": [
    _karpathy(0, "test", filepath="val2014", cocoid=391895),
    _karpathy(1, "train"),
    _karpathy(2, "restval"),
    _karpathy(3, "train"),
    _karpathy(4, "val"),
  ],
  "dataset": "coco",
}


@pytest.fixture
def spec(tmp_path):
  """Writes a file, and returns its path."""

  def write(content, name="set.json"):
    path = tmp_path / name
    path.write_text(
      content if isinstance(content, str) else json.dumps(content)
    )
    return str(path)

  return write


def test_an_image_of_coco_has_all_its_captions(spec):
  source = datasets.open_source(spec(COCO) + "?keep=license", "root")
  source = pickle.loads(pickle.dumps(source))
  assert list(source) == [
    {
      "image": "root/nine.jpg",
      "caption": ['A "nine".'],
      "image_id": 9,
      "license": 1,
      "id": "set.json:0",
    },
    {
      "image": "root/four.jpg",
      "caption": ["A {four}.", "Two fours."],
      "image_id": 4,
      "license": 2,
      "id": "set.json:1",
    },
    {
      "image": "root/five.jpg",
      "caption": ["A five."],
      "image_id": 5,
      "license": 3,
      "id": "set.json:2",
    },
  ]
  assert source[-1] == source[2]
  with pytest.raises(IndexError):
    source[3]
  assert source.problems == []


def test_columns_of_coco_can_be_named(spec):
  content = json.loads(json.dumps(COCO).replace('"caption"', '"title"'))
  query = "?image=coco_url&caption=title"
  records = list(datasets.open_source(spec(content) + query, "root"))
  assert [record["image"] for record in records] == [
    "root/c/9",
    "root/c/4",
    "root/c/5",
  ]
  assert records[1]["caption"] == ["A {four}.", "Two fours."]


def test_images_of_coco_alone_need_no_annotations(spec):
  content = {"images": COCO["images"], "categories": []}
  records = list(datasets.open_images(spec(content)))
  assert [record["image_id"] for record in records] == [9, 4, 5]
  assert all("caption" not in record for record in records)
  assert list(datasets.open_images(spec(COCO))) == records
  with pytest.raises(ValueError, match="text under 'caption'"):
    datasets.open_source(spec(content))


def test_what_is_not_annotated_right_is_counted(spec, caplog):
  annotations = [
    {"image_id": 9, "caption": "good"},
    {"image_id": 4, "caption": None},
    {"image_id": 77, "caption": "of no image"},
    {"image_id": None, "caption": "of no image"},
    {"caption": "of no image"},
    {"image_id": [9], "caption": "of no image"},
    None,
  ]
  images = [*COCO["images"], 3, {"id": 8}]
  content = {"images": images, "annotations": annotations}
  source = datasets.open_source(spec(content))
  assert source[0]["caption"] == ["good"]
  reasons = []
  for row in range(1, len(source)):
    with pytest.raises(sources.BadRow, match=f"image {row}: ") as bad:
      source[row]
    assert bad.value.id == f"set.json:{row}"
    reasons.append(bad.value.reason)
  expected = ["broken_row", "missing_caption", "broken_row", "missing_image"]
  assert reasons == expected
  (problem,) = source.problems
  assert "5 of 7 annotations are of no image" in problem
  assert problem in caplog.text


def test_an_annotation_without_text_costs_only_itself(spec, caplog):
  """As a row does elsewhere: null, no text, broken, or without the key."""
  bad = ['{"image_id": 9, "caption": null}', '{"image_id": 9, "caption": 5}']
  bad += ['{"image_id": 9}']
  good = '{"image_id": 9, "caption": "good"}'
  content = (
    f'{{"images": {json.dumps(COCO["images"])}, '
    f'"annotations": [{", ".join([bad[0], good, *bad[1:], good])}]}}'
  )
  source = datasets.open_source(spec(content))
  assert source[0]["caption"] == ["", "good", "", "", "good"]


def test_lost_annotations_are_named_once(spec, caplog):
  annotations = [*COCO["annotations"], {"image_id": 77, "caption": "lost"}]
  path = spec(COCO | {"annotations": annotations})
  for _ in range(3):
    datasets.open_source(path)
  assert caplog.text.count("1 of 5 annotations are of no image") == 1


@pytest.mark.parametrize(
  "split, rows",
  [
    ("train", [1, 3]),
    ("train,restval", [1, 2, 3]),
    ("restval,train", [1, 2, 3]),
    ("val", [4]),
    ("test", [0]),
  ],
)
def test_a_split_of_karpathy_has_its_images(spec, split, rows):
  source = datasets.open_source(f"{spec(KARPATHY)}?split={split}", "root")
  source = pickle.loads(pickle.dumps(source))
  folders = ["root/val2014", *["root"] * 4]
  assert list(source) == [
    {
      "image": f"{folders[row]}/{row}.jpg",
      "caption": [f"One {row}.", f"Two {row}."],
      "image_id": row or 391895,
      "id": f"set.json:{row}",
    }
    for row in rows
  ]


def test_the_folder_of_karpathy_is_an_option(spec):
  query = "?split=test&image=filename&keep=filepath"
  (record,) = datasets.open_source(spec(KARPATHY) + query, "flat")
  assert record["image"] == "flat/0.jpg"
  assert record["filepath"] == "val2014"


@pytest.mark.parametrize("split", ["", "?split=dev", "?split=train,dev"])
def test_an_unknown_split_is_answered_with_those_of_the_file(spec, split):
  found = r"found .*test \(1 images\), train \(2 images\), restval \(1 images\)"
  for open_rows in (datasets.open_source, datasets.open_images):
    with pytest.raises(ValueError, match=rf"\?split=NAME,NAME .*{found}"):
      open_rows(spec(KARPATHY) + split)


def test_coco_has_no_splits(spec):
  with pytest.raises(ValueError, match=r"found 'val'\. The file has no splits"):
    datasets.open_source(spec(COCO) + "?split=val")


def test_an_image_without_a_split_costs_its_row_in_any(spec):
  images = [*KARPATHY["images"], _karpathy(5, None), None]
  source = datasets.open_source(spec({"images": images}) + "?split=val")
  assert source[0]["image"] == "4.jpg"
  for row in (1, 2):
    with pytest.raises(sources.BadRow, match="broken_row"):
      source[row]


@pytest.mark.parametrize(
  "content, message",
  [
    ({"data": [1], "x": 2}, r"list 'images' .* lists \['data'\].* \.jsonl"),
    ({"image": "a.jpg", "caption": "c"}, r"lists \[\].* \.jsonl"),
    ({"images": [], "annotations": []}, "a list 'images'"),
    ('{"image": "a.jpg"}\n{"image": "b.jpg"}', r"more after .* \.jsonl"),
    (json.dumps(COCO)[:-9], "truncated"),
  ],
)
def test_another_object_is_refused(spec, content, message):
  path = spec(content)
  with pytest.raises(ValueError, match=message) as error:
    datasets.open_source(path)
  assert path in str(error.value)


def test_the_index_of_a_large_file_is_cached_for_each_split(
  spec, tmp_path, monkeypatch
):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  path = spec(KARPATHY)
  for split, number in (("val", 1), ("train", 2), ("val", 1)):
    for _ in range(2):
      source = datasets.open_source(f"{path}?split={split}")
      assert len(source) == len(list(source)) == number
  assert len(list(tmp_path.glob(".set.json.images-*.npy"))) == 2
