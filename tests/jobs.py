"""Collections, models and finished jobs for tests of CapFilt."""

import functools
import io
import json
import os
import shutil
import tarfile

import jax
from PIL import Image

from blip_jax import defaults
from blip_jax.capfilt import job, label, ledger, rows
from blip_jax.data import scenes
from blip_jax.inference import model as model_lib
from tests import helpers

# Texts of an image: source, itm_prob, text.
IMAGE_TEXTS = (
  ("web", 0.9, "A red circle."),
  ("web", 0.2, "click to enlarge"),
  ("synthetic", 0.8, "a red circle"),
  ("synthetic", 0.6, "a red circle left of a blue star"),
)


NOISY_SCENES = scenes.Scenes("train", size=16, num=400, noise=0.4)


def png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "png")
  return file.getvalue()


def write_tar(path, members):
  """A tar of (name, bytes) members."""
  with tarfile.open(path, "w") as tar:
    for name, content in members:
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return path


def scene_members(start, count):
  """Webdataset members of noisy scenes."""
  for n in range(start, start + count):
    record = NOISY_SCENES[n]
    yield f"{n:04d}.png", png(record["image"])
    yield f"{n:04d}.txt", record["caption"].encode()


def write_scene_shards(folder):
  """Three shards of five images: one is broken, two have no usable text."""
  folder.mkdir()
  for shard in range(3):
    members = dict(scene_members(5 * shard, 5))
    if shard == 1:
      members["0006.png"] = b"\x89PNG no more"
      del members["0008.txt"]
      members["0009.txt"] = b"..."
    write_tar(folder / f"{shard:05d}.tar", members.items())
  return folder


def load_tiny(name, task, mesh, dtype="float32", **_):
  """Replaces `loading.load`: random weights, which the name decides."""
  return _tiny(name, task, mesh, dtype)


@functools.cache  # so that all tests share the compiled programs
def _tiny(name, task, mesh, dtype):
  model = helpers.make_model(task, mesh, dtype=dtype)
  if name == "other":
    params = jax.tree.map(lambda x: 1.01 * x, model.params)
    model = model_lib.Model(
      model.card, model.module, params, model.tokenizer, mesh
    )
  return model


def capfilt_config(source, out, **changes):
  """A CapFilt job with short captions of tiny models."""
  settings = defaults.capfilt().lock()
  settings.update(
    source=(str(source),), out=str(out), per_device_batch_size=1, num_threads=2
  )
  settings.update(captioner="one", filter="one")
  settings.generation.update(max_length=8, min_length=4)
  settings.update(changes)
  return settings


def write_capfilt_job(folder, settings, texts):
  """A finished job without models: `texts` are their labels.

  Args:
    texts: name of a work unit -> for each image, its (source, itm_prob, text).
  """
  job_settings = {
    key: settings[key] for key in ("image_root", "web_texts", "work_unit_rows")
  }
  book = ledger.Ledger(folder)
  book.begin(job_settings | {"source": list(settings.source)}, force=False)
  constants = {"captioner": "c", "filter": "f", "seed": 0}
  for work_unit in job.find_work_units(book.settings):
    source, damage = work_unit.open()
    counts, text_rows = rows.Counts(damage), []
    for row, image_texts in enumerate(texts[work_unit.name]):
      image = _labelled(row, source[row], image_texts)
      image_rows = [*rows.of_image(image, 0.5, constants)]
      counts.add(image, image_rows)
      text_rows += image_rows
    report = {"work_unit": work_unit.name, "input": work_unit.input().as_json()}
    book.finish(
      work_unit, rows.to_parquet(text_rows), report | counts.as_json()
    )
  return book


def _labelled(row, record, texts):
  path = record["image"] if isinstance(record["image"], str) else ""
  image_id = str(record["image_id"]) if "image_id" in record else None
  texts = tuple(
    label.Text(text, source, "", prob, 0.1, -3.0)
    for source, prob, text in texts
  )
  return label.LabelledImage(row, record["id"], path, image_id, texts=texts)


def write_listed_capfilt_job(folder):
  """A finished job over a list of five images, in three work units.

  Returns its config; `merge.out` is clean.json in the same folder.
  """
  root = folder / "images"
  root.mkdir()
  lines = []
  for n in range(5):
    Image.fromarray(NOISY_SCENES[n]["image"]).save(root / f"{n}.png")
    lines.append({"image": f"{n}.png", "caption": "x", "image_id": n})
  (folder / "web.json").write_text(json.dumps(lines))
  settings = defaults.capfilt().lock()
  settings.update(source=(str(folder / "web.json"),), image_root=str(root))
  settings.update(work_unit_rows=2, out=str(folder / "out"))
  settings.merge.out = str(folder / "clean.json")
  texts = {
    "web.json-00000": [IMAGE_TEXTS, IMAGE_TEXTS[1:2]],
    "web.json-00001": [IMAGE_TEXTS[:1], IMAGE_TEXTS[2:]],
    "web.json-00002": [IMAGE_TEXTS[3:]],
  }
  write_capfilt_job(settings.out, settings, texts)
  return settings


def swap(path, other):
  """Two files get each other's names, and keep their times."""
  (spare := path.with_name("spare")).hardlink_to(path)
  other.replace(path)
  spare.replace(other)


def flip(path):
  """Flips a bit in the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def replace_by(path, kind):
  """Puts something that is no regular file in the place of a file or folder."""
  if path.is_dir():
    shutil.rmtree(path)
  path.unlink(missing_ok=True)
  if kind == "folder":
    path.mkdir()
  elif kind == "pipe":
    os.mkfifo(path)
  elif kind == "link to itself":
    path.symlink_to(path.name)
  else:
    path.write_text("text")


NO_FILES = ("folder", "pipe", "link to itself")
