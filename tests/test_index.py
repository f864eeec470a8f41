"""The index of a gallery: resuming, FAISS, and refusals."""

import io
import json
import os
import sys

import numpy as np
import pytest

from blip_jax.data import datasets, sources
from blip_jax.inference import index
from blip_jax.runtime import lock
from tests import helpers

QUERIES = ("a red circle", "a green star", "two squares")


@pytest.fixture
def gallery(tmp_path):
  return helpers.write_gallery(tmp_path / "gallery")


@pytest.fixture(scope="module")
def model():
  return helpers.make_model("itm")


def test_a_stopped_job_resumes_to_the_same_index(
  tmp_path, gallery, model, monkeypatch
):
  """A job that is killed resumes after its last part, with the same result."""
  monkeypatch.setattr(index, "PART", 4)
  source = datasets.open_images(str(gallery))
  complete = index.build(tmp_path / "complete", model, source, 4)
  assert complete.ids == {n: f"{n}.png" for n in range(9)}
  assert complete.unreadable.keys() == {"broken.png"}
  embed, calls = index._embed, []

  def dies(part, rows, **kwargs):
    calls.append(part.name)
    if len(calls) == 2:
      raise KeyboardInterrupt
    embed(part, rows, **kwargs)

  monkeypatch.setattr(index, "_embed", dies)
  with pytest.raises(KeyboardInterrupt):
    index.build(tmp_path / "cut", model, source, 4)
  resumed = index.build(tmp_path / "cut", model, source, 4)
  assert len(calls) == 4 and len(set(calls)) == 3
  index.build(tmp_path / "cut", model, source, 4)
  assert len(calls) == 4
  assert resumed.ids == complete.ids
  query = model.embed_texts(QUERIES)
  for field, expected in zip(
    resumed.nearest(query, 20), complete.nearest(query, 20), strict=True
  ):
    np.testing.assert_array_equal(field, expected)
    assert field.shape == (3, 9)
  vectors = model.embed_images(gallery / f"{n}.png" for n in range(9))
  cosine = query @ vectors.T
  np.testing.assert_array_equal(
    resumed.nearest(query, 5).rows, np.argsort(-cosine, axis=1)[:, :5]
  )


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_faiss_finds_the_same_images(
  tmp_path, gallery, model, monkeypatch, factory
):
  source = datasets.open_images(str(gallery))
  made = index.build(tmp_path / "index", model, source, 4)
  query = model.embed_texts(QUERIES)
  exact, by_faiss = made.nearest(query, 4), made.nearest(query, 4, factory)
  np.testing.assert_array_equal(by_faiss.rows, exact.rows)
  np.testing.assert_allclose(by_faiss.cosine, exact.cosine, atol=1e-5)
  with pytest.raises(ValueError, match=r"config\.faiss: 'nonsense'"):
    made.nearest(query, 4, "nonsense")
  monkeypatch.setitem(sys.modules, "faiss", None)
  with pytest.raises(ValueError, match=r"pip install 'blip_jax\[search\]'"):
    made.nearest(query, 4, factory)


def test_two_images_with_one_id_are_refused(tmp_path, model):
  class Twice(list):
    pass

  rows = Twice(
    {"image": np.zeros((8, 8, 3), np.uint8), "id": "a"} for _ in "ab"
  )
  with pytest.raises(ValueError, match="several images, such as 'a'"):
    index.build(tmp_path / "index", model, rows, 2)


def test_an_index_of_other_weights_or_images_is_refused(
  tmp_path, gallery, model
):
  source = datasets.open_images(str(gallery))
  index.build(tmp_path / "index", model, source, 4)
  with pytest.raises(ValueError, match=r"\n  num_frames: 0 there, 3 now"):
    index.build(tmp_path / "index", model, source, 4, num_frames=3)
  half = helpers.make_model("itm", dtype="bfloat16")
  with pytest.raises(ValueError, match="dtype: 'float32' there, 'bfloat"):
    index.build(tmp_path / "index", half, source, 4)
  fewer = sources.Rows(source, np.arange(9))
  with pytest.raises(ValueError, match=r"\n  images: 10 there, 9 now"):
    index.build(tmp_path / "index", model, fewer, 4)


def flipped(content):
  at = len(content) - 5
  return content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]


def changed(**values):
  return lambda content: json.dumps(json.loads(content) | values).encode()


