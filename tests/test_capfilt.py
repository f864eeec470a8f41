"""The job: what is written, exactly once, whatever happens to its processes."""

import errno
import functools
import gc
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import socket
import subprocess
import sys
import tarfile
import time

import jax
import numpy as np
import PIL.Image
import psutil
import pytest

from blip_jax import defaults
from blip_jax.capfilt import (
  audit,
  job,
  label,
  ledger,
  rows,
  work_units,
)
from blip_jax.data import datasets, scenes
from blip_jax.inference import model as model_lib
from blip_jax.models import families
from blip_jax.runtime import sharding
from tests import QUICK_TO_COMPILE, helpers

SCENES = scenes.Scenes("train", size=16, num=400, noise=0.4)


def png(pixels):
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, "png")
  return file.getvalue()


def write_shard(path, samples):
  """A tar of (name, bytes) members."""
  with tarfile.open(path, "w") as tar:
    for name, content in samples:
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return path


def members(start, number):
  for n in range(start, start + number):
    record = SCENES[n]
    yield f"{n:04d}.png", png(record["image"])
    yield f"{n:04d}.txt", record["caption"].encode()


@pytest.fixture
def shards(tmp_path):
  """Three shards of five pictures; one is broken, and one has no text."""
  folder = tmp_path / "shards"
  folder.mkdir()
  for shard in range(3):
    found = dict(members(5 * shard, 5))
    if shard == 1:
      found["0006.png"] = b"\x89PNG no more"
      del found["0008.txt"]
      found["0009.txt"] = b"..."
    write_shard(folder / f"{shard:05d}.tar", found.items())
  return folder


def load(name, task, mesh, **_):
  """Stands for `model_lib.load`: random weights, by name."""
  return made(name, task, mesh)


@functools.cache  # so that all tests have the same programs
def made(name, task, mesh):
  model = helpers.make_model(task, mesh)
  if name == "other":
    params = jax.tree.map(lambda x: 1.01 * x, model.params)
    model = model_lib.Model(
      model.card, model.module, params, model.tokenizer, mesh
    )
  return model


@pytest.fixture(autouse=True)
def models(monkeypatch):
  monkeypatch.setattr(model_lib, "load", load)


def configured(source, out, **changes):
  config = defaults.capfilt().lock()
  config.update(
    source=(str(source),), out=str(out), per_device_batch_size=1, num_threads=2
  )
  config.update(captioner="one", filter="one")
  config.generation.update(max_length=8, min_length=4)
  config.update(changes)
  return config


def run(config):
  return job.run(config, config.out)


def content(folder):
  """What has to be the same bytes, by name."""
  return {
    path.name: path.read_bytes()
    for path in sorted(pathlib.Path(folder).iterdir())
    if path.suffix in (".json", ".parquet")
  }


def test_every_text_has_a_row_and_everything_is_counted(shards, tmp_path):
  results = run(configured(shards / "*.tar", tmp_path / "out"))
  assert results["units_done"] == 3
  assert results["pictures/in"] == 15
  assert results["pictures/bad"] == 1
  assert results["web/in"] == 14  # of the broken picture, none is looked at
  assert results["web/bad"] == 2
  assert results["synthetic/in"] == 14
  for kind in ("pictures", "web", "synthetic"):
    parts = [results[f"{kind}/{fate}"] for fate in ("kept", "dropped", "bad")]
    assert results[f"{kind}/in"] == sum(parts)

  found = rows.read(tmp_path / "out" / "00001.parquet")
  own = [row for row in found if row["key"] == "00001.tar:0007"]
  assert [row["source"] for row in own] == ["web", "synthetic"]
  assert own[0]["text"] == SCENES[7]["caption"]
  assert own[0]["log_prob"] is None
  assert own[1]["log_prob"] < 0
  for row in own:
    assert 0 <= row["itm_prob"] <= 1
    assert row["kept"] == (row["itm_prob"] >= 0.5)
    assert row["seed"] == 0
    assert len(row["filter"]) == 16
  why = {row["key"]: row["reason"] for row in found if row["itm_prob"] is None}
  assert why == {
    "00001.tar:0008": "missing_caption",
    "00001.tar:0009": "empty_caption",
  }
  told = json.loads((tmp_path / "out" / "00001.done.json").read_text())
  assert told["input"]["bytes"] == (shards / "00001.tar").stat().st_size
  assert told["filter"] == found[0]["filter"]
  (key, reason), *others = told["bad"].items()
  assert key == "00001.tar:0006"
  assert reason.startswith("unreadable") or "image" in reason
  assert not others


