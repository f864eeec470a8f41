"""The engine `ray`: actors of a cluster hold the models, and get work units.

An actor that is lost, with its process or its machine, starts again as often as
it takes, and what it had goes to another one.
"""

import collections
import contextlib
import logging
import os
import pathlib
import re
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tqdm

from blip_jax.capfilt import progress as progress_lib
from blip_jax.capfilt.engines import actors
from blip_jax.capfilt.engines.handout import Tries
from blip_jax.capfilt.ledger import Ledger
from blip_jax.capfilt.work_units import Unusable, WorkUnit
from blip_jax.runtime import stopping
from blip_jax.runtime.command import UsageError
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

# Work units that an actor has: it opens one while it labels another.
_AT_ONCE = 2
# The address of a cluster, and seconds that it has to answer.
_HOST_PORT = re.compile(r"([^:/]+):(\d+)")
_CONNECT = 10.0
# Seconds between two messages that no actor is there, and two looks at signals.
_PATIENCE, _LOOK = 60.0, 1.0
# Seconds that actors have to write their logs at the end.
_GRACE = 20.0


class Plan(NamedTuple):
  """Which actors to ask for.

  Attributes:
    count: of actors.
    there: how many the cluster has room for now.
    resources: of one, as Ray's options.
    cores: that one has for reading images.
  """

  count: int
  there: int
  resources: dict[str, Any]
  cores: int


def run(
  config: Config, folder: pathlib.PurePath, work_units: Sequence[WorkUnit]
) -> Sequence[WorkUnit]:
  """Has actors do all work units.

  Args:
    config: of the job.
    folder: of its files.
    work_units: all of them.

  Returns:
    The work units, which are done now.

  Raises:
    UsageError: the cluster cannot be reached, or has not what is asked for.
    ValueError: the folder has a job with other settings, a model cannot do its
      task, or a work unit cannot be done.
  """
  ray = _load()
  with _connected(ray, config.ray.address):
    asked = plan(ray.nodes(), config.ray.accelerator, config.ray.actors)
    log.info("Ray: %d actors with %s each", asked.count, asked.resources)
    if asked.count > asked.there:
      log.warning(
        "config.ray.actors=%d: the cluster has room for %d; the others wait "
        "for machines to join",
        asked.count,
        asked.there,
      )
    try:
      Pool(ray, config, folder, asked).label_all(work_units)
    except ray.exceptions.RayTaskError as error:
      raise error.cause from error
    except ray.exceptions.RayError as error:
      raise ValueError(f"config.engine=ray: {error}") from error
  return work_units


def _load() -> Any:
  # Nothing about this job is anybody's business.
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  try:
    import ray
  except ImportError as error:
    raise ImportError(
      "config.engine=ray needs Ray: pip install 'blip_jax[ray]'"
    ) from error
  return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
  where = address or os.environ.get("RAY_ADDRESS", "")
  try:
    # Ray itself tries for minutes.
    if match := _HOST_PORT.fullmatch(where):
      socket.create_connection((match[1], int(match[2])), _CONNECT).close()
    ray.init(
      address=address or None, include_dashboard=False, log_to_driver=True
    )
  except (OSError, OverflowError, RuntimeError, ValueError) as error:
    raise UsageError(
      "config.ray.address: the Ray cluster cannot be reached at "
      f"{where or 'this machine'}: {error}"
    ) from error
  try:
    # Ray has a handler of its own by now, which would exit with status 15.
    with stopping.handled_by(stopping.at_once):
      yield
  finally:
    ray.shutdown()


def plan(nodes: Sequence[dict[str, Any]], accelerator: str, count: int) -> Plan:
  """Which actors to ask for.

  Args:
    nodes: from `ray.nodes()`.
    accelerator: `config.ray.accelerator`.
    count: `config.ray.actors`.

  Raises:
    UsageError: the cluster has no such accelerator.
  """
  if accelerator not in ("", "gpu", "tpu", "cpu"):
    raise UsageError(
      "config.ray.accelerator: expected gpu, tpu, cpu, or nothing, found "
      f"{accelerator!r}"
    )
  if count < 0:
    raise UsageError(f"config.ray.actors: expected 0 or more, found {count}")
  alive = [node["Resources"] for node in nodes if node["Alive"]]
  kinds = [accelerator] if accelerator else ["gpu", "tpu"]
  for kind in kinds:
    having = [each for each in alive if each.get(kind.upper(), 0) >= 1]
    if not having:
      continue
    if kind == "tpu":
      there, resources = len(having), {"resources": {"TPU": _chips(having)}}
    elif kind == "gpu":
      there = sum(int(each["GPU"]) for each in having)
      resources = {"num_gpus": 1}
    else:
      there, resources = len(having), {"num_cpus": 1}
    cores = min(
      each.get("CPU", 1) / (each["GPU"] if kind == "gpu" else 1)
      for each in having
    )
    return Plan(count or there, there, resources, max(1, int(cores)))
  totals = sum(map(collections.Counter, alive), collections.Counter())
  found = ", ".join(
    f"{totals[name]:g} {name}" for name in ("CPU", "GPU", "TPU") if totals[name]
  )
  wanted = f"{kinds[0].upper()}s" if accelerator else "GPUs or TPUs"
  raise UsageError(
    f"config.engine=ray: expected a Ray cluster with {wanted}, found "
    f"{len(alive)} nodes with {found or 'nothing'}. To label on CPUs, set "
    "config.ray.accelerator=cpu"
  )


