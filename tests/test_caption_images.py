"""Captioning a folder: the lines, bad images, and resuming."""

import dataclasses
import json
import os
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from blip_jax import defaults
from blip_jax.inference import (
  caption_images,
  captioning,
  line_job,
  loading,
  stamps,
)
from blip_jax.inference import lines as lines_lib
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
  monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)


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
  model = loading.load(captioner, mesh=sharding.make_mesh(None))
  expected = model.caption([images / i for i in ids if i != "2b.jpg"])
  found = [line for line in lines[:6] if "caption" in line]
  assert [line["caption"] for line in found] == [x.text for x in expected]
  assert found[0]["log_prob"] == pytest.approx(expected[0].log_prob, abs=1e-3)
  assert (images / "0.txt").read_text() == f"{expected[0].text}\n"
  assert not (images / "2b.txt").exists()
  assert not list(tmp_path.glob("*.part*"))


def test_a_folder_of_videos(captioner, images, tmp_path):
  """Images among them are no videos."""
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 255, (6, 16, 16, 3), np.uint8)
  for name in ("a.mkv", "b.mp4"):
    helpers.write_video(images / name, frames)
  (images / "c.avi").write_text("nothing")
  c = make(captioner, images, num_frames=3)
  results = caption_images.caption_images(c, str(tmp_path))
  assert results == {"images": 3, "unreadable": 1}
  lines = lines_of(tmp_path / "captions.jsonl")
  assert [line["id"] for line in lines] == ["a.mkv", "b.mp4", "c.avi"]
  assert lines[2]["error"].startswith("broken_video")
  model = loading.load(captioner, mesh=sharding.make_mesh(None))
  (expected,) = model.caption(images / "a.mkv", num_frames=3)
  assert [line["caption"] for line in lines[:2]] == [expected.text] * 2


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
  # A complete result is not written again. Its settings are kept beside it.
  (settings,) = tmp_path.glob("out.jsonl.*")
  assert settings.name == "out.jsonl.job.json"
  before = out.stat().st_mtime_ns
  caption_images.caption_images(c, str(tmp_path))
  assert out.stat().st_mtime_ns == before


@pytest.fixture
def finished(captioner, images, tmp_path):
  """The config of a finished job, and its result."""
  out = tmp_path / "out.jsonl"
  c = make(captioner, images, out=str(out))
  caption_images.caption_images(c, str(tmp_path))
  return c, out


def test_a_result_is_of_one_model_and_prompt(finished, tmp_path):
  c, out = finished
  before = out.read_text()
  c.prompt = "a red "
  with pytest.raises(ValueError, match=r"\n  prompt: .* there, 'a red ' now\n"):
    caption_images.caption_images(c, str(tmp_path))
  assert out.read_text() == before
  # Once the result is deleted, nothing forbids another one.
  out.unlink()
  caption_images.caption_images(c, str(tmp_path))
  settings = json.loads(out.with_name("out.jsonl.job.json").read_text())
  assert settings["prompt"] == "a red " and len(lines_of(out)) == 7


def test_a_changed_caption_of_a_result_is_seen(finished, tmp_path):
  c, out = finished
  settings = out.with_name("out.jsonl.job.json")
  raw = out.read_bytes()
  at = raw.index(b'"caption": "') + len(b'"caption": "')
  out.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
  with pytest.raises(files.DamagedFile, match=r"out\.jsonl: damaged: its SHA"):
    caption_images.caption_images(c, str(tmp_path))
  settings.unlink()  # as the error says, to keep what was changed
  caption_images.caption_images(c, str(tmp_path))
  assert out.read_bytes() != raw


def test_a_job_that_died_before_its_last_file_is_finished(finished, tmp_path):
  c, out = finished
  settings = out.with_name("out.jsonl.job.json")
  complete = settings.read_bytes()
  without = json.loads(complete)
  del without["sha256"]
  settings.write_text(json.dumps(without))
  caption_images.caption_images(c, str(tmp_path))
  assert settings.read_bytes() == complete


def stop_after_two(monkeypatch, config):
  """Runs a job that is stopped after two of its batches."""
  numbered = line_job._numbered

  def stopping(rows):
    for number, batch in enumerate(numbered(rows)):
      if number == 2:
        raise KeyboardInterrupt
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(line_job, "_numbered", stopping)
    with pytest.raises(KeyboardInterrupt):
      caption_images.caption_images(config, "unused")


