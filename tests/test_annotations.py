"""JSON and JSON Lines as sources."""

import functools
import json
import os
import pickle

import pytest

from blip_jax.data import annotations as annotations_lib
from blip_jax.data import schema, sources

NAN = float("nan")


def _annotations(path, rows, **options):
  lines = [json.dumps(row) for row in rows]
  is_jsonl = path.suffix == ".jsonl"
  path.write_text("\n".join(lines) if is_jsonl else f"[{', '.join(lines)}]")
  return annotations_lib.Annotations(path, **options)


@pytest.fixture(params=["a.json", "a.jsonl"])
def annotations(request, tmp_path):
  """Makes a source of rows, in both formats."""
  make = functools.partial(_annotations, tmp_path / request.param)
  make.name = request.param
  return make


def test_annotations_become_records(annotations):
  source = annotations(
    [
      {"image": "a.jpg", "caption": "one", "image_id": "x1"},
      {"image": "/elsewhere/b.jpg", "caption": ["two", "three"], "image_id": 7},
      {"url": "https://a.org/p/c.jpg", "caption": ""},
    ],
    image_root="/data",
  )
  name = os.path.basename(source.path)
  assert [source[i] for i in range(len(source))] == [
    {
      "image": "/data/a.jpg",
      "caption": "one",
      "image_id": "x1",
      "id": f"{name}:0",
    },
    {
      "image": "/elsewhere/b.jpg",
      "caption": ["two", "three"],
      "image_id": 7,
      "id": f"{name}:1",
    },
    {"image": "/data/a.org/p/c.jpg", "caption": "", "id": f"{name}:2"},
  ]
  assert source[-1] == source[2]
  with pytest.raises(IndexError):
    source[3]


@pytest.mark.parametrize(
  "row, reason",
  [
    ({"caption": "c"}, "missing_image"),
    ({"image": NAN, "caption": "c"}, "missing_image"),
    ({"image": 3, "caption": "c"}, "broken_row"),
    ({"image": "a", "title": "c"}, "missing_caption"),
    ({"image": "a", "caption": NAN}, "empty_caption"),
    ({"image": "a", "caption": ["c", 5]}, "broken_row"),
    ({"image": "a", "caption": "c", "image_id": [1]}, "broken_row"),
    (3, "broken_row"),
    (None, "broken_row"),
  ],
)
def test_a_bad_value_costs_its_row(annotations, row, reason):
  good = {"image": "a.jpg", "caption": "c", "image_id": NAN}
  for rows, number in (([good, row, good], 1), ([row, good, good], 0)):
    source = annotations(rows)
    with pytest.raises(sources.BadRow, match=f"row {number}") as bad:
      source[number]
    assert source.path in bad.value.detail
    assert bad.value.id == f"{annotations.name}:{number}"
    assert bad.value.reason == reason
    assert "image_id" not in source[2]


@pytest.mark.parametrize(
  "row, message",
  [
    ({"caption": "c"}, r"rows 0 to 2: .*a path under 'image' .*\['caption'\]"),
    (
      {"image": "a", "title": "c"},
      r"rows 0 to 2: .*text under 'caption' \(or .*found \['image', 'title'",
    ),
    ("a", r"rows 0 to 2: none .* expected an object, found 'a'"),
  ],
)
def test_a_key_that_no_row_has_is_a_mistake(annotations, row, message):
  with pytest.raises(ValueError, match=message) as error:
    annotations([row] * 3)
  assert annotations.name in str(error.value)


def test_sentences_of_karpathy_are_captions(annotations):
  sentences = [{"raw": "A cat.", "tokens": ["a", "cat"]}, {"raw": "Two."}]
  (record,) = annotations([{"image": "a.jpg", "sentences": sentences}])
  assert record["caption"] == ["A cat.", "Two."]


@pytest.mark.parametrize("caption", [None, []])
def test_a_row_without_a_caption_is_a_bad_row(annotations, caption):
  source = annotations([{"image": "a.jpg", "caption": caption}])
  with pytest.raises(sources.BadRow) as bad:
    source[0]
  assert bad.value.reason == "empty_caption"
  assert bad.value.id == os.path.basename(source.path) + ":0"


def test_a_row_without_an_image_is_a_bad_row(annotations):
  source = annotations([{"image": None, "caption": "c"}])
  with pytest.raises(sources.BadRow, match="nothing under 'image'") as bad:
    source[0]
  assert bad.value.reason == "missing_image"