def _chips(nodes: Sequence[dict[str, Any]]) -> float:
  """The TPU chips of each host: rows depend on their number."""
  numbers = sorted({node["TPU"] for node in nodes})
  if len(numbers) > 1:
    raise UsageError(
      "config.engine=ray: expected TPU hosts with equal numbers of chips, "
      f"found {numbers}: they would not write the same rows"
    )
  return numbers[0]


class Pool:
  """Actors, and what each of them has.

  Args:
    ray: the library.
    config: of the job.
    folder: of its files.
    asked: which actors.
  """

  def __init__(
    self, ray: Any, config: Config, folder: pathlib.PurePath, asked: Plan
  ):
    self._ray = ray
    self._ledger = Ledger(folder)
    self._tries = Tries()
    on_cpu = "num_cpus" in asked.resources
    actor = ray.remote(actors.Actor).options(
      **asked.resources,
      max_restarts=-1,
      max_concurrency=_AT_ONCE + 2,
      scheduling_strategy="SPREAD",
    )
    arguments = (config, str(folder), os.getcwd(), on_cpu, asked.cores)
    self._actors = [actor.remote(*arguments) for _ in range(asked.count)]
    # Index of an actor that has begun -> how many work units it has.
    self._loads: dict[int, int] = {}
    # Call -> its actor, and the work unit that it labels.
    self._calls: dict[Any, tuple[int, WorkUnit | None]] = {}
    self._waiting: collections.deque[WorkUnit] = collections.deque()
    self._lost = collections.Counter()
    self._num_images, self._start = 0, time.monotonic()
    self._next_warning = self._start + _PATIENCE
    # Received; what a handler raises within Ray does not get out of it.
    self._signals: list[int] = []

  def label_all(self, work_units: Sequence[WorkUnit]) -> None:
    """Has all work units done; see `run`."""
    for index in range(len(self._actors)):
      self._begin(index)
    with (
      progress_lib.bar(len(work_units)) as bar,
      stopping.handled_by(self._signals.append),
    ):
      while not self._loads:
        self._step(bar)
      # An actor has started the job by now, or joined it.
      left = self._ledger.left(work_units)
      self._waiting.extend(left)
      bar.update(len(work_units) - len(left))
      self._hand_out()
      while self._waiting or any(unit for _, unit in self._calls.values()):
        self._step(bar)
        self._hand_out()
    self._close()

  def _begin(self, index: int) -> None:
    call = self._actors[index].begin.options(max_task_retries=-1).remote()
    self._calls[call] = index, None

  def _hand_out(self) -> None:
    for index in self._loads:
      while self._waiting and self._loads[index] < _AT_ONCE:
        unit = self._waiting.popleft()
        self._calls[self._actors[index].label.remote(unit)] = index, unit
        self._loads[index] += 1

  def _step(self, bar: tqdm.tqdm) -> None:
    """Waits for the next calls that end."""
    ended, _ = self._ray.wait([*self._calls], timeout=_LOOK)
    if self._signals:
      stopping.at_once(self._signals[0])
    if not self._loads and time.monotonic() > self._next_warning:
      self._next_warning = time.monotonic() + _PATIENCE
      log.warning("No actor is there; waiting for machines, or for models")
    for call in ended:
      index, unit = self._calls.pop(call)
      if unit is None:
        log.info("Ray: %s is there", self._ray.get(call))
        self._loads[index] = 0
      else:
        self._end(call, index, unit, bar)

  def _end(self, call: Any, index: int, unit: WorkUnit, bar: tqdm.tqdm) -> None:
    """What becomes of a work unit that an actor had."""
    try:
      done, error = self._ray.get(call), None
    except self._ray.exceptions.RayTaskError as failed:
      if not isinstance(failed.cause, Unusable):
        raise
      done, error = None, failed.cause
    except self._ray.exceptions.RayError as lost:
      self._lose(index, unit, lost)
      return
    if index in self._loads:
      self._loads[index] -= 1
    self._tries.end(unit, error)
    if done is None:
      self._waiting.append(unit)
      return
    self._num_images += done["images"]["in"]
    speed = self._num_images / (time.monotonic() - self._start)
    bar.set_postfix_str(
      progress_lib.in_words(speed, done["texts"]), refresh=False
    )
    bar.update()

  def _lose(self, index: int, unit: WorkUnit, lost: Exception) -> None:
    self._lost[unit.name] += 1
    log.warning(
      "%s: lost with its actor, for the %d. time; another one gets it (%s)",
      unit.name,
      self._lost[unit.name],
      type(lost).__name__,
    )
    self._waiting.appendleft(unit)
    if self._loads.pop(index, None) is not None:
      self._begin(index)

  def _close(self) -> None:
    """Lets actors end what they write besides."""
    calls = [self._actors[i].__ray_terminate__.remote() for i in self._loads]
    if calls:
      self._ray.wait(calls, num_returns=len(calls), timeout=_GRACE)
