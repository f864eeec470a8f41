"""Locks: one process works on an output, and the rest is told who."""

import concurrent.futures
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from blip_jax.runtime import files, lock, processes

# Seconds without a beat after which an owner elsewhere is gone, in tests.
PATIENCE = 0.6


def owned_by(path, **changes):
  """A lock of another process, as that would have written it."""
  content = processes.this()._asdict() | {"id": "x", "beat": 0}
  path.write_text(json.dumps(content | changes))
  return path


def dead_pid():
  with subprocess.Popen(["true"]) as process:
    process.wait()
  return process.pid


ELSEWHERE = {"host": "elsewhere", "machine": "0a0b0c0d"}


@pytest.fixture
def path(tmp_path):
  return tmp_path / ".lock"


def test_a_lock_says_who_works_here_and_goes_with_its_owner(path):
  with lock.hold(path) as held:
    content = lock.owner(path)
    assert (content["host"], content["pid"]) == (
      socket.gethostname(),
      os.getpid(),
    )
    held.check()
  assert not path.exists()
  with pytest.raises(KeyError), lock.hold(path):
    raise KeyError
  assert files.list_folder(path.parent) == []


def test_two_of_one_process_are_refused_at_once(path):
  with lock.hold(path):
    start = time.monotonic()
    with (
      pytest.raises(ValueError, match=rf"process {os.getpid()} on .* works"),
      lock.hold(path),
    ):
      raise AssertionError
    assert time.monotonic() - start < 0.5
  with lock.hold(path):
    pass


OTHERS = {
  "a folder": os.mkdir,
  "a named pipe": os.mkfifo,
  "a link to nothing": lambda path: os.symlink("nowhere", path),
  "a link to itself": lambda path: os.symlink(path, path),
  "a link to a folder": lambda path: os.symlink(path.parent, path),
  "a link to a pipe": lambda path: (
    os.mkfifo(path.with_name("pipe")),
    os.symlink("pipe", path),
  ),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", [".lock", ".lock+"])
def test_what_is_no_lock_is_named(path, kind, name):
  """At once, and it stays."""
  OTHERS[kind](path.with_name(name))
  if name == ".lock+":  # taken to replace a lock whose owner is gone
    owned_by(path, pid=dead_pid())
  before = files.list_folder(path.parent)
  start = time.monotonic()
  with (
    pytest.raises(ValueError, match=rf"{re.escape(name)}: expected a file"),
    lock.hold(path),
  ):
    raise AssertionError
  assert time.monotonic() - start < 0.5
  assert files.list_folder(path.parent) == before


@pytest.mark.parametrize("known", [True, False])
def test_an_owner_of_this_host_that_has_ended_is_gone_at_once(path, known):
  owned_by(path, pid=dead_pid())
  if not known:  # only what everybody knows
    path.write_text(
      json.dumps({"host": socket.gethostname(), "pid": dead_pid(), "id": "x"})
    )
  start = time.monotonic()
  with lock.hold(path):
    assert time.monotonic() - start < 0.5
  assert files.list_folder(path.parent) == []


def test_a_number_that_another_process_has_by_now_is_no_owner(path):
  owned_by(path, pid=os.getpid(), started=processes.this().started - 1)
  with lock.hold(path):
    pass


def test_a_number_in_another_container_says_nothing(path):
  """The process of that number ended here, and works there."""
  owned_by(path, machine="0a0b0c0d", pid=dead_pid())
  waiting = lock.Lock(path, PATIENCE)
  assert waiting.take() is None
  owned_by(path, machine="0a0b0c0d", beat=1)
  assert waiting.take() is False


@pytest.mark.parametrize("when", [0.0, 2e9, 4e9])
def test_whether_the_beat_moves_decides_and_no_clock(path, when):
  """A file from the past, and one from the future."""
  owned_by(path, **ELSEWHERE)
  os.utime(path, (when, when))
  start = time.monotonic()
  with lock.hold(path, PATIENCE) as held:
    assert PATIENCE < time.monotonic() - start < 3 * PATIENCE
    held.check()


def test_an_owner_elsewhere_whose_beat_moves_is_told(path):
  owned_by(path, **ELSEWHERE)
  stop = threading.Event()

  def beat():
    number = 0
    while not stop.wait(PATIENCE / 6):
      os.utime(path, (0, 0))
      owned_by(path, beat=(number := number + 1), **ELSEWHERE)

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with (
      pytest.raises(ValueError, match=r"on elsewhere works here"),
      lock.hold(path, PATIENCE),
    ):
      raise AssertionError
  finally:
    stop.set()
    thread.join()
  assert lock.owner(path)["id"] == "x"


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b'{"host": "a", "pi',
    b"\xff\x00",
    b"[" * 100_000,
    b"null",
    b"[1]",
    b'{"host": 1, "pid": "x"}',
    b'{"host": "a", "pid": -1, "since": ["\\u001b[2J"]}',
    b'{"host": "a", "pid": 1e400}',
    b'{"host": "a", "pid": 99999999999999999999}',
    b'{"host": "a", "pid": true, "started": "x", "machine": 3}',
  ],
)
def test_a_damaged_lock_is_taken_over_when_nothing_moves(path, content):
  path.write_bytes(content)
  with lock.hold(path, 0.2) as held:
    held.check()


