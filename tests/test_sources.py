"""Sources: annotations and TFDS, one record at a time."""

import functools
import io
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from blip_jax.data import sources
from blip_jax.data import tfds as tfds_lib


def _annotations(path, rows, **options):
  lines = [json.dumps(row) for row in rows]
  is_jsonl = path.suffix == ".jsonl"
  path.write_text("\n".join(lines) if is_jsonl else f"[{', '.join(lines)}]")
  return sources.Annotations(path, **options)


@pytest.fixture(params=["a.json", "a.jsonl"])
def annotations(request, tmp_path):
  """Make a source of rows in both formats."""
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
  "row, message",
  [
    ({"caption": "c"}, r"row 1: expected a path under 'image' .*\['caption'\]"),
    ({"image": 3, "caption": "c"}, "row 1: expected a path under 'image'"),
    (
      {"image": "a", "title": "c"},
      r"text under 'caption' \(or 'captions', .*found \['image', 'title'",
    ),
    ({"image": "a", "caption": 5}, "text under 'caption', found 5"),
    ({"image": "a", "caption": ["c", 5]}, "text under 'caption'"),
    (["a", "c"], r"row 1: expected an object, found \['a', 'c'\]"),
  ],
)
def test_a_schema_mistake_names_file_row_and_key(annotations, row, message):
  good = {"image": "a.jpg", "caption": "c"}
  source = annotations([good, row, good])
  assert source[0] and source[2]
  with pytest.raises(ValueError, match=message) as error:
    source[1]
  assert source.path in str(error.value)


@pytest.mark.parametrize("caption", [None, []])
def test_a_row_without_a_caption_is_bad_not_wrong(annotations, caption):
  source = annotations([{"image": "a.jpg", "caption": caption}])
  with pytest.raises(sources.BadRow) as bad:
    source[0]
  assert bad.value.reason == "empty_caption"
  assert bad.value.id == os.path.basename(source.path) + ":0"


def test_a_row_without_a_picture_is_bad_not_wrong(annotations):
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
    ({"id": "3"}, "3"),
    ({"image_id": None}, None),
    ({}, None),
  ],
)
def test_the_annotation_may_call_the_picture_something(
  annotations, ids, expected
):
  (record,) = annotations([{"image": "a.jpg", "caption": "c", **ids}])
  assert record.get("image_id") == expected
  assert ("image_id" in record) == (expected is not None)


def test_rows_need_no_captions_if_none_are_asked_for(annotations):
  rows = [{"image": "a.jpg", "img_id": 0}, {"image": "b.jpg", "caption": None}]
  assert list(annotations(rows, with_captions=False)) == [
    {"image": "a.jpg", "image_id": 0, "id": annotations.name + ":0"},
    {"image": "b.jpg", "id": annotations.name + ":1"},
  ]


@pytest.mark.parametrize(
  "name, number",
  [
    ("COCO_val2014_000000391895.jpg", 391895),
    ("000000391895.jpg", 391895),
    ("/data/val2014/COCO_val2014_000000391895.JPG", 391895),
    ("val/0.tar:000000391895", 391895),
    ("391895.jpg", None),
    ("1000268201_693b08cb0e.jpg", None),
    ("IMG_202403041200.jpg", None),
    ("0000000391895.jpg", None),
    ("000000391895/a.jpg", None),
  ],
)
def test_file_names_of_coco_hold_the_image_id(name, number):
  assert sources.coco_image_id(name) == number


def test_an_annotation_wins_over_the_file_name():
  record = {"image": "i/COCO_val2014_000000000007.jpg", "id": "val.json:3"}
  assert sources.image_id(record) == 7
  assert sources.image_id({**record, "image_id": "x"}) == "x"
  record = {"image": b"jpeg", "id": "0.tar:000000000009"}
  assert sources.image_id(record) == 9
  assert sources.image_id({"image": b"jpeg", "id": "train.json:3"}) is None


def test_a_missing_annotation_file_is_said(tmp_path):
  with pytest.raises(ValueError, match=r"none\.json: no such annotation file"):
    sources.Annotations(tmp_path / "none.json")


def test_annotations_pickle(annotations):
  source = annotations([{"image": "a.jpg", "caption": "one"}] * 3)
  assert pickle.loads(pickle.dumps(source))[2] == source[2]


