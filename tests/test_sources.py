"""Sources: annotations, tar shards and TFDS, one record at a time."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from blip_jax.data import sources


def _annotations(path, rows, **options):
  lines = [json.dumps(row) for row in rows]
  is_jsonl = path.suffix == ".jsonl"
  path.write_text("\n".join(lines) if is_jsonl else f"[{', '.join(lines)}]")
  return sources.Annotations(path, **options)


@pytest.fixture(params=["a.json", "a.jsonl"])
def annotations(request, tmp_path):
  """Make a source of rows in both formats."""
  return lambda rows, **options: _annotations(
    tmp_path / request.param, rows, **options
  )


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
      {"image": "a", "text": "c"},
      r"the key 'caption', found \['image', 'text'",
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


def _tar(path, members):
  with tarfile.open(path, "w") as tar:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return str(path)


def test_shards_are_one_source(tmp_path):
  paths = [
    _tar(
      tmp_path / "0.tar",
      {"00.jpg": b"j0", "00.txt": b"t0", "01.png": b"p1", "01.txt": b"t1"},
    ),
    _tar(
      tmp_path / "1.tar",
      {
        "02.webp": b"w2",
        "02.json": b'{"caption": "t2", "url": "u"}',
        "02.txt": b"t2 first",
        "03.jpg": b"j3",
        "03.json": b'{"caption": "t3"}',
      },
    ),
  ]
  source = pickle.loads(pickle.dumps(sources.TarShards(paths)))
  assert [source[i] for i in range(4)] == [
    {"image": b"j0", "caption": b"t0", "id": "0.tar:00"},
    {"image": b"p1", "caption": b"t1", "id": "0.tar:01"},
    {"image": b"w2", "caption": b"t2 first", "id": "1.tar:02"},
    {"image": b"j3", "caption": "t3", "id": "1.tar:03"},
  ]
  assert len(source) == 4 and source.problems == []
  with pytest.raises(IndexError):
    source[4]


@pytest.mark.parametrize(
  "members, reason",
  [
    ({"a.jpg": b"j"}, "missing_caption"),
    ({"a.txt": b"t"}, "missing_image"),
    ({"a.jpg": b"j", "a.json": b"{"}, "broken_row"),
    ({"a.jpg": b"j", "a.json": b"\xff"}, "broken_row"),
    ({"a.jpg": b"j", "a.json": b"[]"}, "broken_row"),
    ({"a.jpg": b"j", "a.json": b"{}"}, "broken_row"),
    ({"a.jpg": b"j", "a.json": b'{"caption": null}'}, "empty_caption"),
  ],
)
def test_an_incomplete_sample_is_bad(tmp_path, members, reason):
  source = sources.TarShards([_tar(tmp_path / "s.tar", members)])
  with pytest.raises(sources.BadRow) as bad:
    source[0]
  assert (bad.value.id, bad.value.reason) == ("s.tar:a", reason)


def test_pickles_in_shards_are_never_opened(tmp_path):
  members = {"a.jpg": b"j", "a.txt": b"t", "a.pkl": b"p", "a.pyd": b"p"}
  source = sources.TarShards([_tar(tmp_path / "s.tar", members)])
  assert len(source) == 1
  assert sorted(source[0]) == ["caption", "id", "image"]
  with pytest.raises(ValueError, match="No samples"):
    sources.TarShards([_tar(tmp_path / "p.tar", {"b.pkl": b"p"})])


def test_missing_shards_are_said(tmp_path):
  good = _tar(tmp_path / "0.tar", {"a.jpg": b"j", "a.txt": b"t"})
  with pytest.raises(ValueError, match=r"1 of 2 shards do not exist.*1\.tar"):
    sources.TarShards([good, str(tmp_path / "1.tar")])


def test_a_damaged_shard_keeps_its_neighbours_and_is_reported(tmp_path):
  members = {"a.jpg": b"j" * 600, "a.txt": b"t", "b.jpg": b"j" * 600}
  paths = [_tar(tmp_path / f"{i}.tar", members) for i in range(2)]
  os.truncate(paths[0], 3200)  # within b.jpg
  source = sources.TarShards(paths)
  ids = [f"{shard}.tar:{name}" for shard, name in ("0a", "1a", "1b")]
  assert len(source) == 3
  assert [source[i]["id"] for i in range(2)] == ids[:2]
  (problem,) = source.problems
  assert "0.tar: b.jpg: truncated" in problem


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
    sources.Tfds("captioned_pixels", "train", data_dir=str(data_dir))
  builder.download_and_prepare()
  return str(builder.data_dir)


def test_tfds_gives_undecoded_records(builder_dir):
  source = sources.Tfds(builder_dir, "train")
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
  source = sources.Tfds(builder_dir, "train[:100%]", caption=feature)
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


def _number(builder_dir, index):
  return sources.Tfds(builder_dir, "train")[index]["image_id"]


def test_tfds_says_which_features_there_are(builder_dir):
  with pytest.raises(ValueError, match=r"no feature 'title' in \['caption'"):
    sources.Tfds(builder_dir, "train", caption="title")
  with pytest.raises(ValueError, match="train"):
    sources.Tfds(builder_dir, "nope")
