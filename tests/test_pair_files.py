"""Image-text pairs as lists and webdataset shards."""

import json
import tarfile

import numpy as np
import pytest

from blip_jax.capfilt import pair_files
from blip_jax.data import datasets, transforms
from tests import helpers, jobs

PIXELS = jobs.NOISY_SCENES[0]["image"]


def row(text, image=None, image_id=None):
  scores = {"itm_prob": 0.75, "itc_cosine": None, "log_prob": -2.0}
  return scores | {
    "key": "0.tar:0001",
    "source": "synthetic",
    "text": text,
    "image": image,
    "image_id": image_id,
    "kept": True,
  }


def write(path, rows, image=PIXELS):
  with pair_files.open_writer(path) as writer:
    for one in rows:
      writer.add(one, lambda: image)


def not_called():
  raise AssertionError("a list refers to its images")


def test_a_list_refers_to_image_files(tmp_path):
  for suffix in (".json", ".jsonl"):
    path = tmp_path / f"clean{suffix}"
    with pair_files.open_writer(path) as writer:
      writer.add(row("ein Hünd", "0.png", "7"), not_called)
      writer.add(row("a cat", "1.png"), not_called)
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    items = json.loads(text) if suffix == ".json" else map(json.loads, lines)
    shared = {
      "key": "0.tar:0001",
      "source": "synthetic",
      "itm_prob": 0.75,
      "log_prob": -2.0,
    }
    assert [*items] == [
      {"image": "0.png", "caption": "ein Hünd", "image_id": "7"} | shared,
      {"image": "1.png", "caption": "a cat"} | shared,
    ]
    assert "Hünd" in text


def test_shards_hold_a_fixed_number_of_pairs(tmp_path, monkeypatch):
  monkeypatch.setattr(pair_files, "PAIRS_PER_SHARD", 2)
  texts = ["a", "b", "c", "d", "e"]
  write(tmp_path / "clean", map(row, texts))
  assert sorted(path.name for path in (tmp_path / "clean").iterdir()) == [
    "00000.tar",
    "00001.tar",
    "00002.tar",
  ]
  source = datasets.open_source(str(tmp_path / "clean" / "*.tar"))
  assert [source[n]["caption"].decode() for n in range(5)] == texts
  with tarfile.open(tmp_path / "clean" / "00002.tar") as tar:
    assert tar.getnames() == [f"000000004.{s}" for s in ("png", "txt", "json")]
    assert json.load(tar.extractfile("000000004.json")) == {
      "key": "0.tar:0001",
      "source": "synthetic",
      "itm_prob": 0.75,
      "log_prob": -2.0,
      "image_id": None,
      "image": None,
    }
  write(tmp_path / "again", map(row, texts))
  for path in (tmp_path / "clean").iterdir():
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_images_are_stored_unchanged_or_as_png(tmp_path):
  jpeg = b"\xff\xd8\xff and more"
  (tmp_path / "0.jpg").write_bytes(jpeg)
  for number, (image, suffix) in enumerate(
    ((jpeg, "jpg"), (str(tmp_path / "0.jpg"), "jpg"), (PIXELS, "png"))
  ):
    write(tmp_path / str(number), [row("a")], image)
    with tarfile.open(tmp_path / str(number) / "00000.tar") as tar:
      stored = tar.extractfile(f"000000000.{suffix}").read()
    if suffix == "jpg":
      assert stored == jpeg
    else:
      pixels = helpers.decode(stored, transforms.MAX_PIXELS)
      np.testing.assert_array_equal(pixels, PIXELS)


@pytest.mark.parametrize(
  ("image", "reason"),
  [("gone.png", "missing"), ("", "unreadable"), ("nul\0.png", "unreadable")],
)
def test_an_image_that_cannot_be_read_is_a_bad_sample(tmp_path, image, reason):
  with (
    pair_files.open_writer(tmp_path / "clean") as writer,
    pytest.raises(transforms.BadSample, match=reason),
  ):
    writer.add(row("a"), lambda: f"{tmp_path}/{image}")


@pytest.mark.parametrize("name", ["clean.json", "clean"])
def test_an_output_appears_complete_or_never(tmp_path, name):
  with (
    pytest.raises(KeyboardInterrupt),
    pair_files.open_writer(tmp_path / name) as writer,
  ):
    writer.add(row("a", "0.png"), lambda: PIXELS)
    raise KeyboardInterrupt
  assert [*tmp_path.iterdir()] == []


def test_other_outputs_are_refused(tmp_path):
  write(tmp_path / "clean", [row("a")])
  with pytest.raises(ValueError, match="already exists"):
    write(tmp_path / "clean", [row("a")])
  with pytest.raises(ValueError, match=r"expected a \.json"):
    write(tmp_path / "clean.zip", [row("a")])
  with pytest.raises(ValueError, match="0001 is not a file of its own"):
    write(tmp_path / "clean.json", [row("a")])


@pytest.mark.parametrize("error", [MemoryError(), IndexError("x")])
def test_whatever_reading_an_image_raises_is_a_bad_sample(tmp_path, error):
  def fail():
    raise error

  with pair_files.open_writer(tmp_path / "out") as writer:
    writer.add(row("a"), lambda: PIXELS)
    with pytest.raises(transforms.BadSample) as bad:
      writer.add(row("b"), fail)
    writer.add(row("c"), lambda: PIXELS)
  assert bad.value.reason == "error"
  assert type(error).__name__ in bad.value.detail
  texts = [
    record["caption"]
    for record in datasets.open_source(str(tmp_path / "out" / "*.tar"))
  ]
  assert texts == [b"a", b"c"]
