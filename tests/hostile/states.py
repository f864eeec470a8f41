"""Jobs that are killed at random moments, and small files that are damaged."""

import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from tests import QUICK_TO_COMPILE, helpers, jobs

# In the environment of a job and of all that it starts.
_MARK = "BLIP_JAX_TEST_JOB"
_ITM = "blip_itm"


@dataclasses.dataclass(frozen=True)
class Job:
  """A command whose output a kill must not change.

  Attributes:
    kind: what it does.
    folder: everything that it writes is in there.
    flags: of `blip_jax.main`.
    output: returns the files that are compared, by name.
  """

  kind: str
  folder: pathlib.Path
  flags: Sequence[str]
  output: Callable[[], dict[str, bytes]]

  def start(self) -> "Started":
    """Starts it, with a mark by which all its processes are found."""
    mark = uuid.uuid4().hex
    self.folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
      [sys.executable, "-m", "blip_jax.main", *self.flags],
      env={**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE, _MARK: mark},
      cwd=self.folder,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    return Started(process, mark)

  def finish(self) -> float:
    """Runs it to its end; returns the seconds that it took."""
    start = time.monotonic()
    _, errors = (process := self.start().process).communicate(timeout=600)
    assert process.returncode == 0, f"{self.kind}: {errors[-3000:]}"
    return time.monotonic() - start

  def leftovers(self) -> list[str]:
    """Files that no finished job has."""
    endings = (".tmp", ".lock", ".lease", ".now", "+", "-checkpoint-tmp")
    return [
      str(path.relative_to(self.folder))
      for path in self.folder.rglob("*")
      if path.name.endswith(endings)
    ]


@dataclasses.dataclass(frozen=True)
class Started:
  """A job that runs.

  Attributes:
    process: the command.
    mark: in the environment of all its processes.
  """

  process: subprocess.Popen
  mark: str

  def kill(self, seconds: float) -> bool:
    """SIGKILL after some seconds; False if it was done before."""
    try:
      self.process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
      self.process.send_signal(signal.SIGKILL)
      # Not `communicate`: workers may have its pipes, and live on.
      self.process.wait()
      return True
    return False

  def alive_after(self, seconds: float) -> list[int]:
    """Its processes that are still there after some seconds."""
    deadline = time.monotonic() + seconds
    while pids := [*_with_mark(self.mark)]:
      if time.monotonic() > deadline:
        return pids
      time.sleep(0.1)
    return []


def _with_mark(mark: str) -> Iterator[int]:
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      if f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes():
        yield int(folder.name)
    except OSError:  # it has ended, or is another user's
      pass


def kill_often(job: Job, times: int, seed: int) -> list[str]:
  """Kills a job at random moments, lets it finish, and says what is wrong.

  What it writes undisturbed is in a folder next to it.
  """
  seconds = job.finish()
  expected = job.output()
  empty(job.folder)
  rng, failed = random.Random(f"{job.kind} {seed}"), []
  for number in range(times):
    started = job.start()
    after = rng.uniform(0, seconds)
    started.kill(after)
    if alive := started.alive_after(20.0):
      failed.append(f"{job.kind}, kill {number}: processes {alive} live on")
  job.finish()
  if (found := job.output()) != expected:
    names = [n for n in expected | found if expected.get(n) != found.get(n)]
    failed.append(f"{job.kind}: other bytes in {names}")
  if left := job.leftovers():
    failed.append(f"{job.kind}: {left} is left over")
  return failed


def empty(folder: pathlib.Path) -> None:
  """Moves what is in a folder aside."""
  folder.rename(folder.with_name(f"{folder.name}.whole"))
  folder.mkdir()


def files_of(folder: pathlib.Path, *patterns: str) -> dict[str, bytes]:
  """The files of a folder, by their relative names."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for pattern in patterns
    for path in sorted(folder.glob(pattern))
  }


def caption_job(root: pathlib.Path) -> Job:
  """Captions of seven images, two at a time."""
  folder = root / "caption"
  images = helpers.write_images(root / "caption_images")
  model = helpers.write_captioner(root / "captioner")
  flags = (
    "--config=caption_images",
    f"--config.images={images}",
    f"--config.model={model}",
    f"--config.out={folder}/out.jsonl",
    f"--workdir={folder}",
    "--config.batch_size=2",
  )
  return Job("caption", folder, flags, lambda: files_of(folder, "out*"))


def search_job(root: pathlib.Path) -> Job:
  """An index of nine images, and one query."""
  folder = root / "search"
  gallery = helpers.write_gallery(root / "gallery")
  flags = (
    "--config=search",
    f"--config.images={gallery}",
    f"--config.model={_filter(root)}",
    "--config.queries=a red circle",
    f"--config.out={folder}/found.json",
    f"--workdir={folder}",
    "--config.batch_size=2",
  )
  patterns = ("found.json", "index/*")
  return Job("search", folder, flags, lambda: files_of(folder, *patterns))


def capfilt_job(root: pathlib.Path) -> Job:
  """Three shards of five images."""
  folder = root / "capfilt"
  shards = jobs.write_scene_shards(root / "shards")
  captioner = helpers.write_captioner(root / "captioner_of_capfilt")
  flags = (
    "--config=capfilt",
    f"--config.source={shards}/*.tar",
    f"--config.captioner={captioner}",
    f"--config.filter={_filter(root)}",
    f"--config.out={folder}",
    "--config.per_device_batch_size=1",
    "--config.generation.max_length=8",
    "--config.generation.min_length=4",
  )
  patterns = ("*.parquet", "*.done.json", "job.json")
  return Job("capfilt", folder, flags, lambda: files_of(folder, *patterns))


def merge_job(root: pathlib.Path) -> Job:
  """The training set of a finished job, as shards."""
  folder = root / "merge"
  (root / "merged").mkdir()
  settings = jobs.write_listed_capfilt_job(root / "merged")
  flags = (
    "--config=capfilt",
    "--config.job=merge",
    f"--config.out={settings.out}",
    f"--config.image_root={settings.image_root}",
    f"--config.merge.out={folder}/clean",
  )
  return Job("merge", folder, flags, lambda: files_of(folder, "**/*.*"))


def train_job(root: pathlib.Path, num_workers: int) -> Job:
  """Sixty steps with dropout, augmentation and a queue."""
  folder = root / f"train_{num_workers}"
  flags = (
    "--config=quickstart",
    f"--workdir={folder}",
    "--config.num_steps=60",
    "--config.batch_size=4",
    "--config.model.image_size=16",
    "--config.optim.warmup_steps=2",
    "--config.log_every_steps=20",
    "--config.checkpoint.every_steps=10",
    "--config.pretrain.queue_size=20",
    "--config.data.augment=True",
    f"--config.data.num_workers={num_workers}",
    "--config.model.dropout=0.1",
    "--config.evals.scenes_val.source=",
  )
  return Job(
    f"train, {num_workers} workers", folder, flags, lambda: _run(folder)
  )


def _run(folder: pathlib.Path) -> dict[str, bytes]:
  """The digests of a run's last checkpoint."""
  tool = [sys.executable, "-m", "blip_jax.tools.inspect_checkpoint"]
  done = subprocess.run(
    [*tool, folder, "--digest"], check=True, capture_output=True
  )
  return {"digest": done.stdout}


def _filter(root: pathlib.Path) -> str:
  """A converted checkpoint with ITM."""
  from blip_jax.convert import write

  path = root / "filter"
  if not path.exists():
    write.write(helpers.open_golden(_ITM), path, "orbax")
  return str(path)