def test_the_beat_moves_while_the_owner_works(path):
  held = lock.Lock(path, PATIENCE)
  assert held.take()
  first = lock.owner(path)["beat"]
  time.sleep(PATIENCE)
  assert lock.owner(path)["beat"] > first
  held.release()


def test_an_owner_that_is_stuck_stops_beating(path):
  held = lock.Lock(path, PATIENCE, stuck_after=PATIENCE)
  assert held.take()
  for _ in range(4):
    time.sleep(PATIENCE / 2)
    held.progress()
  before = lock.owner(path)["beat"]
  time.sleep(2 * PATIENCE)
  stuck = lock.owner(path)["beat"]
  time.sleep(PATIENCE)
  assert lock.owner(path)["beat"] == stuck > before > 4
  held.release()


def test_an_owner_that_lost_its_lock_stops_and_leaves_the_new_one(path):
  with lock.hold(path, PATIENCE) as held:
    path.unlink()
    owned_by(path, **ELSEWHERE)
    time.sleep(PATIENCE / 3)  # at least one beat
    with pytest.raises(ValueError, match=r"has lost its lock.*elsewhere"):
      held.check()
  assert lock.owner(path)["id"] == "x"
  assert lock.owner(path)["beat"] == 0


def test_of_many_that_take_over_one_succeeds(path):
  for _ in range(20):
    owned_by(path, pid=2**22 + 5)
    locks = [lock.Lock(path) for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      taken = [*pool.map(lock.Lock.take, locks)]
    assert taken.count(True) == 1
    for one in locks:
      one.release()
    assert files.list_folder(path.parent) == []


def test_a_new_lock_is_not_removed_with_the_abandoned_one(path):
  """Another process was faster between looking and taking over."""
  owned_by(path, pid=2**22 + 5)
  found = path.read_bytes()
  owned_by(path, id="new")
  assert not lock.Lock(path)._take_over(found)
  assert lock.owner(path)["id"] == "new"
  assert files.list_folder(path.parent) == [".lock"]


def test_a_process_that_died_while_it_took_over_stops_nobody(path):
  owned_by(path, pid=dead_pid())
  owned_by(path.with_name(".lock+"), pid=dead_pid())
  with lock.hold(path):
    pass
  assert files.list_folder(path.parent) == []


def test_the_lock_of_an_output_has_a_name_that_fits(tmp_path):
  assert lock.path_for("a/out.jsonl") == files.pathlib.Path("a/.out.jsonl.lock")
  longest = tmp_path / ("x" * 250)
  with lock.hold(lock.path_for(longest)):
    pass


@pytest.mark.slow
def test_a_killed_owner_of_this_host_is_gone_at_once(path):
  script = (
    "import sys, time; from blip_jax.runtime import lock\n"
    "with lock.hold(sys.argv[1]):\n  print(flush=True); time.sleep(60)"
  )
  with subprocess.Popen(
    [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE
  ) as process:
    process.stdout.readline()
    with pytest.raises(ValueError, match="works here"), lock.hold(path):
      raise AssertionError
    process.kill()
  with lock.hold(path):
    pass
