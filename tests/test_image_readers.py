"""Images are read in other processes as in this one, whatever happens there."""

import concurrent.futures
import errno
import io
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import PIL.Image
import psutil
import pytest

from blip_jax.data import image_limits, image_readers, transforms

SIZES = [transforms.EvalImage(8), transforms.EvalImage((6, 4))]


def encoded(height=12, width=16, format="png"):
  pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
  file = io.BytesIO()
  PIL.Image.fromarray(pixels.astype(np.uint8)).save(file, format)
  return file.getvalue()


def buffers():
  return [np.full((8, 8, 3), 7, np.uint8), np.full((6, 4, 3), 7, np.uint8)]


def read(readers, image):
  readers.read(image, out := buffers())
  return out


def reason(readers, image):
  with pytest.raises(transforms.BadSample) as caught:
    read(readers, image)
  return caught.value.reason, caught.value.detail


@pytest.fixture(scope="module")
def here():
  return image_readers.ImageReaders(SIZES, False, 0)


@pytest.fixture
def there():
  readers = image_readers.ImageReaders(SIZES, False, 1)
  yield readers
  readers.close()


def child(readers):
  (process,) = readers._processes
  return process._child


def test_a_process_reads_what_a_thread_reads(here, there, tmp_path):
  path = tmp_path / os.fsdecode(b"\xe9 \n.png")
  path.write_bytes(encoded())
  pixels = np.asarray(PIL.Image.open(path))
  expected = [
    np.asarray(PIL.Image.open(path).resize(size, PIL.Image.Resampling.BICUBIC))
    for size in ((8, 8), (4, 6))
  ]
  for readers in (here, there):
    for image in (encoded(), str(path), pixels):
      for found, wanted in zip(read(readers, image), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert readers.images_per_core > 0
  for image in (b"", b"no image", encoded()[:100], str(tmp_path / "none.png")):
    assert reason(there, image) == reason(here, image)
  np.testing.assert_array_equal(read(there, encoded())[0], expected[0])


def test_an_image_is_tried_again_once_if_its_process_dies(there, monkeypatch):
  expected = read(there, encoded())
  os.kill(child(there).pid, signal.SIGKILL)
  for found, wanted in zip(read(there, encoded()), expected, strict=True):
    np.testing.assert_array_equal(found, wanted)
  os.kill(child(there).pid, signal.SIGKILL)
  started = []

  def start(_):
    started.append(1)
    return subprocess.Popen(
      [sys.executable, "-c", "import os; os._exit(3)"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )

  with monkeypatch.context() as patch:
    patch.setattr(image_readers._Process, "_start", start)
    assert reason(there, encoded()) == (
      "crashed",
      "the process that read it ended with the status 3",
    )
  assert len(started) == 1
  assert reason(there, b"no image")[0] == "not_an_image"


def test_what_hits_all_images_is_no_bad_image(monkeypatch):
  def full(*_):
    raise OSError(errno.EMFILE, "Too many open files")

  monkeypatch.setattr(transforms, "resized", full)
  kind, (message,) = image_readers._reply(b"x", SIZES, False)
  reply = image_readers._REPLY.pack(kind, 0.0, len(message)) + message
  code = f"import os; os.read(0, 9); os.write(1, {reply!r})"
  with (
    subprocess.Popen(
      [sys.executable, "-c", code],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    ) as process,
    pytest.raises(OSError, match="Too many") as caught,
  ):
    image_readers._ask(process, b"x", buffers())
  assert caught.value.errno == errno.EMFILE


def test_processes_share_the_memory_of_large_images(monkeypatch):
  amounts = []

  class Budget(image_limits.Budget):
    def reserved(self, amount):
      amounts.append(amount)
      return super().reserved(amount)

  # A share of 16 x 1,024 pixels of 13 bytes, as the limits count them.
  monkeypatch.setattr(image_limits, "MAX_MEMORY", 2 * 16 * 1024 * 13)
  monkeypatch.setattr(image_limits, "DECODED", Budget(10**6))
  readers = image_readers.ImageReaders(SIZES, False, 2)
  try:
    read(readers, encoded(height=16))
    assert amounts == []
    read(readers, encoded(height=17))
    assert amounts == [17 * 1024 * 13]
  finally:
    readers.close()


def test_a_process_that_starts_while_readers_are_closed_ends(monkeypatch):
  starting, started = threading.Event(), []
  start = image_readers._Process._start

  def start_slowly(process):
    starting.set()
    time.sleep(0.2)
    started.append(start(process))
    return started[0]

  monkeypatch.setattr(image_readers._Process, "_start", start_slowly)
  readers = image_readers.ImageReaders(SIZES, False, 1)
  with concurrent.futures.ThreadPoolExecutor(1) as threads:
    found = threads.submit(read, readers, encoded())
    assert starting.wait(10)
    readers.close()
    # It was in time, or is one image that cannot be read.
    assert isinstance(found.exception(), transforms.BadSample | None)
  assert started[0].poll() is not None


def test_no_process_outlives_its_parent_or_close(there):
  read(there, encoded())
  pid = child(there).pid
  there.close()
  assert not psutil.pid_exists(pid)

  root = pathlib.Path(__file__).parent.parent
  code = (
    "import time\n"
    "from blip_jax.data import image_readers as r, transforms as t\n"
    "readers = r.ImageReaders([t.EvalImage(8)], False, 1)\n"
    "readers._processes[0]._child = child = readers._processes[0]._start()\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(60)\n"
  )
  parent = subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root
  )
  worker = psutil.Process(int(parent.stdout.readline()))
  os.kill(parent.pid, signal.SIGKILL)
  parent.communicate()
  deadline = time.monotonic() + 20
  while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
    assert time.monotonic() < deadline
    time.sleep(0.05)