@pytest.mark.parametrize("image", ["image", "url", "image_path", "file_name"])
@pytest.mark.parametrize("caption", ["caption", "captions", "text"])
def test_columns_have_usual_names(annotations, image, caption):
  row = {image: "a.jpg", caption: ["one"], "licence": "CC"}
  (record,) = annotations([row])
  assert (record["image"], record["caption"]) == ("a.jpg", ["one"])


def test_columns_can_be_named(annotations):
  row = {"image": "a.jpg", "crop": "b.jpg", "caption": "one", "title": "two"}
  (record,) = annotations([row], image="crop", caption="title")
  assert (record["image"], record["caption"]) == ("b.jpg", "two")
  with pytest.raises(ValueError, match=r"under 'photo', found .*\?image=COL"):
    annotations([row], image="photo")[0]


@pytest.mark.parametrize(
  "ids, expected",
  [
    ({"image_id": 1, "img_id": 2, "id": 3}, 1),
    ({"img_id": 2, "id": 3}, 2),
    ({"cocoid": 4, "imgid": 5}, 4),
    ({"imgid": 5}, 5),
    ({"id": "3"}, None),
    ({"image_id": None}, None),
    ({}, None),
  ],
)
def test_the_image_id_has_usual_names(annotations, ids, expected):
  (record,) = annotations([{"image": "a.jpg", "caption": "c", **ids}])
  assert record.get("image_id") == expected
  assert ("image_id" in record) == (expected is not None)


def test_images_alone_need_no_captions(annotations):
  rows = [{"image": "a.jpg", "img_id": 0}, {"image": "b.jpg", "caption": None}]
  assert list(annotations(rows, with_captions=False)) == [
    {"image": "a.jpg", "image_id": 0, "id": annotations.name + ":0"},
    {"image": "b.jpg", "id": annotations.name + ":1"},
  ]


def test_a_missing_annotation_file_is_reported(tmp_path):
  with pytest.raises(ValueError, match=r"none\.json: no such annotation file"):
    annotations_lib.Annotations(tmp_path / "none.json")


def test_the_name_of_the_file_may_be_no_utf8(tmp_path):
  name = os.fsdecode(b"b\xe9\n.jsonl")
  (record,) = _annotations(tmp_path / name, [{"image": "a", "caption": "c"}])
  assert record["id"] == r"b\xe9\x0a.jsonl:0"


def test_annotations_pickle(annotations):
  source = annotations([{"image": "a.jpg", "caption": "one"}] * 3)
  assert pickle.loads(pickle.dumps(source))[2] == source[2]


def test_further_columns_can_be_kept(annotations):
  rows = [
    {"image": "a.jpg", "caption": "one", "question": "what?", "answer": ["b"]},
    {"image": "b.jpg", "caption": "two", "answer": {"no": 0.5}},
  ]
  source = annotations(rows, keep=("answer",))
  source = pickle.loads(pickle.dumps(source))
  assert [record["answer"] for record in source] == [["b"], {"no": 0.5}]
  assert "question" not in source[0]
  source = annotations(rows, keep=("question", "answer"), with_captions=False)
  assert source[0] == {
    "image": "a.jpg",
    "question": "what?",
    "answer": ["b"],
    "id": f"{annotations.name}:0",
  }
  with pytest.raises(sources.BadRow, match="'question'") as bad:
    source[1]
  assert bad.value.reason == "missing_column"


def test_a_column_that_no_row_has_cannot_be_kept(annotations, monkeypatch):
  rows = [{"image": "a.jpg", "caption": "one"}] * 3
  rows += [{"image": "a.jpg", "caption": "one", "answer": None}]
  with pytest.raises(
    ValueError,
    match=r"rows 0 to 3: .*\['question'\] that 'keep' .*"
    r"\['image', 'caption', 'answer'\]",
  ) as error:
    annotations(rows, keep=("answer", "question"))
  assert annotations.name in str(error.value)
  assert len(annotations(rows, keep=("answer",))) == 4
  monkeypatch.setattr(schema, "_SCHEMA_ROWS", 3)
  with pytest.raises(ValueError, match=r"rows 0 to 2: .*\['answer'\]"):
    annotations(rows, keep=("answer",))


def test_the_search_for_columns_to_keep_skips_broken_rows(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"image\n{"image": "a.jpg", "text": "t", "answer": "b"}\n')
  source = annotations_lib.Annotations(path, keep=("answer",))
  assert source[1]["answer"] == "b"
