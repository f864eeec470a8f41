"""Searching a gallery: the index, what is found, and what is refused."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from blip_jax import defaults
from blip_jax.data import datasets, scenes, video
from blip_jax.inference import index, search
from blip_jax.inference import model as model_lib
from blip_jax.tasks import base as tasks
from tests import helpers

QUERIES = ("a red circle", "a green star", "two squares")


@pytest.fixture
def gallery(tmp_path):
  """Nine pictures and a broken one."""
  folder = tmp_path / "gallery"
  folder.mkdir()
  rows = scenes.Scenes("val")
  for number in range(9):
    picture = PIL.Image.fromarray(rows[number]["image"])
    picture.save(folder / f"{number}.png")
  (folder / "broken.png").write_text("nothing")
  return folder


@pytest.fixture
def models(monkeypatch):
  """What is loaded, by name: two models of random weights."""
  made = {"one": helpers.make_model("itm")}
  other = helpers.make_model("itm")
  params = jax.tree.map(lambda x: 1.01 * x, other.params)
  made["other"] = model_lib.Model(
    other.card, other.module, params, other.tokenizer, other.mesh
  )
  monkeypatch.setattr(model_lib, "load", lambda name, **kwargs: made[name])
  return made


def configured(tmp_path, gallery, **changes):
  queries = tmp_path / "queries.txt"
  queries.write_text("\n".join(QUERIES) + "\n\n")
  config = defaults.search().lock()
  config.update(images=str(gallery), model="one", batch_size=4)
  config.update(out=str(tmp_path / "found.json"), top=4, rerank=3)
  config.update({"queries": str(queries), **changes})
  return config


def run(tmp_path, config):
  results = search.search(config, str(tmp_path / "work"))
  return results, json.loads((tmp_path / "found.json").read_text())


def test_what_is_found_is_what_matches(tmp_path, gallery, models):
  results, found = run(tmp_path, configured(tmp_path, gallery))
  assert results == {"queries": 3, "images": 9, "unreadable": 1}
  model = models["one"]
  match = model.match([gallery / f"{n}.png" for n in range(9)], QUERIES)
  for number, answer in enumerate(found):
    assert answer["query"] == QUERIES[number]
    nearest = np.argsort(-match.itc_cosine[:, number])[:4]
    best = nearest[:3][np.argsort(-match.rank_score[nearest[:3], number])]
    expected = [*best, nearest[3]]
    assert [one["id"] for one in answer["found"]] == [
      f"{n}.png" for n in expected
    ]
    for one, n in zip(answer["found"], expected, strict=True):
      np.testing.assert_allclose(
        one["cosine"], match.itc_cosine[n, number], atol=1e-5
      )
    for one, n in zip(answer["found"][:3], best, strict=True):
      np.testing.assert_allclose(
        [one["itm_prob"], one["rank_score"]],
        [match.itm_prob[n, number], match.rank_score[n, number]],
        atol=1e-5,
      )
    assert "itm_prob" not in answer["found"][3]
    assert answer["found"][0]["image"] == str(gallery / f"{best[0]}.png")
  with PIL.Image.open(tmp_path / "found.png") as sheet:
    assert sheet.width > sheet.height / 2 > 100


def test_a_picture_finds_itself(tmp_path, gallery, models):
  query = str(gallery / "5.png")
  _, (answer,) = run(tmp_path, configured(tmp_path, gallery, queries=query))
  first = answer["found"][0]
  assert first["id"] == "5.png" and first["cosine"] == pytest.approx(1)
  assert "itm_prob" not in first


def test_the_index_is_made_once_and_in_parts(
  tmp_path, gallery, models, monkeypatch
):
  """A job that is killed goes on behind its last part, to the same index."""
  monkeypatch.setattr(index, "PART", 4)
  source = datasets.open_images(str(gallery))
  whole = index.build(tmp_path / "whole", models["one"], source, 4)
  assert whole.ids == {n: f"{n}.png" for n in range(9)}
  assert whole.unreadable.keys() == {"broken.png"}
  embed, calls = index._embed, []

  def dies(part, rows, **kwargs):
    calls.append(part.name)
    if len(calls) == 2:
      raise KeyboardInterrupt
    embed(part, rows, **kwargs)

  monkeypatch.setattr(index, "_embed", dies)
  with pytest.raises(KeyboardInterrupt):
    index.build(tmp_path / "cut", models["one"], source, 4)
  again = index.build(tmp_path / "cut", models["one"], source, 4)
  assert len(calls) == 4 and len(set(calls)) == 3
  index.build(tmp_path / "cut", models["one"], source, 4)
  assert len(calls) == 4
  assert again.ids == whole.ids
  query = models["one"].embed_texts(QUERIES)
  for ours, expected in zip(
    again.nearest(query, 20), whole.nearest(query, 20), strict=True
  ):
    np.testing.assert_array_equal(ours, expected)
    assert ours.shape == (3, 9)
  vectors = models["one"].embed_images(gallery / f"{n}.png" for n in range(9))
  cosine = query @ vectors.T
  np.testing.assert_array_equal(
    again.nearest(query, 5).rows, np.argsort(-cosine, axis=1)[:, :5]
  )


def test_videos_are_matched_and_found(tmp_path, models):
  """Features are the mean of the frames'; texts look at all of their tokens."""
  rng = np.random.default_rng(0)
  gallery = tmp_path / "gallery"
  gallery.mkdir()
  for number in range(4):
    frames = rng.integers(0, 255, (5, 16, 16, 3)).astype(np.uint8)
    helpers.write_video(gallery / f"{number}.mkv", frames)
  (gallery / "broken.mp4").write_text("no video")
  videos = [gallery / f"{number}.mkv" for number in range(4)]
  model = models["one"]
  match = model.match(videos, QUERIES, num_frames=3)

  call = model.apply
  frames = jnp.stack([video.read(path, 3, 16) for path in videos])
  pixels = tasks.normalise(frames.reshape(12, 16, 16, 3))
  embeds = call(pixels, method="encode_image")
  projected = model.module.bind({"params": model.params}).vision_proj(
    embeds[:, 0]
  )
  mean = projected.reshape(4, 3, -1).mean(axis=1)
  mean = mean / jnp.linalg.norm(mean, axis=1, keepdims=True)
  cosine = mean @ model.embed_texts(QUERIES).T
  np.testing.assert_allclose(match.itc_cosine, cosine, atol=1e-5)
  np.testing.assert_allclose(
    model.embed_images(videos, num_frames=3), mean, atol=1e-5
  )
  kv = call(embeds.reshape(4, -1, embeds.shape[-1]), method="image_kv")
  for number, text in enumerate(QUERIES):
    ids, mask = model.tokenizer.encode([text] * 4, 35)
    logits = call(ids, mask, kv, method="match")
    np.testing.assert_allclose(
      match.rank_score[:, number], logits[:, 1] + cosine[:, number], atol=1e-5
    )

  results, found = run(
    tmp_path, configured(tmp_path, gallery, num_frames=3, rerank=4)
  )
  assert results == {"queries": 3, "images": 4, "unreadable": 1}
  for number, answer in enumerate(found):
    best = np.argsort(-match.rank_score[:, number])
    ids = [one["id"] for one in answer["found"]]
    assert ids == [f"{n}.mkv" for n in best]
  assert (tmp_path / "found.png").exists()
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="expected videos in it"):
    run(tmp_path, configured(tmp_path, tmp_path / "empty", num_frames=3))


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_faiss_finds_the_same(tmp_path, gallery, models, monkeypatch, factory):
  source = datasets.open_images(str(gallery))
  made = index.build(tmp_path / "index", models["one"], source, 4)
  query = models["one"].embed_texts(QUERIES)
  ours, theirs = made.nearest(query, 4), made.nearest(query, 4, factory)
  np.testing.assert_array_equal(ours.rows, theirs.rows)
  np.testing.assert_allclose(ours.cosine, theirs.cosine, atol=1e-5)
  with pytest.raises(ValueError, match=r"config\.faiss: 'nonsense'"):
    made.nearest(query, 4, "nonsense")
  monkeypatch.setitem(sys.modules, "faiss", None)
  with pytest.raises(ValueError, match=r"pip install 'blip_jax\[search\]'"):
    made.nearest(query, 4, factory)


