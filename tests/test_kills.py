"""Training under random SIGKILL and SIGTERM ends with the undisturbed bits."""

import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from blip_jax.runtime import files, snapshot
from tests import object_store
from tests.test_distributed import start, start_together

KILLS, STEPS = 10, 30
# JAX aborts a process that another one has left alone; a shell says 134.
ENDS = (75, -signal.SIGABRT, -signal.SIGKILL)
FLAGS = (
  f"--config.num_steps={STEPS}",
  "--config.batch_size=8",
  "--config.model.image_size=16",
  "--config.optim.warmup_steps=2",
  "--config.log_every_steps=1",
  "--config.checkpoint.every_steps=2",
  "--config.pretrain.queue_size=20",
  "--config.data.augment=True",
  "--config.model.dropout=0.1",
  "--config.evals.scenes_val.source=",
)


@dataclasses.dataclass
class Disturbed:
  """A run of which processes are killed.

  Attributes:
    start: starts its processes.
    workdir: as they know it.
    kinds: what happened to it, in order.
  """

  start: Callable[[], list]
  workdir: str
  rng: random.Random
  kinds: list[str] = dataclasses.field(default_factory=list)

  def rows(self):
    path = files.as_path(self.workdir) / "metrics.jsonl"
    found = files.json_lines(path) if files.exists(path) else ()
    return [row for row in found if "train/loss" in row]

  def steps(self):
    return max((row["step"] for row in self.rows()), default=0)

  def disturb(self):
    """One life of the run: it makes some steps, and is killed."""
    before = self.steps()
    processes = self.start()
    # Some of the kills hit it while it starts, and some while it saves.
    wanted = min(before + self.rng.randint(0, STEPS // KILLS), STEPS - 2)
    deadline = time.monotonic() + 300
    while self.steps() < wanted:
      assert time.monotonic() < deadline
      if any(process.poll() is not None for process in processes):
        raise AssertionError(processes[0].communicate()[1][-3000:])
      time.sleep(0.02)
    time.sleep(self.rng.uniform(0, 0.3))
    kinds = "SIGKILL of all", "SIGKILL of one", "SIGTERM"
    # One that is alone when it starts waits five minutes for the others.
    kinds = kinds if wanted > before else kinds[:1]
    # Each kind once, before one comes again.
    new = [kind for kind in kinds if kind not in self.kinds]
    kind = self.rng.choice(new or kinds)
    victim = self.rng.choice(processes)
    number = signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL
    for process in processes if kind == "SIGKILL of all" else [victim]:
      process.send_signal(number)
    for process in processes:
      _, said = process.communicate(timeout=200)
      assert process.returncode in ENDS, said[-3000:]
    self.kinds.append(kind)


def finish(processes):
  """Waits until they have done their work."""
  said = [process.communicate(timeout=400)[1][-3000:] for process in processes]
  codes = [process.returncode for process in processes]
  assert not any(codes), f"{codes} {said}"


def disturbed(start, workdir):
  """The run after all kills, and the rows of its metrics."""
  run = Disturbed(start, str(workdir), random.Random(21))
  while len(run.kinds) < KILLS:
    run.disturb()
  finish(run.start())
  steps = [row["step"] for row in run.rows()]
  assert steps == list(range(1, STEPS + 1))
  print(run.kinds)
  return run


@pytest.mark.slow
def test_two_processes(tmp_path, digest):
  def begin(name):
    workdir = tmp_path / name
    return start_together("quickstart", workdir, 2, 1, *FLAGS)

  finish(begin("whole"))
  run = disturbed(lambda: begin("killed"), tmp_path / "killed")
  assert len({*run.kinds}) == 3
  assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


@pytest.mark.slow
def test_a_workdir_in_an_object_store(tmp_path, monkeypatch, digest):
  """One process, as several need a folder."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  finish([start("quickstart", tmp_path / "whole", 1, *FLAGS)])
  with object_store.started() as server:
    for name, value in server.environment().items():
      assert os.environ[name] == value
    workdir = f"{server.bucket()}/killed"
    begin = lambda: [_start_remote(tmp_path, workdir)]
    run = disturbed(begin, workdir)
    assert len({*run.kinds}) == 3
    found = snapshot.find(workdir)
    assert found.name == str(STEPS)
    assert digest(found) == digest(tmp_path / "whole")


def _start_remote(folder, workdir):
  return start("quickstart", folder / "x", 1, *FLAGS, f"--workdir={workdir}")
