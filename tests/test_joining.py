"""Processes of one job: whether they find each other and were told the same."""

import json
import re
import socket
import threading

import jax
import ml_collections
import pytest

from blip_jax.runtime import command, joining


@pytest.fixture
def free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def test_a_first_process_that_does_not_come_up_is_named(monkeypatch, free_port):
  monkeypatch.setattr(joining, "_JOIN_SECONDS", 0)
  monkeypatch.setenv("XLA_FLAGS", "")  # which joining adds to
  how = f"localhost:{free_port},2,1"
  message = rf"process 0 did not listen at localhost:{free_port} within 0 s"
  with pytest.raises(command.UsageError, match=message):
    joining.join(how)


@pytest.fixture
def cluster(monkeypatch):
  """One that is found without looking; compiler flags are restored."""
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setattr(joining.jax.distributed, "initialize", lambda **_: None)
  monkeypatch.setattr(joining.signal, "signal", lambda *_: None)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
  "before, after",
  [
    ("", "{}=false"),
    ("--xla_dump_to=x", "--xla_dump_to=x {}=false"),
    ("{}=true", "{}=true"),
  ],
)
def test_collectives_have_one_order_unless_a_user_wants_another(
  monkeypatch, before, after
):
  flag = "--xla_cpu_enable_concurrency_optimized_scheduler"
  monkeypatch.setenv("XLA_FLAGS", before.format(flag))
  joining.join("auto")
  assert joining.os.environ["XLA_FLAGS"] == after.format(flag)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("count", [1, 2])
def test_processes_on_cpus_keep_no_programs(monkeypatch, count):
  monkeypatch.setattr(joining.jax, "process_count", lambda: count)
  before = jax.config.jax_enable_compilation_cache
  try:
    joining.join("auto")
    assert before
    assert jax.config.jax_enable_compilation_cache == (count == 1)
  finally:
    jax.config.update("jax_enable_compilation_cache", before)


def test_a_first_process_that_comes_up_later_is_found(monkeypatch, free_port):
  monkeypatch.setattr(joining, "_JOIN_SECONDS", 20)
  server = socket.socket()

  def listen():
    server.bind(("localhost", free_port))
    server.listen()

  timer = threading.Timer(0.7, listen)
  timer.start()
  joining._await_first("", f"localhost:{free_port}")
  timer.join()
  server.close()


@pytest.mark.parametrize(
  "tasks, how, warned",
  [
    ({"SLURM_NTASKS": "2"}, "off", "SLURM_NTASKS=2: .*--distributed=auto"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "off", "OMPI_COMM_WORLD_SIZE=4: "),
    ({"SLURM_NTASKS": "2"}, "auto", ""),
    ({"SLURM_NTASKS": "1"}, "off", ""),
    # One step of a script that has more tasks.
    ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, "off", ""),
    ({"SLURM_NTASKS": "two"}, "off", ""),
    ({}, "off", ""),
  ],
)
def test_tasks_that_work_apart_are_warned(
  monkeypatch, caplog, tasks, how, warned
):
  for name in joining._TASKS:
    monkeypatch.delenv(name, raising=False)
  for name, value in tasks.items():
    monkeypatch.setenv(name, value)
  joining.warn_if_apart(how)
  assert len(caplog.messages) == bool(warned)
  assert re.search(warned, "".join(caplog.messages))


def told(monkeypatch, *others):
  """As if other processes had been told something else."""
  monkeypatch.setattr(joining.processes, "has_peers", lambda: True)
  monkeypatch.setattr(
    joining, "_gather", lambda text: [text, *map(json.dumps, others)]
  )


SAME = {"--workdir": "'run'", "--config.a.b": "1", "--config.c": "'x'"}
CONFIG = ml_collections.ConfigDict({"a": {"b": 1}, "c": "x"})


def test_processes_that_were_told_the_same(monkeypatch):
  joining.check_same(CONFIG, "run")
  told(monkeypatch, SAME, SAME)
  joining.check_same(CONFIG, "run")


@pytest.mark.parametrize(
  "change, line",
  [
    ({"--config.a.b": "2"}, "--config.a.b: 1 in process 0, 2 in process 2"),
    ({"--workdir": "'x'"}, "--workdir: 'run' in process 0, 'x' in process 2"),
    ({"--config.d": "3"}, "--config.d: absent in process 0, 3 in process 2"),
  ],
)
def test_processes_that_were_told_something_else(monkeypatch, change, line):
  told(monkeypatch, SAME, SAME | change)
  with pytest.raises(command.UsageError) as error:
    joining.check_same(CONFIG, "run")
  assert str(error.value).splitlines()[1:] == [f"  {line}"]