def as_array(change):
  def damage(content):
    file = io.BytesIO()
    np.save(file, change(np.load(io.BytesIO(content))))
    return file.getvalue()

  return damage


NPY, JSON = "part-000000.npy", "part-000000.json"
DAMAGE = [
  (NPY, None),
  (NPY, lambda content: b""),
  (NPY, lambda content: b"\x93NUMPY"),
  (NPY, lambda content: content[:-4]),
  (NPY, lambda content: content[: -4 * 64]),
  (NPY, lambda content: content[:128] + bytes(len(content) - 128)),
  (NPY, flipped),
  (NPY, as_array(lambda vectors: vectors[:, :8])),
  (NPY, as_array(lambda vectors: vectors * np.nan)),
  (NPY, as_array(lambda vectors: vectors[::-1])),
  (NPY, as_array(lambda vectors: vectors.astype(np.float64))),
  (JSON, lambda content: b""),
  (JSON, lambda content: content[:-20]),
  (JSON, lambda content: b"[]"),
  (JSON, lambda content: b"{}"),
  (JSON, lambda content: b"[" * 100_000),
  (JSON, flipped),
  (JSON, changed(rows=[0] * 5)),
  (JSON, changed(rows=[4, 3, 2, 1, 0])),
  (JSON, changed(rows=3)),
  (JSON, changed(ids=list("abcde"))),
  (JSON, changed(ids=[f"{n}.png" for n in range(4)])),
  (JSON, changed(unreadable=5)),
  (JSON, changed(unreadable={"x": "y"})),
  (JSON, changed(vectors=None)),
  (JSON, changed(origin="")),
  (JSON, changed(more=1)),
  ("part-000001.json", None),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_a_damaged_part_is_embedded_again(
  tmp_path, gallery, model, monkeypatch, caplog, number
):
  monkeypatch.setattr(index, "PART", 5)
  source = datasets.open_images(str(gallery))
  index.build(tmp_path / "index", model, source, 4)
  before = contents(tmp_path / "index")
  name, damage = DAMAGE[number]
  path = tmp_path / "index" / name
  if damage is None:
    path.unlink()
  else:
    path.write_bytes(damage(path.read_bytes()))
    assert path.read_bytes() != before[name]
  index.build(tmp_path / "index", model, source, 4)
  assert contents(tmp_path / "index") == before
  if name != "part-000001.json":  # as after a job that was stopped
    assert f"{JSON}: damaged: " in caplog.text


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("ending", ["json", "npy", "*"])
def test_parts_that_changed_places_are_embedded_again(
  tmp_path, gallery, model, monkeypatch, ending
):
  monkeypatch.setattr(index, "PART", 3)
  source = datasets.open_images(str(gallery))
  index.build(tmp_path / "index", model, source, 4)
  before = contents(tmp_path / "index")
  for path in [*(tmp_path / "index").glob(f"part-000000.{ending}")]:
    other = path.with_name(path.name.replace("0.", "1."))
    path.write_bytes(before[other.name])
    other.write_bytes(before[path.name])
  index.build(tmp_path / "index", model, source, 4)
  assert contents(tmp_path / "index") == before


def test_other_names_are_ignored_and_stay(
  tmp_path, gallery, model, monkeypatch
):
  monkeypatch.setattr(index, "PART", 5)
  source = datasets.open_images(str(gallery))
  query = model.embed_texts(QUERIES)
  expected = index.build(tmp_path / "index", model, source, 4)
  expected_nearest = expected.nearest(query, 20)
  before = contents(tmp_path / "index")
  strays = {
    "part-000000 (copy).json": before[JSON],
    "part-000000 (copy).npy": before[NPY],
    "part-0000000.json": before[JSON],
    "part-000002.json": before[JSON],
    "part-000009.json": b"{",
    "part-x.json": b"",
  }
  for name, content in strays.items():
    (tmp_path / "index" / name).write_bytes(content)
  os.mkfifo(tmp_path / "index" / "part-000003.json")
  made = index.build(tmp_path / "index", model, source, 4)
  assert made.ids == expected.ids
  for field, wanted in zip(
    made.nearest(query, 20), expected_nearest, strict=True
  ):
    np.testing.assert_array_equal(field, wanted)
  (tmp_path / "index" / "part-000003.json").unlink()
  assert contents(tmp_path / "index") == before | strays


@pytest.mark.parametrize("name", [NPY, JSON])
def test_a_part_that_is_no_file_does_not_stop_the_job(
  tmp_path, gallery, model, name
):
  source = datasets.open_images(str(gallery))
  index.build(tmp_path / "index", model, source, 4)
  before = contents(tmp_path / "index")
  path = tmp_path / "index" / name
  for other in (os.mkfifo, lambda path: os.symlink(path, path)):
    path.unlink()
    other(path)
    index.build(tmp_path / "index", model, source, 4)
    assert contents(tmp_path / "index") == before
  path.unlink()
  path.mkdir()
  with pytest.raises(ValueError, match=rf"{name}: expected a file .*Delete it"):
    index.build(tmp_path / "index", model, source, 4)


def overwritten(gallery):
  before = os.stat(gallery / "2.png")
  (gallery / "2.png").write_bytes((gallery / "5.png").read_bytes())
  os.utime(gallery / "2.png", ns=(before.st_atime_ns, before.st_mtime_ns))


def other_rows(gallery):
  """As many, with the same first and last."""
  (gallery / "2.png").unlink()
  (gallery / "7a.png").write_bytes((gallery / "0.png").read_bytes())


def readable_now(gallery):
  (gallery / "broken.png").write_bytes((gallery / "0.png").read_bytes())


def gone(gallery):
  (gallery / "1.png").unlink()
  (gallery / "1.png").symlink_to("nowhere.png")


def swapped(gallery):
  for name in ("1.png", "3.png"):
    os.utime(gallery / name, (1e9, 1e9))
  (gallery / "1.png").rename(gallery / "x")
  (gallery / "3.png").rename(gallery / "1.png")
  (gallery / "x").rename(gallery / "3.png")


CHANGES = [overwritten, other_rows, readable_now, gone, swapped]


@pytest.mark.parametrize("change", CHANGES)
def test_images_that_changed_are_embedded_again(
  tmp_path, gallery, model, caplog, change
):
  open_gallery = lambda: datasets.open_images(str(gallery))
  index.build(tmp_path / "index", model, open_gallery(), 4)
  change(gallery)
  made = index.build(tmp_path / "index", model, open_gallery(), 4)
  expected = index.build(tmp_path / "fresh", model, open_gallery(), 4)
  assert made.ids == expected.ids and made.unreadable == expected.unreadable
  assert contents(tmp_path / "index") == contents(tmp_path / "fresh")
  assert caplog.text.count(f"{JSON}: its images have changed") == 1


def test_only_the_part_of_an_image_that_changed_is_embedded_again(
  tmp_path, gallery, model, monkeypatch
):
  monkeypatch.setattr(index, "PART", 4)
  source = datasets.open_images(str(gallery))
  index.build(tmp_path / "index", model, source, 4)
  times = lambda: {
    path.name: path.stat().st_mtime_ns for path in tmp_path.glob("index/*.npy")
  }
  before = times()
  overwritten(gallery)
  index.build(tmp_path / "index", model, source, 4)
  assert {name for name in before if before[name] != times()[name]} == {NPY}


def test_parts_without_their_settings_are_no_parts_of_other_weights(
  tmp_path, gallery, model
):
  source = datasets.open_images(str(gallery))
  half = helpers.make_model("itm", dtype="bfloat16")
  index.build(tmp_path / "index", half, source, 4)
  (tmp_path / "index" / "index.json").unlink()
  index.build(tmp_path / "index", model, source, 4)
  index.build(tmp_path / "fresh", model, source, 4)
  assert contents(tmp_path / "index") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"weights'])
def test_damaged_settings_of_an_index_are_named(
  tmp_path, gallery, model, content
):
  source = datasets.open_images(str(gallery))
  (tmp_path / "index.json").write_bytes(content)
  with pytest.raises(
    ValueError, match=r"index.json: damaged: .*another folder"
  ):
    index.build(tmp_path, model, source, 4)


def test_a_second_builder_is_refused_and_a_reader_is_not(
  tmp_path, gallery, model
):
  source = datasets.open_images(str(gallery))
  with (
    lock.hold(tmp_path / ".lock"),
    pytest.raises(ValueError, match="works here"),
  ):
    index.build(tmp_path, model, source, 4)
  index.build(tmp_path, model, source, 4)
  with lock.hold(tmp_path / ".lock"):
    index.build(tmp_path, model, source, 4)