def other_weights(captioner, folder):
  """The same model with one parameter changed."""
  model = loading.load(captioner, mesh=sharding.make_mesh(None))
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
    patch.setattr(loading, "load", lambda *_, **__: other)
    with pytest.raises(ValueError, match=r"\n  weights: '.* there, '.* now\n"):
      caption_images.caption_images(c, "unused")
  (images / "9.png").write_bytes((images / "0.png").read_bytes())
  with pytest.raises(ValueError, match=r"\n  num_images: 7 there, 8 now\n"):
    caption_images.caption_images(c, "unused")
  (tmp_path / "out.jsonl.job.json").unlink()
  with pytest.raises(ValueError, match=r"there is no out.jsonl.job.json"):
    caption_images.caption_images(c, "unused")


def complete_and_changed(captioner, images, tmp_path, monkeypatch, change):
  """The lines of a job that was stopped before a change, and of one after."""
  out = tmp_path / "out.jsonl"
  c = make(captioner, images, out=str(out))
  stop_after_two(monkeypatch, c)
  change()
  caption_images.caption_images(c, str(tmp_path))
  fresh = make(captioner, images, out=str(tmp_path / "fresh.jsonl"))
  caption_images.caption_images(fresh, str(tmp_path))
  assert not [*tmp_path.glob("out.jsonl.part*")]
  return out.read_text(), (tmp_path / "fresh.jsonl").read_text()


def other_rows(images):
  (images / "1.png").unlink()
  shutil.copy(images / "0.png", images / "9.png")


def overwritten(images):
  before = os.stat(images / "0.png")
  (images / "0.png").write_bytes((images / "1.png").read_bytes())
  os.utime(images / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns))


def swapped(images):
  """Of equal size and time, by their names."""
  for name in ("0.png", "1.png"):
    os.utime(images / name, (1e9, 1e9))
  (images / "0.png").rename(images / "x")
  (images / "1.png").rename(images / "0.png")
  (images / "x").rename(images / "1.png")


@pytest.mark.parametrize("change", [other_rows, overwritten, swapped])
def test_images_that_changed_are_captioned_again(
  captioner, images, tmp_path, monkeypatch, change
):
  found, expected = complete_and_changed(
    captioner, images, tmp_path, monkeypatch, lambda: change(images)
  )
  assert found == expected


def test_rows_of_a_list_that_changed_are_captioned_again(
  captioner, images, tmp_path, monkeypatch
):
  """Their ids are still the same."""
  listed = tmp_path / "a.json"
  names = [f"{n}.png" for n in (0, 1, 2, 3, 4)]
  write = lambda names: listed.write_text(
    json.dumps([{"image": str(images / name)} for name in names])
  )
  write(names)
  found, expected = complete_and_changed(
    captioner, listed, tmp_path, monkeypatch, lambda: write(names[::-1])
  )
  assert found == expected


def test_shards_that_changed_are_captioned_again(
  captioner, images, tmp_path, monkeypatch
):
  """Rows of shards are not read to find out."""
  shard = tmp_path / "0.tar"

  def write(order):
    with tarfile.open(shard, "w") as tar:
      for name, number in zip("abcde", order, strict=True):
        tar.add(images / f"{number}.png", f"{name}.png")

  write((0, 1, 2, 3, 4))
  found, expected = complete_and_changed(
    captioner, shard, tmp_path, monkeypatch, lambda: write((4, 3, 2, 1, 0))
  )
  assert found == expected
  c = make(captioner, shard, out=str(tmp_path / "resumed.jsonl"))
  stop_after_two(monkeypatch, c)
  read, reads = files.read_range, []
  monkeypatch.setattr(
    files, "read_range", lambda *a: reads.append(a) or read(*a)
  )
  caption_images.caption_images(c, str(tmp_path))
  assert len([a for a in reads if a[0] == str(shard)]) == 1
  assert (tmp_path / "resumed.jsonl").read_text() == expected


def line_of(row, **changes):
  line = {"row": row, "id": f"{row}.png", "caption": "a"}
  return line | {"log_prob": -1.0, "score": -1.0} | changes


def text_of(*lines):
  return "".join(json.dumps(line) + "\n" for line in lines)


def test_parts_of_several_processes_become_one(tmp_path):
  out = tmp_path / "out.jsonl"
  for process, rows in enumerate([(0, 3), (1, 2)]):
    (tmp_path / f"out.jsonl.part{process}").write_text(
      text_of(*(line_of(row, stamp=[1, 2, 3]) for row in rows))
    )
  assert lines_lib.join(out, 4) == (0, "")
  assert lines_of(out) == [line_of(row) for row in range(4)]
  assert list(tmp_path.iterdir()) == [out]


