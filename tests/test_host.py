"""Memory of the host: settings of malloc, and files written in portions."""

import ctypes
import os
import subprocess
import sys
import types

import pytest

from blip_jax.runtime import host


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_freed_memory_is_kept_where_glibc_is(monkeypatch, platform):
  calls = []
  library = types.SimpleNamespace(mallopt=lambda *a: calls.append(a))
  monkeypatch.setattr(sys, "platform", platform)
  monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
  host.keep_freed_memory()
  # malloc.h: M_MMAP_THRESHOLD is -3, M_TRIM_THRESHOLD -1; an int at most.
  expected = [(-3, 2_147_483_647), (-1, 2_147_483_647)]
  assert calls == (expected if platform == "linux" else [])


def test_a_library_without_mallopt_is_left_as_it_is(monkeypatch):
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
  host.keep_freed_memory()


def test_what_is_imported_is_never_searched_for_garbage():
  program = """
import gc
from blip_jax.runtime import host

class Cycle:
  def __init__(self, name):
    self.name, self.itself = name, self
  def __del__(self):
    print(self.name)

Cycle("garbage before")
gc.collect()
early = Cycle("frozen")
host.keep_imported()
del early
Cycle("garbage after")
gc.collect()
late = Cycle("at exit")
del late
"""
  words = [sys.executable, "-c", program]
  printed = subprocess.run(words, check=True, capture_output=True, text=True)
  assert printed.stdout.split("\n") == ["garbage before", "garbage after", ""]


def test_a_large_file_is_synced_in_portions(tmp_path, monkeypatch):
  synced, size = [], lambda: os.path.getsize(tmp_path / "a")
  monkeypatch.setattr(host, "_PORTION", 10)
  monkeypatch.setattr(os, "fsync", lambda _: synced.append(size()))
  with host._Portions(tmp_path / "a", "w") as file:
    for count in (4, 4, 4, 9, 1, 25, 9):
      file.write(b"x" * count)
  # After the 12th byte, then ten more, then a large piece.
  assert synced == [12, 22, 47]
  assert size() == 56


def test_a_created_file_has_what_was_written(tmp_path):
  with host.create_file(tmp_path / "a") as file:
    file.write(b"abc")
    file.write(b"d" * 100_000)
  assert (tmp_path / "a").read_bytes() == b"abc" + b"d" * 100_000