# What `wget --force-directories` names them.
@pytest.mark.parametrize(
  "url, path",
  [
    ("http://h:81/d%20e/a%20b.jpg?x=1&y=%2F2", "h:81/d e/a b.jpg?x=1&y=%2F2"),
    ("https://a.org/x/", "a.org/x/index.html"),
    ("https://a.org", "a.org/index.html"),
  ],
)
def test_a_url_has_one_place_under_the_image_root(url, path):
  assert sources.path_of_url(url) == path


@pytest.mark.parametrize(
  "url", ["https://a.org/../../etc/passwd", "https://a.org/%2e%2e/x", "http:/x"]
)
def test_a_url_cannot_leave_the_image_root(url):
  with pytest.raises(ValueError, match="no file"):
    sources.path_of_url(url)


def _picture(number):
  file = io.BytesIO()
  Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file, "PNG")
  return file.getvalue()


@pytest.fixture(scope="module")
def builder_dir(tmp_path_factory):
  """A prepared builder with every kind of caption feature."""
  import tensorflow_datasets as tfds

  features = tfds.features

  class CaptionedPixels(tfds.core.GeneratorBasedBuilder):
    """Four pictures."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=features.FeaturesDict(
          {
            "image": features.Image(),
            "caption": features.Text(),
            "several": features.Sequence(features.Text()),
            "nested": features.Sequence({"text": features.Text()}),
            "image/id": np.int64,
          }
        ),
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for number in range(4):
        texts = [f"text {number} {i}" for i in range(number)]
        yield (
          number,
          {
            "image": _picture(number),
            "caption": f"caption {number}",
            "several": texts,
            "nested": [{"text": text} for text in texts],
            "image/id": number,
          },
        )

  data_dir = tmp_path_factory.mktemp("tfds")
  builder = CaptionedPixels(data_dir=data_dir, file_format="array_record")
  with pytest.raises(ValueError, match="not prepared"):
    tfds_lib.Tfds("captioned_pixels", "train", data_dir=str(data_dir))
  builder.download_and_prepare()
  return str(builder.data_dir)


def test_tfds_gives_undecoded_records(builder_dir):
  source = tfds_lib.Tfds(builder_dir, "train")
  source = pickle.loads(pickle.dumps(source))
  assert len(source) == 4
  for index in range(4):
    record = source[index]
    number = record.pop("image_id")
    assert record == {
      "image": _picture(number),
      "caption": b"caption %d" % number,
      "id": f"{builder_dir}/train:{index}",
    }


@pytest.mark.parametrize("feature", ["several", "nested"])
def test_tfds_reads_lists_of_captions(builder_dir, feature):
  source = tfds_lib.Tfds(builder_dir, "train[:100%]", caption=feature)
  rows = range(len(source))
  empty = [i for i in rows if _number(builder_dir, i) == 0]
  for index in rows:
    if index in empty:
      with pytest.raises(sources.BadRow, match="empty_caption"):
        source[index]
      continue
    number = source[index]["image_id"]
    texts = [b"text %d %d" % (number, i) for i in range(number)]
    assert source[index]["caption"] == texts


def test_tfds_gives_pictures_alone(builder_dir):
  source = tfds_lib.Tfds(builder_dir, "train", False, caption="no such")
  assert sorted(source[0]) == ["id", "image", "image_id"]


def _number(builder_dir, index):
  return tfds_lib.Tfds(builder_dir, "train")[index]["image_id"]


def test_tfds_says_which_features_there_are(builder_dir):
  with pytest.raises(ValueError, match=r"no feature 'title' in \['caption'"):
    tfds_lib.Tfds(builder_dir, "train", caption="title")
  with pytest.raises(ValueError, match="train"):
    tfds_lib.Tfds(builder_dir, "nope")


def test_captions_of_a_picture_share_a_number():
  """By the annotation's name of it, its path or its content."""
  number = sources.image_number
  pixels = np.zeros((2, 2, 3), np.uint8)
  pictures = (
    [{"image": "a.jpg", "image_id": "7"}, {"image": "b.jpg", "image_id": 7}],
    [{"image": "a.jpg"}, {"image": "a.jpg", "id": "other"}],
    [{"image": b"encoded"}, {"image": b"encoded"}],
    [{"image": pixels}, {"image": pixels.copy()}],
    [{"image": "c.jpg"}, {"image": "c.jpg"}],
  )
  numbers = [{number(record) for record in own} for own in pictures]
  assert [len(own) for own in numbers] == [1] * len(pictures)
  assert len(set.union(*numbers)) == len(pictures)
  assert all(0 <= n < 2**31 for n in set.union(*numbers))