def test_the_result_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
  synced = []
  sync = lambda _: synced.append(files.list_folder(tmp_path))
  monkeypatch.setattr(os, "fsync", sync)
  (tmp_path / "a.part0").write_text(text_of(line_of(0)))
  lines_lib.join(tmp_path / "a", 1)
  assert len(synced) == 1 and "a" not in synced[0]


def test_rows_without_a_line_are_no_result(tmp_path):
  (tmp_path / "a.part0").write_text(text_of(line_of(0), line_of(2)))
  with pytest.raises(ValueError, match="1 of 3 images have no line"):
    lines_lib.join(tmp_path / "a", 3)
  assert files.list_folder(tmp_path) == ["a.part0"]


def test_files_of_others_are_left_alone(
  captioner, images, tmp_path, monkeypatch
):
  c = make(captioner, images, out=str(tmp_path / "out.jsonl"))
  stop_after_two(monkeypatch, c)
  endings = ("", "ner.txt", "0 (copy)", "0~", "00", "-1", "\u0661", "1.bak")
  names = [f"out.jsonl.part{ending}" for ending in endings]
  for name in names:
    (tmp_path / name).write_text("mine")
  (tmp_path / "out.jsonl.parts").mkdir()
  caption_images.caption_images(c, str(tmp_path))
  assert all((tmp_path / name).read_text() == "mine" for name in names)
  assert not (tmp_path / "out.jsonl.part0").exists()
  assert len(lines_of(tmp_path / "out.jsonl")) == 7


@pytest.mark.parametrize(
  "name",
  ["out.jsonl.part1", "out.jsonl.job.json", "out.jsonl", ".out.jsonl.lock"],
)
@pytest.mark.parametrize("make_other", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_named(
  captioner, images, tmp_path, name, make_other
):
  make_other(tmp_path / name)
  c = make(captioner, images, out=str(tmp_path / "out.jsonl"))
  with pytest.raises(ValueError, match=rf"{name}: .*expected a file"):
    caption_images.caption_images(c, str(tmp_path))
  assert files.list_folder(tmp_path) == sorted(["images", name])


COMPLETE = text_of(*map(line_of, range(7)))
NOT_COMPLETE = [
  ("", "0 complete lines"),
  (COMPLETE[:-9], "6 complete lines"),
  (COMPLETE[:-1], "6 complete lines"),
  ("\0" * len(COMPLETE), "0 complete lines"),
  (COMPLETE.replace(text_of(line_of(3)), ""), "line 4 is of '4.png'"),
  (COMPLETE + text_of(line_of(6)), "line 8 is of '6.png'"),
  (COMPLETE.replace("0.png", "x.png"), "line 1 is of 'x.png'"),
  (COMPLETE.replace('"caption"', '"x"', 1), "line 1 is damaged"),
  (text_of(*map(line_of, range(6, -1, -1))), "line 1 is of '6.png'"),
]


@pytest.mark.parametrize("number", range(len(NOT_COMPLETE)))
def test_a_result_that_is_not_complete_is_refused(tmp_path, number):
  source = [{"image": f"{n}.png", "id": f"{n}.png"} for n in range(7)]
  out, (text, message) = tmp_path / "a", NOT_COMPLETE[number]
  out.write_text(COMPLETE)
  lines_lib.check_complete(out, source)
  out.write_text(text)
  with pytest.raises(ValueError, match=f"a line for each of 7 .*{message}"):
    lines_lib.check_complete(out, source)


def test_a_job_refuses_a_result_of_other_images(captioner, images, tmp_path):
  c = make(captioner, images, out=str(tmp_path / "out.jsonl"))
  caption_images.caption_images(c, str(tmp_path))
  assert caption_images.caption_images(c, str(tmp_path)) == {"images": 7}
  other_rows(images)
  before = (tmp_path / "out.jsonl").read_bytes()
  with pytest.raises(ValueError, match=r"line 2 is of '1.png'.*Delete it"):
    caption_images.caption_images(c, str(tmp_path))
  assert (tmp_path / "out.jsonl").read_bytes() == before


def test_an_existing_text_file_is_kept(captioner, images, tmp_path):
  (images / "0.txt").write_text("mine")
  c = make(captioner, images, sidecars=True)
  caption_images.caption_images(c, str(tmp_path))
  assert (images / "0.txt").read_text() == "mine"
  assert (images / "1.txt").exists()


def test_a_text_file_that_cannot_be_written_costs_itself(
  captioner, images, tmp_path, monkeypatch, caplog
):
  (images / "1.txt").mkdir()
  write = files.write_text

  def refused(path, text):
    if str(path).endswith("3.txt"):
      raise PermissionError(13, "Permission denied", path)
    write(path, text)

  monkeypatch.setattr(files, "write_text", refused)
  c = make(captioner, images, sidecars=True)
  results = caption_images.caption_images(c, str(tmp_path))
  assert results == {"images": 7, "unreadable": 1, "unwritten_text_files": 2}
  assert len(lines_of(tmp_path / "captions.jsonl")) == 7
  assert (images / "2.txt").exists() and (images / "4.txt").exists()
  for name in ("1.txt", "3.txt"):
    assert f"Not written: {images / name}: " in caplog.text
  assert "2 text files could not be written" in caplog.text
  assert ".tmp" not in caplog.text


def test_a_full_disk_ends_the_job(captioner, images, tmp_path, monkeypatch):
  write = files.write_text

  def full(path, text):
    if str(path).endswith(".txt"):
      raise OSError(28, "No space left on device", path)
    write(path, text)

  monkeypatch.setattr(files, "write_text", full)
  with pytest.raises(OSError, match="No space left"):
    caption_images.caption_images(
      make(captioner, images, sidecars=True), str(tmp_path)
    )


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
  c.batch_size = -1
  with pytest.raises(
    ValueError, match=r"config\.batch_size: expected at least"
  ):
    run(c)
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
  b"\0" * 300,
  b'{"row": 1, "id": "b',
  b"[" * 100_000 + b"\n",
  *(
    text_of(line).encode()
    for line in (
      line_of("1"),
      line_of(-1),
      line_of(1e99),
      line_of(99),
      line_of(True, id="1.png"),
      line_of(1, id="nonsense"),
      line_of(1, id=1),
      line_of(1, caption=None),
      line_of(1, log_prob="x"),
      line_of(1, others=[{"caption": "a"}]),
      line_of(1, others=3),
      line_of(1, stamp=[1, 2, 3]),
      line_of(1, image_id=3),
      {"row": 1, "id": "1.png"},
      {"row": 1, "id": "1.png", "error": 3},
    )
  ),
]


