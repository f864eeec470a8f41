"""Searching a gallery: results, videos, and refusals."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from blip_jax import defaults
from blip_jax.data import video
from blip_jax.inference import loading, search
from blip_jax.inference import model as model_lib
from blip_jax.tasks import base as tasks
from tests import helpers

QUERIES = ("a red circle", "a green star", "two squares")


@pytest.fixture
def gallery(tmp_path):
  return helpers.write_gallery(tmp_path / "gallery")


@pytest.fixture
def models(monkeypatch):
  """What `load` returns, by name: two models with random weights."""
  made = {"one": helpers.make_model("itm")}
  other = helpers.make_model("itm")
  params = jax.tree.map(lambda x: 1.01 * x, other.params)
  made["other"] = model_lib.Model(
    other.card, other.module, params, other.tokenizer, other.mesh
  )
  monkeypatch.setattr(loading, "load", lambda name, **kwargs: made[name])
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


def test_results_are_those_of_match(tmp_path, gallery, models):
  results, found = run(tmp_path, configured(tmp_path, gallery))
  assert results == {"queries": 3, "images": 9, "unreadable": 1}
  model = models["one"]
  match = model.match([gallery / f"{n}.png" for n in range(9)], QUERIES)
  for number, answer in enumerate(found):
    assert answer["query"] == QUERIES[number]
    nearest = np.argsort(-match.itc_cosine[:, number])[:4]
    best = nearest[:3][np.argsort(-match.rank_score[nearest[:3], number])]
    expected = [*best, nearest[3]]
    assert [result["id"] for result in answer["found"]] == [
      f"{n}.png" for n in expected
    ]
    for result, n in zip(answer["found"], expected, strict=True):
      np.testing.assert_allclose(
        result["cosine"], match.itc_cosine[n, number], atol=1e-5
      )
    for result, n in zip(answer["found"][:3], best, strict=True):
      np.testing.assert_allclose(
        [result["itm_prob"], result["rank_score"]],
        [match.itm_prob[n, number], match.rank_score[n, number]],
        atol=1e-5,
      )
    assert "itm_prob" not in answer["found"][3]
    assert answer["found"][0]["image"] == str(gallery / f"{best[0]}.png")
  with PIL.Image.open(tmp_path / "found.png") as sheet:
    assert sheet.width > sheet.height / 2 > 100


def test_an_image_finds_itself(tmp_path, gallery, models):
  query = str(gallery / "5.png")
  _, (answer,) = run(tmp_path, configured(tmp_path, gallery, queries=query))
  first = answer["found"][0]
  assert first["id"] == "5.png" and first["cosine"] == pytest.approx(1)
  assert "itm_prob" not in first


@pytest.mark.parametrize("faiss", ["", "Flat"])
@pytest.mark.parametrize("rerank", [0, 3])
def test_an_image_of_several_rows_is_found_once(
  tmp_path, gallery, models, faiss, rerank
):
  lists = tmp_path / "lists"
  lists.mkdir()
  rows = [
    {"image": str(gallery / f"{n}.png"), "caption": f"{n} {copy}"}
    for n in range(9)
    for copy in range(n + 1)
  ]
  (lists / "a.json").write_text(json.dumps(rows))
  options = {"faiss": faiss, "rerank": rerank}
  _, once = run(tmp_path, configured(tmp_path, gallery, **options))
  (tmp_path / "work").rename(tmp_path / "other")
  _, found = run(tmp_path, configured(tmp_path, lists / "a.json", **options))
  images_of = lambda answers: [
    [result["image"] for result in answer["found"]] for answer in answers
  ]
  assert images_of(found) == images_of(once)
  assert all(len(set(images)) == 4 for images in images_of(found))


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
  match = model.match(videos, QUERIES, num_frames=3, batch_size=4)

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
    ids = [result["id"] for result in answer["found"]]
    assert ids == [f"{n}.mkv" for n in best]
  assert (tmp_path / "found.png").exists()
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="expected videos in it"):
    run(tmp_path, configured(tmp_path, tmp_path / "empty", num_frames=3))


def test_an_index_of_other_weights_or_images_is_refused(
  tmp_path, gallery, models
):
  run(tmp_path, configured(tmp_path, gallery))
  before = (tmp_path / "found.json").read_bytes()
  with pytest.raises(ValueError, match=r"settings:\n  weights: .*there"):
    run(tmp_path, configured(tmp_path, gallery, model="other"))
  shutil.copy(gallery / "1.png", gallery / "new.png")
  with pytest.raises(ValueError, match=r"images: 10 there, 11 now"):
    run(tmp_path, configured(tmp_path, gallery))
  # The results with the weights of the index are kept.
  assert (tmp_path / "found.json").read_bytes() == before


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(queries=""), r"config\.queries: there is no query"),
    (dict(queries="nowhere.txt"), r"config\.queries: nowhere\.txt"),
    (dict(queries="nowhere.jpg"), r"nowhere\.jpg: no such image"),
    (dict(queries="..."), "empty_caption"),
    (dict(images=""), r"config\.images: no gallery"),
    (dict(batch_size=-1), r"config\.batch_size: expected at least 0, found -1"),
    (dict(top=0), r"config\.top: expected at least 1, found 0"),
    (dict(rerank=-1), r"config\.rerank: expected at least 0, found -1"),
    (dict(images="nowhere"), "No images in 'nowhere': it does not exist"),
  ],
)
def test_mistakes_are_named_and_nothing_is_written(
  tmp_path, gallery, models, changes, message
):
  with pytest.raises(ValueError, match=message):
    run(tmp_path, configured(tmp_path, gallery, **changes))
  assert not (tmp_path / "found.json").exists()
  assert not (tmp_path / "work" / "index").exists()


def test_an_unreadable_gallery_is_refused(tmp_path, gallery, models):
  for number in range(9):
    (gallery / f"{number}.png").unlink()
  with pytest.raises(ValueError, match=r"no image could be read.*broken.png"):
    run(tmp_path, configured(tmp_path, gallery))
  assert not (tmp_path / "found.json").exists()


def test_queries_of_a_json_file(tmp_path):
  file = tmp_path / "queries.json"
  file.write_text(json.dumps(["a dog", " a cat "]))
  assert search.read_queries(str(file)) == ["a dog", "a cat"]
  file.write_text(json.dumps([{"text": "a dog"}]))
  with pytest.raises(ValueError, match="expected a list of strings"):
    search.read_queries(str(file))


@pytest.mark.parametrize(
  "content, queries",
  [
    ("a dog\n\n  a cat \r\n", ["a dog", "a cat"]),
    ("a dog", ["a dog"]),
  ],
)
def test_queries_of_a_text_file(tmp_path, content, queries):
  for name in ("queries.txt", "queries.TXT"):
    (tmp_path / name).write_text(content)
    assert search.read_queries(str(tmp_path / name)) == queries


def test_a_text_is_a_query_whatever_its_last_word():
  for text in ("a dog", " a dog. ", "a photo of e.g."):
    assert search.read_queries(text) == [text.strip()]
  for nothing in ("", "  "):
    with pytest.raises(ValueError, match="there is no query"):
      search.read_queries(nothing)


def test_files_of_queries_without_queries_are_refused(tmp_path):
  for name, content, message in (
    ("a.txt", "\n\n", "there is no query"),
    ("a.json", "[]", "there is no query"),
    ("a.json", "{}", "expected a list of strings"),
    ("a.json", "[1]", "expected a list of strings"),
    ("a.json", "[", r"a\.json: "),
    ("b.json", None, "b.json"),
  ):
    if content is not None:
      (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
      search.read_queries(str(tmp_path / name))