def test_scores_and_captions_are_those_of_the_models(shards, tmp_path):
  run(configured(shards / "*.tar", tmp_path / "out", seed=3))
  found = rows.read(tmp_path / "out" / "00000.parquet")
  mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1))
  judge, captioner = load("one", "itm", mesh), load("one", "caption", mesh)
  pictures = [SCENES[n]["image"] for n in range(5)]
  for row in found:
    picture = pictures[row["row"]]
    match = judge.match(picture, row["text"])
    np.testing.assert_allclose(row["itm_prob"], match.itm_prob[0, 0], rtol=1e-4)
    np.testing.assert_allclose(
      row["itc_cosine"], match.itc_cosine[0, 0], atol=1e-5
    )
  write = captioner.captioner(
    sample=True, top_p=0.9, num_return_sequences=1, max_length=8, min_length=4
  )
  keys = [f"00000.tar:{n:04d}" for n in range(5)]
  pixels = np.stack([*map(captioner.image, pictures)] + 3 * [pictures[0]])
  written = write(pixels, 3, [*map(label.image_seed, keys), 0, 0, 0])
  synthetic = [row["text"] for row in found if row["source"] == "synthetic"]
  assert synthetic == [caption.text for caption in written[:5]]


def test_one_kind_of_work_alone(shards, tmp_path):
  judged = run(configured(shards / "*.tar", tmp_path / "a", captioner=""))
  assert judged["synthetic/in"] == 0
  written = run(configured(shards / "*.tar", tmp_path / "b", web_texts=False))
  assert written["web/in"] == 0
  assert written["synthetic/in"] == 14


def test_a_list_is_cut_into_units(tmp_path):
  names = []
  for n in range(5):
    (tmp_path / f"{n}.png").write_bytes(png(SCENES[n]["image"]))
    texts = [SCENES[n]["caption"], "a red circle"]
    names.append({"image": f"{n}.png", "caption": texts, "image_id": n})
  (tmp_path / "web.json").write_text(json.dumps(names))
  config = configured(tmp_path / "web.json", tmp_path / "out", work_unit_rows=2)
  config.image_root = str(tmp_path)
  results = run(config)
  assert results["units"] == 3
  assert results["web/in"] == 10
  found = rows.read(tmp_path / "out" / "web.json-00002.parquet")
  assert {row["key"] for row in found} == {"web.json:4"}
  assert {row["image"] for row in found} == {str(tmp_path / "4.png")}
  assert {row["image_id"] for row in found} == {"4"}


def test_what_is_done_is_not_done_again(shards, tmp_path):
  config = configured(shards / "*.tar", tmp_path / "out")
  run(config)
  before = content(config.out)
  ages = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
  (tmp_path / "out" / "00001.done.json").unlink()
  (tmp_path / "out" / "00001.parquet").write_bytes(b"half")
  run(config)
  assert content(config.out) == before
  again = [p.name for p, age in ages.items() if p.stat().st_mtime_ns != age]
  assert again == ["00001.parquet"]


def test_another_seed_writes_other_captions(shards, tmp_path):
  texts = []
  for seed in (0, 1):
    run(configured(shards / "*.tar", tmp_path / str(seed), seed=seed))
    found = rows.read(tmp_path / str(seed) / "00000.parquet")
    texts.append([r["text"] for r in found if r["source"] == "synthetic"])
  assert texts[0] != texts[1]


def test_other_settings_are_refused_and_forced(shards, tmp_path):
  config = configured(shards / "*.tar", tmp_path / "out")
  run(config)
  before = content(config.out)
  other = configured(shards / "*.tar", tmp_path / "out", filter="other")
  with pytest.raises(ValueError, match=r"filter: .* there, .* now"):
    run(other)
  assert content(config.out) == before
  other.force = True
  run(other)
  after = content(config.out)
  assert all(before[name] != after[name] for name in before)
  # Half done with new settings, the old ones would mix them.
  with pytest.raises(ValueError, match=r"config\.force"):
    run(config)


