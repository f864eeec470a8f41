"""How a command ends: users' mistakes are one message, bugs a traceback."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import jax.numpy as jnp
import pytest

from blip_jax.runtime import command, processes

ROOT = pathlib.Path(__file__).resolve().parent.parent


def end_of(error, monkeypatch, traceback=""):
  """The status of a command that raises."""
  monkeypatch.setenv(command.TRACEBACK, traceback)

  @command.reports_errors
  def main():
    raise error

  return main()


def missing_file():
  with pytest.raises(FileNotFoundError) as caught:
    pathlib.Path("nowhere/at.all").read_bytes()
  return caught.value


@pytest.mark.parametrize(
  "error, status, shown",
  [
    (ValueError("config.x: expected 1"), 1, "config.x: expected 1"),
    (command.UsageError("--x: no"), 2, "--x: no"),
    (FloatingPointError("step 4: loss is nan"), 1, "step 4: loss is nan"),
    (ImportError("pip install av"), 1, "pip install av"),
    (missing_file(), 1, "nowhere/at.all: No such file or directory"),
    (OSError("the disk is full"), 1, "the disk is full"),
    (ValueError(), 1, "ValueError"),
    (ValueError("two\nlines"), 1, "two\nlines"),
  ],
)
def test_a_mistake_is_one_message(monkeypatch, capsys, error, status, shown):
  assert end_of(error, monkeypatch) == status
  printed = capsys.readouterr()
  assert printed.err == f"error: {shown}\n" and not printed.out


@pytest.mark.parametrize(
  "error", [KeyError("x"), TypeError("x"), RuntimeError("x"), AssertionError()]
)
def test_a_bug_keeps_its_traceback(monkeypatch, capsys, error):
  with pytest.raises(type(error)):
    end_of(error, monkeypatch)
  assert not capsys.readouterr().err


def test_a_wrong_shape_is_a_bug(capsys):
  @command.reports_errors
  def main():
    jnp.ones(3) @ jnp.ones(4)

  with pytest.raises((TypeError, ValueError)):
    main()

  @command.reports_errors
  def reshape():
    jnp.ones(3).reshape(2, 2)

  with pytest.raises((TypeError, ValueError)):
    reshape()
  assert not capsys.readouterr().err


@pytest.mark.parametrize("wish, raises", [("1", True), ("0", False)])
def test_the_traceback_comes_back_on_request(monkeypatch, wish, raises):
  if raises:
    with pytest.raises(ValueError, match="x"):
      end_of(ValueError("x"), monkeypatch, wish)
  else:
    assert end_of(ValueError("x"), monkeypatch, wish) == 1


def test_the_status_is_what_main_returns():
  assert command.reports_errors(lambda: 3)() == 3
  assert command.reports_errors(lambda: None)() == 0
  assert command.reports_errors(lambda x, y: x + y)(1, y=2) == 3


@pytest.mark.parametrize("error, status", [(ValueError, 1), (KeyError, 1)])
def test_one_of_several_processes_ends_at_once(
  monkeypatch, capsys, error, status
):
  """At a normal exit it would wait for the others."""

  class Left(BaseException):
    pass

  def leave(status):
    raise Left(status)

  monkeypatch.setattr(command.os, "_exit", leave)
  monkeypatch.setattr(command.processes, "has_peers", lambda: True)
  with pytest.raises(Left) as left:
    end_of(error("what it says"), monkeypatch)
  assert left.value.args == (status,)
  shown = capsys.readouterr().err
  assert "what it says" in shown
  assert ("Traceback" in shown) == (error is KeyError)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_asked_to_stop_has_a_status_of_its_own(
  capsys, monkeypatch, number
):
  before = signal.getsignal(number)
  at_exit = []
  monkeypatch.setattr(command, "_leaves_with", at_exit)
  unwound = []

  @command.reports_errors
  def main():
    try:
      os.kill(os.getpid(), number)
      raise AssertionError
    except Exception as error:  # as for one bad sample
      raise AssertionError from error
    finally:
      # A scheduler may ask twice.
      os.kill(os.getpid(), signal.SIGTERM)
      unwound.append(True)

  assert main() == command.AGAIN == 75
  assert at_exit == [75]
  assert unwound == [True] and signal.getsignal(number) == before
  name = signal.Signals(number).name
  expected = f"stopped: {name} was received; the same command resumes\n"
  assert capsys.readouterr().err == expected


@pytest.mark.parametrize("module", ["blip_jax.main", "blip_jax"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_command_that_has_hardly_begun_can_be_stopped(
  tmp_path, module, number
):
  """While jax is imported, here by one that never ends."""
  (tmp_path / "jax.py").write_text(
    "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-m", module, "--config=quickstart"],
    env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    cwd=tmp_path,
    stderr=subprocess.PIPE,
    text=True,
  )
  while not (tmp_path / "importing").exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  process.send_signal(number)
  _, said = process.communicate(timeout=30)
  assert process.returncode == command.AGAIN
  assert (
    said == f"stopped: {number.name} was received; the same command resumes\n"
  )


def test_the_end_of_another_process_is_one_message(monkeypatch, capsys):
  """What JAX raises then; the process must not wait for the others."""
  statuses = []
  monkeypatch.setattr(command.processes, "has_peers", lambda: True)
  monkeypatch.setattr(os, "_exit", statuses.append)
  lost = (
    "UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:3: Connection reset"
  )
  source = "def fail(error):\n  raise error\n"
  library = {"__name__": "jax._src.somewhere"}
  exec(source, library)

  @command.reports_errors
  def main(error, fail):
    fail(error)

  def fail(error):
    raise error

  main(ValueError(lost), library["fail"])
  printed = capsys.readouterr().err
  assert printed.startswith("error: another process of this job has ended")
  assert printed.count("\n") == 1 and "Connection reset" in printed
  main(ValueError("shapes (3,) and (4,)"), library["fail"])
  assert "Traceback" in capsys.readouterr().err
  main(ValueError("gloo is no name"), fail)
  assert capsys.readouterr().err == "error: gloo is no name\n"
  assert statuses == [75, 1, 1]
  # A checkpoint, which others never finish, is closed on the way out.
  orbax = {"__name__": "orbax.checkpoint.somewhere"}
  exec(source, orbax)

  def close_after(error):
    try:
      library["fail"](ValueError(lost))
    finally:
      fail(error)

  main(OSError("step 7 cannot be saved"), close_after)
  main(TimeoutError("6/9 futures"), orbax["fail"])
  main(TimeoutError("no server"), fail)
  assert statuses[3:] == [75, 75, 1]


def test_a_worker_ends_with_its_parent_and_not_before():
  """Its parent is killed, so that nobody can tell it."""
  script = """
import multiprocessing, os, signal, sys, time
from blip_jax.runtime import processes

def work(pipe):
  processes.begin_worker()
  for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
    os.kill(os.getpid(), number)
  pipe.send(os.getpid())
  time.sleep(60)

if __name__ == "__main__":
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  context.Process(target=work, args=(theirs,), daemon=True).start()
  print(ours.recv(), flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "parent.py")
    path.write_text(script)
    parent = subprocess.run(
      [sys.executable, path], stdout=subprocess.PIPE, text=True, timeout=60
    )
  worker = processes.this()._replace(pid=int(parent.stdout), started=0)
  deadline = time.monotonic() + 10
  while not worker.has_ended():
    assert time.monotonic() < deadline
    time.sleep(0.05)
