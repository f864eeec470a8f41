"""All engines write the same bytes, whatever is killed, on object storage."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from blip_jax.capfilt import audit
from blip_jax.runtime import copies, files
from tests import QUICK_TO_COMPILE, helpers, jobs

pytestmark = pytest.mark.slow  # a dozen processes compile models

SHARDS, KILLS = 12, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def source(server, folder):
  """The models, and the bucket with the shards."""
  helpers.write_golden("blip_decoder", folder / "captioner")
  helpers.write_golden("blip_retrieval", folder / "filter")
  (folder / "shards").mkdir()
  for n in range(SHARDS):
    jobs.write_tar(
      folder / "shards" / f"{n:05d}.tar", jobs.scene_members(8 * n, 8)
    )
  bucket = server.bucket()
  copies.copy_folder(folder / "shards", f"{bucket}/shards")
  return bucket


def start(folder, bucket, out, *flags, **environ):
  """Starts the command; what it prints is in the file that is returned too."""
  log = folder / f"{out}-{time.monotonic_ns()}.txt"
  words = [
    *("--config", "capfilt", f"--config.source={bucket}/shards/*.tar"),
    f"--config.out={bucket}/{out}",
    f"--config.captioner={folder}/captioner",
    f"--config.filter={folder}/filter",
    "--config.per_device_batch_size=4",
    "--config.generation.max_length=8",
    "--config.generation.min_length=4",
  ]
  root = str(pathlib.Path(__file__).parent.parent)
  python_path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
  environ = {"XLA_FLAGS": QUICK_TO_COMPILE, "PYTHONPATH": python_path} | environ
  with log.open("w") as file:
    process = subprocess.Popen(
      [sys.executable, "-m", "blip_jax.main", *words, *flags],
      env=os.environ | environ,
      stdout=file,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
  return process, log


def wait(started, status=0):
  process, log = started
  assert process.wait(400) == status, log.read_text()[-3000:]
  return log.read_text()


def content(bucket, out):
  """Name -> bytes of what must be equal; done-files have times of objects."""
  names = files.list_folder(f"{bucket}/{out}")
  return {
    name: files.read_bytes(f"{bucket}/{out}/{name}")
    for name in names
    if name.endswith((".json", ".parquet"))
  }


@pytest.fixture(scope="module")
def local(folder, source):
  """What one process writes that nobody kills."""
  wait(start(folder, source, "local"))
  return content(source, "local")


def check(folder, bucket, out, local):
  """Nothing is lost, nothing is there twice, and all bytes are equal."""
  assert content(bucket, out) == local
  assert len(local) == 2 * SHARDS + 1
  config = jobs.capfilt_config(f"{bucket}/shards/*.tar", f"{bucket}/{out}")
  counts = audit.verify(config, config.out)
  assert counts == {"work_units": SHARDS, "images": 8 * SHARDS}
  assert not [
    n for n in files.list_folder(f"{bucket}/{out}") if n.startswith(".")
  ]


def is_reading(server, number, out):
  """Whether a work unit was begun in this job, and is not done."""
  done = f"{out}/{number:05d}.done.json"
  seen = [path for _, path in server.requests]
  return any(path.endswith(f"shards/{number:05d}.tar") for path in seen) and (
    ("PUT", done) not in [(m, p.split("/", 2)[-1]) for m, p in server.requests]
  )


def test_three_tasks_of_an_array(server, folder, source, local):
  def task(index):
    names = {"ID": index, "MIN": 0, "MAX": 2, "COUNT": 3, "STEP": 1}
    variables = {f"SLURM_ARRAY_TASK_{k}": f"{v}" for k, v in names.items()}
    flag = "--config.engine=array"
    return start(folder, source, "array", flag, **variables)

  server.requests.clear()
  rng, num_kills = random.Random(0), 0
  with server.fails("", times=10**9, method="PUT", seconds=0.5):
    tasks = [task(index) for index in range(3)]
    while any(process.poll() is None for process, _ in tasks):
      time.sleep(rng.uniform(0.0, 0.4))
      working = [
        index
        for index, (process, _) in enumerate(tasks)
        if process.poll() is None
        and any(is_reading(server, n, "array") for n in range(index, 12, 3))
      ]
      if working and num_kills < KILLS:
        victim = rng.choice(working)
        tasks[victim][0].kill()
        tasks[victim][0].wait()
        num_kills += 1
        tasks[victim] = task(victim)  # as a scheduler does
        time.sleep(1)
  assert num_kills == KILLS
  for started in tasks:
    wait(started)
  check(folder, source, "array", local)


def actors(process):
  """The processes of the actors of a command that has a cluster of its own."""
  found = []
  for child in psutil.Process(process.pid).children(recursive=True):
    try:
      if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::Actor"):
        found.append(child)
    except psutil.NoSuchProcess:
      pass
  return found


RAY = (
  "--config.engine=ray",
  "--config.ray.address=local",
  "--config.ray.accelerator=cpu",
)


def test_three_actors_of_ray(server, folder, source, local):
  pytest.importorskip("ray", reason="needs the extra [ray]")
  server.requests.clear()
  rng, num_kills = random.Random(0), 0
  with server.fails("", times=10**9, method="PUT", seconds=0.5):
    # Three actors, on fewer cores maybe.
    started = start(folder, source, "ray", *RAY, "--config.ray.actors=3")
    process, _ = started
    while process.poll() is None:
      time.sleep(rng.uniform(0.2, 1.0))
      there = actors(process) if process.poll() is None else []
      num_done = sum(
        method == "PUT" and path.endswith(".done.json")
        for method, path in server.requests
      )
      if there and num_kills < KILLS and num_done >= num_kills and num_done:
        rng.choice(there).kill()
        num_kills += 1
  assert num_kills == KILLS
  text = wait(started)
  assert "lost with its actor" in text
  check(folder, source, "ray", local)


def test_a_request_to_stop_is_passed_on(server, folder, source, local):
  pytest.importorskip("ray", reason="needs the extra [ray]")
  with server.fails("", times=10**9, method="PUT", seconds=1.0):
    flags = (*RAY, "--config.ray.actors=1")
    process, log = start(folder, source, "stopped", *flags)
    while "work units, ?" not in log.read_text():
      assert process.poll() is None, log.read_text()
      time.sleep(0.2)
    while not actors(process):
      time.sleep(0.2)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM was received" in wait((process, log), 75)
  wait(start(folder, source, "stopped", *flags))
  check(folder, source, "stopped", local)
