"""Captioning a folder: the lines, bad images, and resuming."""

import dataclasses
import json
import os
import pathlib
import shutil
import tarfile

import jax
import pytest
from ml_collections import ConfigDict

from blip_jax import defaults
from blip_jax.inference import caption_images, captioning
from blip_jax.inference import model as model_lib
from blip_jax.runtime import files, lock, sharding
from tests import helpers

GOLDEN = helpers.GOLDEN


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
  return helpers.write_captioner(tmp_path_factory.mktemp("model") / "caption")


@pytest.fixture
def images(tmp_path):
  return helpers.write_images(tmp_path / "images")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """So that a batch may have two images."""
  mesh = sharding.one_device()
  monkeypatch.setattr(sharding, "make_mesh", lambda _: mesh)


def make(captioner, images, **changes) -> ConfigDict:
  c = defaults.caption_images()
  c.update(dict(images=str(images), model=captioner, batch_size=2))
  c.update(changes)
  return c.lock()


def lines_of(path):
  return [json.loads(line) for line in pathlib.Path(path).open()]


def test_every_image_gets_a_line(captioner, images, tmp_path):
  c = make(captioner, images, sidecars=True)
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
  expected = model.caption([images / i for i in ids if i != "2b.jpg"])
  found = [line for line in lines[:6] if "caption" in line]
  assert [line["caption"] for line in found] == [x.text for x in expected]
  assert found[0]["log_prob"] == pytest.approx(expected[0].log_prob, abs=1e-3)
  assert (images / "0.txt").read_text() == f"{expected[0].text}\n"
  assert not (images / "2b.txt").exists()
  assert not list(tmp_path.glob("*.part*"))


def test_a_stopped_job_resumes(captioner, images, tmp_path, monkeypatch):
  complete = make(captioner, images, out=str(tmp_path / "complete.jsonl"))
  caption_images.caption_images(complete, str(tmp_path))

  out = tmp_path / "out.jsonl"
  c = make(captioner, images, out=str(out))
  stop_after_two(monkeypatch, c)
  assert not out.exists()
  (part,) = tmp_path.glob("out.jsonl.part*")
  with part.open("a") as file:
    file.write('{"row": 4, "id": "cut in the mid')
  caption_images.caption_images(c, str(tmp_path))
  assert out.read_text() == (tmp_path / "complete.jsonl").read_text()
  # Only the result is left, and a complete result is not written again.
  assert not [*tmp_path.glob("out.jsonl.*")]
  before = out.stat().st_mtime_ns
  caption_images.caption_images(c, str(tmp_path))
  assert out.stat().st_mtime_ns == before


def stop_after_two(monkeypatch, config):
  """Runs a job that is stopped after two of its batches."""
  numbered = caption_images._numbered

  def stopping(rows):
    for number, batch in enumerate(numbered(rows)):
      if number == 2:
        raise KeyboardInterrupt
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(caption_images, "_numbered", stopping)
    with pytest.raises(KeyboardInterrupt):
      caption_images.caption_images(config, "unused")


def other_weights(captioner, folder):
  """The same model with one parameter changed."""
  model = model_lib.load(captioner, mesh=sharding.make_mesh(None))
  params = dict(model.params)
  name = sorted(params)[0]
  params[name] = jax.tree.map(lambda x: x + 1, params[name])
  return dataclasses.replace(model, params=params)


@pytest.mark.parametrize(
  "changes, line",
  [
    ({"seed": 1}, r"\n  seed: 0 there, 1 now\n"),
    ({"prompt": "a photo"}, r"\n  prompt: '.*' there, 'a photo' now\n"),
    ({"dtype": "bfloat16"}, r"\n  dtype: 'float32' there, 'bfloat16' now\n"),
    (
      {"generation.num_beams": 2},
      r"\n  generation.num_beams: 3 there, 2 now\n",
    ),
  ],
)
def test_other_settings_are_refused(
  captioner, images, tmp_path, monkeypatch, changes, line
):
  out = tmp_path / "out.jsonl"
  stop_after_two(monkeypatch, make(captioner, images, out=str(out)))
  config = make(captioner, images, out=str(out))
  config.update_from_flattened_dict(changes)
  (part,) = tmp_path.glob("out.jsonl.part*")
  before = part.read_bytes()
  with pytest.raises(ValueError, match=line):
    caption_images.caption_images(config, "unused")
  assert part.read_bytes() == before and not out.exists()