def test_an_index_of_other_weights_or_pictures_is_refused(
  tmp_path, gallery, models
):
  run(tmp_path, configured(tmp_path, gallery))
  before = (tmp_path / "found.json").read_bytes()
  with pytest.raises(ValueError, match=r"other weights.*\n  weights: .*there"):
    run(tmp_path, configured(tmp_path, gallery, model="other"))
  shutil.copy(gallery / "1.png", gallery / "new.png")
  with pytest.raises(ValueError, match=r"pictures: 10 there, 11 now"):
    run(tmp_path, configured(tmp_path, gallery))
  # What was found by the index's own weights is still there.
  assert (tmp_path / "found.json").read_bytes() == before


def test_two_pictures_of_one_name_are_refused(tmp_path, models):
  class Twice(list):
    pass

  rows = Twice(
    {"image": np.zeros((8, 8, 3), np.uint8), "id": "a"} for _ in "ab"
  )
  with pytest.raises(ValueError, match="several pictures, such as 'a'"):
    index.build(tmp_path / "index", models["one"], rows, 2)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(queries=""), r"config\.queries: nothing to look for"),
    (dict(queries="nowhere.txt"), r"config\.queries: nowhere\.txt"),
    (dict(queries="nowhere.jpg"), r"nowhere\.jpg: no such picture"),
    (dict(queries="..."), "empty_caption"),
    (dict(images=""), r"config\.images: no gallery"),
    (dict(images="nowhere"), "No images in 'nowhere'"),
  ],
)
def test_mistakes_are_named_and_nothing_is_written(
  tmp_path, gallery, models, changes, message
):
  with pytest.raises(ValueError, match=message):
    run(tmp_path, configured(tmp_path, gallery, **changes))
  assert not (tmp_path / "found.json").exists()
  assert not (tmp_path / "work" / "index").exists()


def test_a_gallery_of_nothing_readable_is_refused(tmp_path, gallery, models):
  for number in range(9):
    (gallery / f"{number}.png").unlink()
  with pytest.raises(ValueError, match=r"no picture could be read.*broken.png"):
    run(tmp_path, configured(tmp_path, gallery))
  assert not (tmp_path / "found.json").exists()


def test_queries_of_a_json_file(tmp_path):
  file = tmp_path / "queries.json"
  file.write_text(json.dumps(["a dog", " a cat "]))
  assert search.read_queries(str(file)) == ["a dog", "a cat"]
  file.write_text(json.dumps([{"text": "a dog"}]))
  with pytest.raises(ValueError, match="expected a list of strings"):
    search.read_queries(str(file))