def rows_left(out, source):
  """Resumes a job, as its first process."""
  return line_job._begin(
    out, {"seed": 0}, source, stamps.Stamps(source)
  ).tolist()


@pytest.mark.parametrize("number", range(len(DAMAGE)))
@pytest.mark.parametrize("process", [0, 3])
def test_damaged_lines_are_captioned_again(tmp_path, number, process):
  """Between sound ones, so that the rows are in no order any more."""
  source = [{"image": f"{n}.png", "id": f"{n}.png"} for n in range(4)]
  out = tmp_path / "a"
  (tmp_path / "a.job.json").write_text('{"seed": 0}')
  line = lambda n: text_of(line_of(n)).encode()
  (tmp_path / f"a.part{process}").write_bytes(
    line(0) + DAMAGE[number].rstrip(b"\n") + b"\n" + line(2)
  )
  assert rows_left(out, source) == [1, 3]
  with (tmp_path / "a.part0").open("ab") as file:
    file.write(line(1) + line(3))
  assert rows_left(out, source) == []
  assert lines_lib.join(out, 4) == (0, "")
  assert lines_of(out) == [line_of(n) for n in range(4)]
  assert files.list_folder(tmp_path) == ["a", "a.job.json"]


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
  assert rows_left(tmp_path / "a", source) == [0, 1, 2, 3]
  (tmp_path / "a.part0").write_text(text_of(line_of(3), line_of(0)))
  assert rows_left(tmp_path / "a", source) == [1, 2]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_wait_until_all_have_read(tmp_path, monkeypatch, processes):
  waited, out = [], tmp_path / "captions.jsonl"
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  monkeypatch.setattr(
    line_job.multihost_utils, "sync_global_devices", waited.append
  )
  source = [{"image": "0.png", "id": "0.png"}]
  assert rows_left(out, source) == [0] and len(waited) == processes - 1
  assert json.loads((tmp_path / "captions.jsonl.job.json").read_text())


def test_another_process_writes_no_settings_and_only_its_own_part(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    line_job.multihost_utils, "sync_global_devices", lambda _: None
  )
  assert rows_left(tmp_path / "a", []) == []
  assert not list(tmp_path.iterdir())
  (tmp_path / "a.job.json").write_text('{"seed": 0}')
  for process in range(4):
    (tmp_path / f"a.part{process}").write_text("{}\n")
  assert rows_left(tmp_path / "a", []) == []
  sizes = [(tmp_path / f"a.part{n}").stat().st_size for n in range(4)]
  assert sizes == [3, 0, 3, 0]