def test_another_model_or_other_images_are_refused(
  captioner, images, tmp_path, monkeypatch
):
  out = tmp_path / "out.jsonl"
  c = make(captioner, images, out=str(out))
  stop_after_two(monkeypatch, c)
  other = other_weights(captioner, tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(model_lib, "load", lambda *_, **__: other)
    with pytest.raises(ValueError, match=r"\n  weights: '.* there, '.* now\n"):
      caption_images.caption_images(c, "unused")
  (images / "9.png").write_bytes((images / "0.png").read_bytes())
  with pytest.raises(ValueError, match=r"\n  num_images: 7 there, 8 now\n"):
    caption_images.caption_images(c, "unused")
  # As many as before, but another one in row 1.
  (images / "1.png").unlink()
  with pytest.raises(
    ValueError, match=r"row \d is '.*', but in .* start again"
  ):
    caption_images.caption_images(c, "unused")
  (tmp_path / "out.jsonl.job.json").unlink()
  with pytest.raises(ValueError, match=r"there is no out.jsonl.job.json"):
    caption_images.caption_images(c, "unused")


def test_parts_of_several_processes_become_one(tmp_path):
  out = tmp_path / "out.jsonl"
  for process, rows in enumerate([(0, 3), (1, 2)]):
    lines = [json.dumps({"row": row, "id": str(row)}) + "\n" for row in rows]
    (tmp_path / f"out.jsonl.part{process}").write_text("".join(lines))
  caption_images._join(out, 4)
  assert [line["row"] for line in lines_of(out)] == [0, 1, 2, 3]
  assert list(tmp_path.iterdir()) == [out]


def test_an_existing_text_file_is_kept(captioner, images, tmp_path):
  (images / "0.txt").write_text("mine")
  c = make(captioner, images, sidecars=True)
  caption_images.caption_images(c, str(tmp_path))
  assert (images / "0.txt").read_text() == "mine"
  assert (images / "1.txt").exists()


@pytest.mark.parametrize("ending", [".caption", ".TXT"])
def test_a_text_file_of_another_ending_is_kept(
  captioner, images, tmp_path, ending
):
  """A .txt would be read instead of it."""
  (images / f"0{ending}").write_text("mine")
  c = make(captioner, images, sidecars=True)
  caption_images.caption_images(c, str(tmp_path))
  assert not (images / "0.txt").exists()
  assert (images / "1.txt").exists()


def test_any_names_are_captioned(captioner, tmp_path):
  folder = helpers.write_hard_names(tmp_path / "images")
  (folder / os.fsdecode(b"\xff.jpg")).write_bytes(b"broken")
  for text in folder.glob("*.txt"):
    text.unlink()
  c = make(captioner, folder, sidecars=True)
  results = caption_images.caption_images(c, str(tmp_path))
  assert results == {"images": 6, "unreadable": 1}
  lines = lines_of(tmp_path / "captions.jsonl")
  names = sorted(os.listdir(folder))
  assert {files.named(line["id"]) for line in lines} == {
    name for name in names if not name.endswith(".txt")
  }
  for line in lines:
    if "caption" in line:
      text = folder / files.named(line["id"].replace(".png", ".txt"))
      assert text.read_text() == line["caption"] + "\n"


def test_an_image_that_is_gone_has_its_name_in_the_line(captioner, tmp_path):
  folder = helpers.write_hard_names(tmp_path / "images")
  listed = tmp_path / "listed.jsonl"
  names = [os.fsdecode(b"gone\xe9.jpg"), "caf\udce9.png", "half\ud83d.jpg"]
  rows = [json.dumps({"image": name}) + "\n" for name in names]
  listed.write_text("".join(rows))
  c = make(captioner, listed, image_root=str(folder))
  results = caption_images.caption_images(c, str(tmp_path))
  assert results == {"images": 3, "unreadable": 2}
  lines = lines_of(tmp_path / "captions.jsonl")
  assert lines[0]["error"] == rf"missing: {folder}/gone\xe9.jpg"
  assert "caption" in lines[1]
  assert r"half\xed\xa0\xbd.jpg" in lines[2]["error"]


def test_any_names_in_shards_are_captioned(captioner, tmp_path):
  folder = helpers.write_hard_names(tmp_path / "images")
  shard = tmp_path / os.fsdecode(b"\xe9.tar")
  with tarfile.open(shard, "w") as tar:
    for name in sorted(os.listdir(folder)):
      tar.add(folder / name, name)
  caption_images.caption_images(make(captioner, shard), str(tmp_path))
  lines = lines_of(tmp_path / "captions.jsonl")
  assert {files.named(line["id"]) for line in lines} == {
    f"{shard.name}:{name}" for name in helpers.HARD_NAMES
  }


def test_shards_and_several_samples(captioner, images, tmp_path):
  shard = tmp_path / "0.tar"
  with tarfile.open(shard, "w") as tar:
    for i in range(3):
      tar.add(images / f"{i}.png", f"{i}.png")
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


def test_impossible_jobs_are_refused(captioner, images, tmp_path):
  empty = tmp_path / "empty"
  empty.mkdir()
  run = lambda c: caption_images.caption_images(c, str(tmp_path))
  with pytest.raises(ValueError, match=r"empty.*expected images"):
    run(make(captioner, empty))
  with pytest.raises(ValueError, match=r"config.images: nothing to caption"):
    run(make(captioner, ""))
  c = make(captioner, images)
  c.generation.num_beams = 0
  with pytest.raises(ValueError, match="num_beams: expected 1"):
    run(c)
  only_bad = tmp_path / "bad"
  only_bad.mkdir()
  shutil.copy(images / "2b.jpg", only_bad)
  for _ in range(2):  # nothing is left that a second job would trust
    with pytest.raises(ValueError, match=r"bad: none of 1 .*2b.jpg: not_an"):
      run(make(captioner, only_bad))
    assert not list(tmp_path.glob("*captions.jsonl*"))


DAMAGE = [
  b"\n",
  b"\xff\xfe\n",
  b"{\n",
  b"[3]\n",
  b'{"row": 1, "id": "b',
  b'{"row": "1", "id": "x"}\n',
  b'{"row": -1, "id": "x"}\n',
  b'{"row": 1e99, "id": "x"}\n',
  b'{"row": 99, "id": "x"}\n',
  b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damaged_lines_are_captioned_again(tmp_path, number):
  """Between sound ones, so that the rows are in no order any more."""
  source = [{"image": f"{n}.png", "id": f"{n}.png"} for n in range(4)]
  out, line = (
    tmp_path / "a",
    lambda n: b'{"row": %d, "id": "%d.png"}\n' % (n, n),
  )
  part = tmp_path / "a.part0"
  part.write_bytes(line(0) + DAMAGE[number].rstrip(b"\n") + b"\n" + line(2))
  assert caption_images._rows_left([part], source).tolist() == [1, 3]
  with part.open("ab") as file:
    file.write(line(1) + line(3))
  caption_images._join(out, 4)
  rows = [json.loads(text)["row"] for text in out.read_text().splitlines()]
  assert rows == [0, 1, 2, 3]
  assert files.list_folder(tmp_path) == ["a"]


def test_a_second_job_on_the_same_output_is_refused(
  captioner, images, tmp_path
):
  c = make(captioner, images, out=str(tmp_path / "out.jsonl"))
  with (
    lock.hold(tmp_path / ".out.jsonl.lock"),
    pytest.raises(ValueError, match=rf"process {os.getpid()} on .* works here"),
  ):
    caption_images.caption_images(c, str(tmp_path))
  assert not (tmp_path / "out.jsonl").exists()


def test_numbers_of_a_line_have_four_digits():
  other = captioning.Caption("b", -1.00006, (), (), -2.0)
  best = captioning.Caption("a", -1.23456, (), (), -0.98765, (other,))
  assert caption_images._as_json(best) == {
    "caption": "a",
    "log_prob": -1.2346,
    "score": -0.9877,
    "others": [{"caption": "b", "log_prob": -1.0001, "score": -2.0}],
  }
  assert "others" not in caption_images._as_json(other)


def test_rows_without_a_line_are_left(tmp_path):
  source = [{"image": f"{n}.png", "id": f"{n}.png"} for n in range(4)]
  part = tmp_path / "a.part0"
  lines = [{"row": n, "id": f"{n}.png"} for n in (3, 0)]
  part.write_text("".join(json.dumps(line) + "\n" for line in lines))
  left = caption_images._rows_left([part], source)
  assert left.tolist() == [1, 2]
  assert caption_images._rows_left([], source).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_wait_until_all_have_read(tmp_path, monkeypatch, processes):
  waited, out = [], tmp_path / "captions.jsonl"
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  monkeypatch.setattr(
    caption_images.multihost_utils, "sync_global_devices", waited.append
  )
  source = [{"image": "0.png", "id": "0.png"}]
  left = caption_images._begin(out, {"seed": 0}, source)
  assert left.tolist() == [0] and len(waited) == processes - 1
  assert json.loads((tmp_path / "captions.jsonl.job.json").read_text())


def test_another_process_writes_no_settings(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  caption_images._begin(tmp_path / "a.jsonl", {"seed": 0}, [])
  assert not list(tmp_path.iterdir())
