"""Captioning a folder: what is written, bad pictures, and going on."""

import json
import pathlib
import shutil
import tarfile

import pytest
from ml_collections import ConfigDict

from blip_jax import defaults
from blip_jax.inference import caption_images
from blip_jax.inference import model as model_lib
from blip_jax.runtime import sharding
from tests import helpers

GOLDEN = helpers.GOLDEN


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
  return helpers.write_captioner(tmp_path_factory.mktemp("model") / "caption")


@pytest.fixture
def pictures(tmp_path):
  return helpers.write_images(tmp_path / "pictures")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """So that a batch may have two pictures."""
  mesh = sharding.one_device()
  monkeypatch.setattr(sharding, "make_mesh", lambda _: mesh)


def make(captioner, images, **changes) -> ConfigDict:
  c = defaults.caption_images()
  c.update(dict(images=str(images), model=captioner, batch_size=2))
  c.update(changes)
  return c.lock()


def lines_of(path):
  return [json.loads(line) for line in pathlib.Path(path).open()]


def test_a_line_for_every_picture(captioner, pictures, tmp_path):
  c = make(captioner, pictures, sidecars=True)
  results = caption_images.caption_images(c, str(tmp_path))
  assert results == {"images": 7, "unreadable": 1}
  lines = lines_of(tmp_path / "captions.jsonl")
  ids = ["0.png", "1.png", "2.png", "2b.jpg", "3.png", "4.png"]
  assert [line["id"] for line in lines] == [
    *ids,
    helpers.DEEP_IMAGE,
  ]
  assert [line["row"] for line in lines] == list(range(7))
  assert lines[6]["image_id"] == 17
  assert lines[3]["error"].startswith("not_an_image")
  assert "caption" not in lines[3]
  model = model_lib.load(captioner, mesh=sharding.make_mesh(None))
  expected = model.caption([pictures / i for i in ids if i != "2b.jpg"])
  found = [line for line in lines[:6] if "caption" in line]
  assert [line["caption"] for line in found] == [x.text for x in expected]
  assert found[0]["log_prob"] == pytest.approx(expected[0].log_prob, abs=1e-3)
  assert (pictures / "0.txt").read_text() == f"{expected[0].text}\n"
  assert not (pictures / "2b.txt").exists()
  assert not list(tmp_path.glob("*.part*"))


def test_it_goes_on_where_it_was_stopped(
  captioner, pictures, tmp_path, monkeypatch
):
  whole = make(captioner, pictures, out=str(tmp_path / "whole.jsonl"))
  caption_images.caption_images(whole, str(tmp_path))

  out = tmp_path / "out.jsonl"
  c = make(captioner, pictures, out=str(out))
  batches = caption_images._batches

  def stop_after_two(rows):
    for number, batch in enumerate(batches(rows)):
      if number == 2:
        raise KeyboardInterrupt
      yield batch

  monkeypatch.setattr(caption_images, "_batches", stop_after_two)
  with pytest.raises(KeyboardInterrupt):
    caption_images.caption_images(c, str(tmp_path))
  assert not out.exists()
  (part,) = tmp_path.glob("out.jsonl.part*")
  with part.open("a") as file:
    file.write('{"row": 4, "id": "cut in the mid')
  monkeypatch.setattr(caption_images, "_batches", batches)
  caption_images.caption_images(c, str(tmp_path))
  assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
  # What is whole is not written again.
  before = out.stat().st_mtime_ns
  caption_images.caption_images(c, str(tmp_path))
  assert out.stat().st_mtime_ns == before


def test_other_pictures_are_not_mixed_in(captioner, pictures, tmp_path):
  out = tmp_path / "out.jsonl"
  c = make(captioner, pictures, out=str(out))
  (tmp_path / "out.jsonl.part0").write_text(
    '{"row": 1, "id": "another.png", "caption": "a"}\n'
  )
  with pytest.raises(ValueError, match=r"row 1 is 'another.png'.*begin anew"):
    caption_images.caption_images(c, str(tmp_path))


def test_parts_of_several_processes_become_one(tmp_path):
  out = tmp_path / "out.jsonl"
  for process, rows in enumerate([(0, 3), (1, 2)]):
    lines = [json.dumps({"row": row, "id": str(row)}) + "\n" for row in rows]
    (tmp_path / f"out.jsonl.part{process}").write_text("".join(lines))
  caption_images._join(out)
  assert [line["row"] for line in lines_of(out)] == [0, 1, 2, 3]
  assert list(tmp_path.iterdir()) == [out]


def test_a_text_that_is_there_is_not_written_over(
  captioner, pictures, tmp_path
):
  (pictures / "0.txt").write_text("mine")
  c = make(captioner, pictures, sidecars=True)
  caption_images.caption_images(c, str(tmp_path))
  assert (pictures / "0.txt").read_text() == "mine"
  assert (pictures / "1.txt").exists()


def test_shards_and_several_samples(captioner, pictures, tmp_path):
  shard = tmp_path / "0.tar"
  with tarfile.open(shard, "w") as tar:
    for i in range(3):
      tar.add(pictures / f"{i}.png", f"{i}.png")
  c = make(captioner, shard)
  c.generation.sample = True
  c.generation.num_return_sequences = 3
  c.generation.max_new_tokens = 6
  caption_images.caption_images(c, str(tmp_path))
  lines = lines_of(tmp_path / "captions.jsonl")
  assert [line["id"] for line in lines] == ["0.tar:0", "0.tar:1", "0.tar:2"]
  assert all(len(line["others"]) == 2 for line in lines)
  texts = {
    text["caption"] for line in lines for text in (line, *line["others"])
  }
  assert len(texts) > 3
  (tmp_path / "captions.jsonl").unlink()
  with pytest.raises(ValueError, match=r"config.sidecars"):
    caption_images.caption_images(
      make(captioner, shard, sidecars=True), str(tmp_path)
    )


def test_what_is_refused(captioner, pictures, tmp_path):
  empty = tmp_path / "empty"
  empty.mkdir()
  run = lambda c: caption_images.caption_images(c, str(tmp_path))
  with pytest.raises(ValueError, match=r"empty.*expected pictures"):
    run(make(captioner, empty))
  with pytest.raises(ValueError, match=r"config.images: nothing to caption"):
    run(make(captioner, ""))
  c = make(captioner, pictures)
  c.generation.num_beams = 0
  with pytest.raises(ValueError, match="num_beams: expected 1"):
    run(c)
  only_bad = tmp_path / "bad"
  only_bad.mkdir()
  shutil.copy(pictures / "2b.jpg", only_bad)
  assert run(make(captioner, only_bad))["unreadable"] == 1