def test_a_new_shard_joins_and_a_changed_one_is_done_again(shards, tmp_path):
  config = configured(shards / "*.tar", tmp_path / "out")
  run(config)
  write_shard(shards / "00003.tar", members(20, 5))
  write_shard(shards / "00000.tar", members(30, 4))  # of the same size
  results = run(config)
  assert results["pictures/in"] == 19
  found = rows.read(tmp_path / "out" / "00000.parquet")
  assert found[0]["text"] == SCENES[30]["caption"]


def test_a_damaged_shard_costs_no_other(shards, tmp_path):
  whole = (shards / "00002.tar").read_bytes()
  (shards / "00002.tar").write_bytes(whole[: len(whole) // 2 - 700])
  (shards / "00003.tar").write_bytes(b"no tar at all")
  results = run(configured(shards / "*.tar", tmp_path / "out"))
  assert results["units_done"] == 4
  assert 10 < results["pictures/in"] < 15
  for name in ("00002", "00003"):
    told = json.loads((tmp_path / "out" / f"{name}.done.json").read_text())
    assert told["damage"]


def test_hostile_members_are_not_followed(tmp_path):
  folder = tmp_path / "shards"
  folder.mkdir()
  path = folder / "0.tar"
  bomb = PIL.Image.new("1", (30_000, 30_000))
  file = io.BytesIO()
  bomb.save(file, "png")
  samples = dict(members(0, 2)) | {
    "../../escape.png": png(SCENES[0]["image"]),
    "/absolute.png": png(SCENES[1]["image"]),
    "evil.pkl": b"cos\nsystem\n(S'touch evil'\ntR.",
    "bomb.png": file.getvalue(),
    "bomb.txt": b"a red circle",
  }
  with tarfile.open(path, "w") as tar:
    for name, raw in samples.items():
      member = tarfile.TarInfo(name)
      member.size = len(raw)
      tar.addfile(member, io.BytesIO(raw))
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(link)
  before = {*tmp_path.rglob("*")}
  run(configured(path, tmp_path / "out"))
  new = {*tmp_path.rglob("*")} - before
  assert all(tmp_path / "out" in (p, *p.parents) for p in new)
  told = json.loads((tmp_path / "out" / "0.done.json").read_text())
  assert {k: v.partition(":")[0] for k, v in told["bad"].items()} == {
    "0.tar:bomb": "too_large"
  }


def test_texts_that_are_none_are_counted(tmp_path):
  huge = b"red " * 100_000
  pictures = [png(SCENES[n]["image"]) for n in range(3)]
  path = write_shard(
    tmp_path / "0.tar",
    [
      ("a.png", pictures[0]),
      ("a.txt", huge),
      ("b.png", pictures[1]),
      ("b.txt", b"\xff\xfe broken"),
      ("c.png", pictures[2]),
      ("c.txt", b"<b>a red circle</b>"),
    ],
  )
  results = run(configured(path, tmp_path / "out"))
  assert results["web/bad"] == 2
  found = rows.read(tmp_path / "out" / "0.parquet")
  assert [r["reason"] for r in found if r["itm_prob"] is None] == [
    "too_long",
    "invalid_utf8",
  ]
  assert max(len(row["text"]) for row in found) <= 200


def test_no_picture_at_all_is_an_error(tmp_path):
  path = write_shard(tmp_path / "0.tar", [("a.png", b"no"), ("a.txt", b"a")])
  with pytest.raises(ValueError, match=r"no picture could be used; 0\.tar:a"):
    run(configured(path, tmp_path / "out"))


def test_a_missing_extra_is_told_before_anything_is_done(
  shards, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ValueError, match=r"pip install 'blip_jax\[parquet\]'"):
    run(configured(shards / "*.tar", tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_two_shards_of_one_name_are_refused(shards, tmp_path):
  other = tmp_path / "more"
  other.mkdir()
  write_shard(other / "00000.tar", members(20, 2))
  config = configured("", tmp_path / "out")
  config.source = (str(shards / "*.tar"), str(other / "*.tar"))
  with pytest.raises(ValueError, match=r"2 shards have the name '00000'"):
    run(config)
  with pytest.raises(ValueError, match="nothing to clean"):
    run(configured("", tmp_path / "out"))


def test_a_full_disk_leaves_what_is_finished(shards, tmp_path, monkeypatch):
  config = configured(shards / "*.tar", tmp_path / "out")
  fsync, synced = os.fsync, []

  def full(handle):
    synced.append(handle)
    if len(synced) == 5:  # the job, two files of a unit, one of the next
      raise OSError(errno.ENOSPC, "No space left on device")
    fsync(handle)

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    run(config)
  monkeypatch.undo()
  monkeypatch.setattr(model_lib, "load", load)
  names = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file())
  assert "00000.done.json" in names
  assert "00001.done.json" not in names
  assert not [name for name in names if name.startswith(".")]
  run(config)
  assert audit.verify(config, config.out)["units"] == 3


def test_verify_finds_what_was_damaged(shards, tmp_path):
  config = configured(shards / "*.tar", tmp_path / "out")
  run(config)
  assert audit.verify(config, config.out) == {"units": 3, "pictures": 15}
  path = tmp_path / "out" / "00002.parquet"
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)
  with pytest.raises(ValueError, match="00002: its rows are not those"):
    audit.verify(config, config.out)


def test_status_says_who_works_on_what(shards, tmp_path, caplog):
  config = configured(shards / "*.tar", tmp_path / "out")
  with pytest.raises(ValueError, match="no job has been started there"):
    audit.status(config, config.out)
  run(config)
  (tmp_path / "out" / "00001.done.json").unlink()
  owner = {"host": "elsewhere", "pid": 17, "id": "x"}
  (tmp_path / "out" / ".00001.lease").write_text(json.dumps(owner))
  with caplog.at_level("INFO", logger="blip_jax"):
    found = audit.status(config, config.out)
  assert (found["units"], found["units_done"]) == (3, 2)
  assert "00001: with process 17 on elsewhere" in caplog.text


def book(tmp_path, **kwargs):
  made = ledger.Ledger(tmp_path, **kwargs)
  made.begin({"a": 1}, force=False)
  return made


def finished(made, unit):
  made.finish(unit, b"rows", {"input": unit.fingerprint()})


def test_a_unit_is_leased_to_one(tmp_path):
  todo = [
    work_units.WorkUnit(str(n), f"scenes:train?num={n}") for n in range(1, 4)
  ]
  first, second = book(tmp_path), book(tmp_path)
  claims, others = first.claims(todo), second.claims(todo)
  (a, _), (b, _) = next(claims), next(others)
  assert (a.name, b.name) == ("1", "2")
  assert first.leased().keys() == {"1", "2"}
  finished(first, a)
  (c, number_done), _ = next(claims), finished(second, b)
  assert (c.name, number_done) == ("3", 1)
  finished(first, c)
  assert list(claims) == []
  assert list(others) == []
  assert second.leased() == {}


def test_who_works_by_old_settings_stops(tmp_path):
  todo = [work_units.WorkUnit("a", "scenes:train?num=1")]
  old, new = book(tmp_path), ledger.Ledger(tmp_path)
  unit, _ = next(old.claims(todo))
  new.begin({"a": 2}, force=True)
  with pytest.raises(ValueError, match="has begun this job anew"):
    finished(old, unit)
  assert new.done(unit) is None


@pytest.mark.parametrize("gone", ["old", "dead"])
def test_a_lease_of_a_process_that_is_gone_is_taken_over(tmp_path, gone):
  (unit,) = todo = [work_units.WorkUnit("a", "scenes:train?num=1")]
  made = book(tmp_path, lease_seconds=30.0)
  lease = tmp_path / ".a.lease"
  owner = {"host": "elsewhere", "pid": 1, "id": "x"}
  if gone == "dead":
    with subprocess.Popen(["true"]) as process:
      process.wait()
    owner = {"host": socket.gethostname(), "pid": process.pid, "id": "x"}
  lease.write_text(json.dumps(owner))
  if gone == "old":
    os.utime(lease, (time.time() - 31, time.time() - 31))
  assert next(made.claims(todo))[0] == unit


def test_a_lease_that_is_young_is_waited_for(tmp_path):
  (unit,) = todo = [work_units.WorkUnit("a", "scenes:train?num=1")]
  made = book(tmp_path, lease_seconds=0.5)
  other = {"host": "elsewhere", "pid": 1, "id": "x"}
  (tmp_path / ".a.lease").write_text(json.dumps(other))
  begin = time.monotonic()
  assert next(made.claims(todo))[0] == unit
  assert time.monotonic() - begin > 0.3


def test_a_lease_is_renewed_while_its_owner_works(tmp_path):
  todo = [work_units.WorkUnit("a", "scenes:train?num=1")]
  made, other = book(tmp_path, lease_seconds=0.5), book(tmp_path)
  claims = made.claims(todo)
  next(claims)
  time.sleep(1.2)
  assert made.leased()["a"]["seconds"] < 0.5
  finished(made, todo[0])
  assert list(other.claims(todo)) == []


def work(source, out, models, seconds):
  """What a process does; it reads its models, for to make them would take it
  longer than all the rest."""
  models = pickle.loads(models.read_bytes())

  def load(name, task, mesh, **_):
    card, params = models[task]
    params = jax.device_put(params, sharding.replicated(mesh))
    module = families.build(task, card.config)
    return model_lib.Model(
      card, module, params, helpers.scenes_tokenizer(), mesh
    )

  def slowly(found, to_parquet=rows.to_parquet):
    time.sleep(seconds)  # in which it can be killed, with a unit in its hands
    return to_parquet(found)

  model_lib.load, rows.to_parquet = load, slowly
  run(configured(source, out, per_device_batch_size=4, lease_seconds=20.0))


def test_processes_that_are_killed_change_nothing(tmp_path, monkeypatch):
  """Three processes over twelve shards, of which whoever has a shard is killed
  now and then, write what one writes alone."""
  folder = tmp_path / "shards"
  folder.mkdir()
  for shard in range(12):
    write_shard(folder / f"{shard:05d}.tar", members(8 * shard, 8))
  monkeypatch.setenv("XLA_FLAGS", QUICK_TO_COMPILE)  # of one device each
  # Where a server of forks looks for what it is to import beforehand.
  monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([__name__])

  made = {task: helpers.make_model(task) for task in ("caption", "itm")}
  models = tmp_path / "models"
  parts = {
    task: (model.card, jax.tree.map(np.asarray, model.params))
    for task, model in made.items()
  }
  models.write_bytes(pickle.dumps(parts))

  def start(out, seconds=1.0):
    args = folder / "*.tar", tmp_path / out, models, seconds
    process = context.Process(target=work, args=args, daemon=True)
    process.start()
    return process

  alone = start("alone", seconds=0.0)
  alone.join()
  processes = [start("out") for _ in range(3)]
  made = ledger.Ledger(tmp_path / "out")
  chance, kills = random.Random(0), 0
  while any(process.is_alive() for process in processes):
    time.sleep(chance.uniform(0.0, 0.2))
    owners = {owner["pid"] for owner in made.leased().values()}
    working = [p for p in processes if p.pid in owners and p.is_alive()]
    if working and kills < 5:
      victim = chance.choice(working)
      victim.kill()
      victim.join()
      kills += 1
      processes[processes.index(victim)] = start("out")
  assert kills == 5
  assert [process.exitcode for process in processes] == [0, 0, 0]
  assert content(tmp_path / "out") == content(tmp_path / "alone")
  assert len(content(tmp_path / "out")) == 2 * 12 + 1


def test_sources_that_are_shards():
  assert datasets.shard_specs("a/{0..1}.tar") == ["a/0.tar", "a/1.tar"]
  assert datasets.shard_specs("a.parquet?caption=b") == ["a.parquet?caption=b"]
  assert datasets.shard_specs("a.json") == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_collection(tmp_path, monkeypatch):
  """Over 10,000 pictures, once the first units have compiled all programs."""
  sizes, do = [], job.do
  process = psutil.Process()

  def measured(*args):
    do(*args)
    gc.collect()
    sizes.append(process.memory_info().rss)

  monkeypatch.setattr(job, "do", measured)
  source = "scenes:train?num=10000&size=16&noise=0.4"
  results = run(
    configured(
      source, tmp_path / "out", work_unit_rows=500, per_device_batch_size=8
    )
  )
  assert results["pictures/in"] == 10_000
  assert len(sizes) == 20
  assert max(sizes[3:]) < 1.1 * sizes[2]
