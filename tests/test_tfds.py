"""TensorFlow Datasets as a source."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from blip_jax.data import sources
from blip_jax.data import tfds as tfds_lib


def _image(number):
  file = io.BytesIO()
  Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file, "PNG")
  return file.getvalue()


@pytest.fixture(scope="module")
def builder_dir(tmp_path_factory):
  """A prepared builder with each kind of caption feature."""
  import tensorflow_datasets as tfds

  features = tfds.features

  class CaptionedPixels(tfds.core.GeneratorBasedBuilder):
    """Four images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=features.FeaturesDict(
          {
            "image": features.Image(),
            "caption": features.Text(),
            "multiple": features.Sequence(features.Text()),
            "caption2": features.Text(),
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
            "image": _image(number),
            "caption": f"caption {number}",
            "multiple": texts,
            "caption2": "another",
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


def test_records_are_undecoded(builder_dir):
  source = tfds_lib.Tfds(builder_dir, "train")
  source = pickle.loads(pickle.dumps(source))
  assert len(source) == 4
  for index in range(4):
    record = source[index]
    number = record.pop("image_id")
    assert record == {
      "image": _image(number),
      "caption": b"caption %d" % number,
      "id": f"{builder_dir}/train:{index}",
    }


@pytest.mark.parametrize("feature", ["multiple", "nested"])
def test_a_feature_may_have_multiple_captions(builder_dir, feature):
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


def test_images_alone_need_no_captions(builder_dir):
  source = tfds_lib.Tfds(builder_dir, "train", False, caption="no such")
  assert sorted(source[0]) == ["id", "image", "image_id"]


def _number(builder_dir, index):
  return tfds_lib.Tfds(builder_dir, "train")[index]["image_id"]


def test_a_missing_feature_is_reported_with_those_found(builder_dir):
  with pytest.raises(ValueError, match=r"no feature 'title' in \['caption'"):
    tfds_lib.Tfds(builder_dir, "train", caption="title")
  with pytest.raises(ValueError, match="train"):
    tfds_lib.Tfds(builder_dir, "nope")


def test_further_features_can_be_kept(builder_dir):
  source = tfds_lib.Tfds(builder_dir, "train", keep=("multiple", "image/id"))
  source = pickle.loads(pickle.dumps(source))
  for record in source:
    number = record["image/id"]
    assert record["image_id"] == number
    texts = [b"text %d %d" % (number, i) for i in range(number)]
    assert list(record["multiple"]) == texts
    assert "nested" not in record
  source = tfds_lib.Tfds(builder_dir, "train", False, keep=("caption2",))
  assert sorted(source[0]) == ["caption2", "id", "image", "image_id"]
  with pytest.raises(ValueError, match=r"\['title'\] .*'caption', 'caption2'"):
    tfds_lib.Tfds(builder_dir, "train", keep=("title",))
  with pytest.raises(ValueError, match=r"'image_id'. cannot be kept"):
    tfds_lib.Tfds(builder_dir, "train", keep=("image_id",))


@pytest.mark.parametrize(
  "value, reason",
  [
    ({"caption": 3}, "broken_row"),
    ({"caption": np.float32("nan")}, "empty_caption"),
    ({"caption": np.array([], object)}, "empty_caption"),
    ({"caption": np.array([b"one", 3], object)}, "broken_row"),
    ({"image/id": np.array([1, 2])}, "broken_row"),
    ({"caption2": np.float32("nan")}, "missing_column"),
  ],
)
def test_a_bad_value_costs_its_row(builder_dir, monkeypatch, value, reason):
  source = tfds_lib.Tfds(builder_dir, "train", keep=("caption2",))
  good = {"image": b"png", "caption": b"one", "image/id": 7, "caption2": b"two"}
  monkeypatch.setattr(source, "_rows", [good | value, good])
  with pytest.raises(sources.BadRow, match=r"train:0: ") as bad:
    source[0]
  assert bad.value.reason == reason
  assert source[1]["image_id"] == 7


def test_an_image_id_may_be_absent_or_no_utf8(builder_dir, monkeypatch):
  source = tfds_lib.Tfds(builder_dir, "train")
  row = {"image": b"png", "caption": b"one"}
  ids = [np.float32("nan"), np.float32(7), b"a\xff"]
  rows = [row | {"image/id": image_id} for image_id in ids]
  monkeypatch.setattr(source, "_rows", rows)
  found = [record.get("image_id") for record in source]
  assert found == [None, 7, r"a\xff"]
