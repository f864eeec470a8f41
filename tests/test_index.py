"""The index of a gallery: resuming, FAISS, and refusals."""

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


DAMAGE = [
  ("part-000000.npy", None),
  ("part-000000.npy", b""),
  ("part-000000.npy", b"\x93NUMPY"),
  ("part-000000.npy", -4),  # bytes that are cut off
  ("part-000000.npy", -4 * 64),
  ("part-000000.json", b""),
  ("part-000000.json", -20),
  ("part-000000.json", b"[]"),
  ("part-000000.json", b"{}"),
  ("part-000000.json", b'{"rows": [0], "ids": [3], "unreadable": {}}'),
  ("part-000000.json", b'{"rows": 3, "ids": 3, "unreadable": 3}'),
  ("part-000000.json", b"[" * 100_000),
  ("part-000001.json", None),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_a_damaged_part_is_embedded_again(
  tmp_path, gallery, model, monkeypatch, number
):
  monkeypatch.setattr(index, "PART", 5)
  source = datasets.open_images(str(gallery))
  index.build(tmp_path / "index", model, source, 4)
  before = {path.name: path.read_bytes() for path in tmp_path.glob("index/*")}
  name, content = DAMAGE[number]
  path = tmp_path / "index" / name
  if isinstance(content, int):
    content = path.read_bytes()[:content]
  path.unlink() if content is None else path.write_bytes(content)
  index.build(tmp_path / "index", model, source, 4)
  after = {path.name: path.read_bytes() for path in tmp_path.glob("index/*")}
  assert after == before


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
