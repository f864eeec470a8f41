"""Bombs and damage of all formats: one bad sample each, in bounded cost."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import PIL.Image
import psutil
import pytest

from blip_jax.data import image_limits, rejects, rgb, transforms
from tests import helpers, hostile
from tests.hostile import images

MAX_PIXELS = transforms.MAX_PIXELS
# Of any image, accepted or not; docs/security.md states them.
MAX_MB, MAX_SECONDS = 2048, 30
# What the header says, or what is no image, costs nothing.
CHEAP = [
  name
  for name in images.CASES
  if not any(
    word in name
    for word in (
      "largest",
      "GB",
      "00 x",
      ",000 ",
      "65,535 x",
      "jump",
      "runs",
      "79,000,000",
      "more scans",
      "tiles of 110",
      "precincts of 16",
      "blocks of 16",
      "256 layers",
      "comment",
      "16 x 16",
      "50 seq",
    )
  )
]
REFUSED = {
  "png 79,000,000 x 1": "too_large",
  "png 65,536 x 1": "too_large",
  "jpeg 200 more scans": "too_slow",
  "jpeg 5,000 scans of 48 x 48": "too_slow",
  "jpeg 200 sequential scans": "too_slow",
  "gif 65,535 x 65,535": "too_large",
  "gif frame larger than the screen": "too_large",
  "tiff 4,000,000 strips": "too_slow",
  "tiff 4,000,000 numbers in exif": "too_slow",
  "tiff 65,535 fields": "too_slow",
  "tiff nested folders": "too_slow",
  "tiff tiles of 2**30 pixels": "too_slow",
  # Pillow 12 makes no decoder for it, and does not say why.
  "webp canvas of 2**48 pixels": (
    "corrupt" if PIL.__version__.startswith("12.") else "too_large"
  ),
  "jpeg2000 60,000 x 60,000 in a small box": "too_large",
  "jpeg2000 tiles of 1 pixel": "too_slow",
  "jpeg2000 code blocks of 4 x 4": "too_slow",
  "jpeg2000 precincts of 1 x 1": "too_slow",
  "jpeg2000 65,535 layers": "too_slow",
  "eps": "not_an_image",
  "eps in disguise": "not_an_image",
  "ico": "not_an_image",
  "psd": "not_an_image",
}


def outcome(image, max_pixels=MAX_PIXELS):
  try:
    return helpers.decode(image, max_pixels).shape
  except transforms.BadSample as error:
    return error.reason


@pytest.mark.parametrize("name", CHEAP)
def test_a_hostile_image_is_at_most_a_bad_sample(name):
  outcome(images.CASES[name]())


@pytest.mark.parametrize("name", REFUSED)
def test_bombs_are_refused_before_they_are_decoded(name, monkeypatch):
  """With the reason that says why, and in no time."""
  content = images.CASES[name]()
  monkeypatch.setattr(rgb, "pixels", None)
  start = time.thread_time()
  assert outcome(content) == REFUSED[name]
  assert time.thread_time() - start < 1


def test_damaged_files_of_all_formats_are_at_most_bad_samples():
  for name, content in images.damaged(seed=0, number=300):
    assert outcome(content, 10_000_000), name


def test_ordinary_files_are_far_below_the_limits():
  for name, content in images.ordinary().items():
    assert outcome(content) == (40, 48, 3), name
  many = images.encoded(
    images.photo(256, 256),
    "JPEG2000",
    tile_size=(64, 64),
    codeblock_size=(16, 16),
    precinct_size=(64, 64),
  )
  assert outcome(many) == (256, 256, 3)


def test_a_video_behind_a_photo_has_no_scans(tmp_path):
  """Phones append one; random bytes have the marker of a scan often."""
  noise = np.random.default_rng(0).bytes(1 << 20) + b"\xff\xda" * 99
  for progressive in (False, True):
    content = images.encoded(images.photo(), "JPEG", progressive=progressive)
    assert outcome(content + noise) == (40, 48, 3)


def test_the_largest_sides_are_inclusive():
  assert outcome(images.png(65_535, 1)) == (1, 65_535, 3)
  assert outcome(images.png(65_536, 1)) == "too_large"
  assert outcome(images.png(1, 65_536)) == "too_large"


def test_lack_of_memory_is_a_bad_sample():
  with (
    pytest.raises(transforms.BadSample, match="too_large: needs more memory"),
    transforms.decoded(images.png(8, 8), MAX_PIXELS),
  ):
    raise MemoryError  # as PIL's resize does


def test_a_c_library_that_is_stopped_says_why():
  """OpenJPEG asks for more in the middle of its work."""
  content = images.encoded(images.photo(600, 600), "JPEG2000")
  with PIL.Image.open(image_limits.Stream(content)) as image:
    image.fp._end = 0
    assert outcome(image) == "too_slow"


def test_reading_ends_after_some_processor_time():
  content = images.CASES["png 500,000 private chunks"]()[:500_000]
  stream = image_limits.Stream(content, seconds=0.05)
  with pytest.raises(rejects.BadSample, match="too_slow"):
    PIL.Image.open(stream).load()


@pytest.mark.parametrize(
  "kind", ["pipe", "device", "socket", "folder", "link", "loop", "sparse"]
)
def test_what_is_no_regular_file_is_a_bad_sample(kind, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  expected = "unreadable"
  with socket.socket(socket.AF_UNIX) as server:
    if kind == "pipe":
      os.mkfifo("x.png")
    elif kind == "device":
      os.symlink("/dev/zero", "x.png")
    elif kind == "socket":
      server.bind("x.png")
    elif kind == "folder":
      os.mkdir("x.png")
    elif kind == "link":
      os.symlink("nowhere", "x.png")
      expected = "missing"
    elif kind == "loop":
      os.symlink("x.png", "x.png")
    else:
      with open("x.png", "wb") as file:
        file.truncate(1 << 40)
      expected = "too_large"
    assert outcome("x.png") == expected


def test_an_unread_image_of_pil_starts_no_program(tmp_path, monkeypatch):
  monkeypatch.setattr(subprocess, "Popen", None)
  (tmp_path / "a.eps").write_bytes(images.CASES["eps"]())
  (tmp_path / "a.jpg").write_bytes(images.CASES["jpeg 200 more scans"]())
  with PIL.Image.open(tmp_path / "a.eps") as image:
    assert outcome(image) == "not_an_image"
  with PIL.Image.open(tmp_path / "a.jpg") as image:
    assert outcome(image) == "too_slow"


def test_a_budget_is_never_exceeded_and_nobody_waits_for_ever():
  budget = image_limits.Budget(10)
  lock, used, most, done = threading.Lock(), 0, 0, []

  def work(amount):
    nonlocal used, most
    for _ in range(20):
      with budget.reserved(amount):
        with lock:
          used += min(amount, 10)
          most = max(most, used)
        time.sleep(0.0005)
        with lock:
          used -= min(amount, 10)
    done.append(amount)

  amounts = [1, 2, 3, 5, 8, 10, 11, 1000]
  threads = [threading.Thread(target=work, args=(a,)) for a in amounts]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert sorted(done) == amounts and most == 10


def test_a_failed_image_gives_its_memory_back(monkeypatch):
  budget = image_limits.Budget(100)
  monkeypatch.setattr(image_limits, "DECODED", budget)
  for _ in range(3):  # each needs all of it
    assert outcome(images.png(48, 40)[:-40]) in ("truncated", "corrupt")
    assert outcome(images.png(48, 40)) == (40, 48, 3)


def _rows(*names):
  run = subprocess.run(
    [sys.executable, "-m", "tests.hostile.images", *names],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return [json.loads(line) for line in run.stdout.splitlines()]


def _failures(rows):
  return [
    str(row)
    for row in rows
    if row["reason"].startswith(("FAILED", "DIED"))
    or row["mb"] > MAX_MB
    or row["seconds"] > MAX_SECONDS
  ]


@pytest.mark.slow
def test_every_hostile_image_has_bounded_cost(capsys):
  rows = _rows()
  with capsys.disabled():
    print()
    for row in rows:
      print(
        f"{row['name']:45} {row['bytes']:>11,} bytes {row['mb']:6.0f} MB "
        f"{row['seconds']:6.2f} s  {row['reason']}"
      )
    hostile.report("images", len(rows), _failures(rows))
  assert len(rows) == len(images.CASES)


@pytest.mark.slow
def test_ten_thousand_damaged_files(capsys):
  failed = []
  for name, content in images.damaged(seed=1, number=10_000):
    try:
      outcome(content, 10_000_000)
    except Exception as error:
      failed.append(f"{name}: {error!r}")
  with capsys.disabled():
    hostile.report("damaged images", 10_000, failed)


@pytest.mark.slow
def test_memory_stays_flat_with_one_bomb_in_a_hundred(capsys):
  """In eight threads, once each has met the bombs: after 5,000 images."""
  good = list(images.ordinary().values())
  bombs = [images.CASES[name]() for name in REFUSED] + [
    images.lossless_webp(2000, 2000),
    images.png(2000, 2000, 16, 0),
  ]
  numbers = iter(range(10_000))
  lock, sizes = threading.Lock(), []

  def work():
    while True:
      with lock:
        number = next(numbers, None)
        if number is None:
          return
        if number % 1000 == 999:
          sizes.append(psutil.Process().memory_info().rss)
      if number % 100:
        assert outcome(good[number % len(good)]) == (40, 48, 3)
      else:
        outcome(bombs[number // 100 % len(bombs)])

  threads = [threading.Thread(target=work) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  grown = (max(sizes[5:]) - max(sizes[:5])) / 1e6
  with capsys.disabled():
    mb = ", ".join(f"{size / 1e6:.0f}" for size in sizes)
    print(f"\nMB after each thousand of 10,000 images: {mb}")
  assert len(sizes) == 10 and grown < 100
