"""Files are complete or absent, and nothing else opens them."""

import ast
import hashlib
import json
import math
import os
import pathlib
import socket
import subprocess
import threading
import time

import pytest

import blip_jax
from blip_jax.runtime import files, processes

PACKAGE = pathlib.Path(blip_jax.__file__).parent


def test_json_is_replaced_atomically(tmp_path):
  path = tmp_path / "deep" / "results.json"
  files.write_json(path, {"a": [1, math.inf]})
  assert json.loads(path.read_text()) == {"a": [1, "Infinity"]}
  with pytest.raises(TypeError):
    files.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": [1, "Infinity"]}
  assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_reader_never_sees_half_a_file(tmp_path):
  path = tmp_path / "a.bin"
  files.write_bytes(path, b"old")
  with files.open_atomic(path) as file:
    file.write(b"half")
    file.flush()
    assert files.read_bytes(path) == b"old"
    file.write(b" and whole")
  assert files.read_bytes(path) == b"half and whole"
  with pytest.raises(RuntimeError), files.open_atomic(path) as file:
    file.write(b"lost")
    raise RuntimeError
  assert files.read_bytes(path) == b"half and whole"
  assert files.list_folder(tmp_path) == ["a.bin"]


def test_bytes_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
  calls = []
  fsync, replace = os.fsync, os.replace
  monkeypatch.setattr(
    os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1]
  )
  monkeypatch.setattr(
    os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1]
  )
  files.write_text(tmp_path / "a.txt", "text")
  assert calls == ["fsync", "replace"]


def test_an_error_names_the_file_that_was_to_be_written(tmp_path):
  (tmp_path / "a.json").mkdir()
  with pytest.raises(IsADirectoryError) as caught:
    files.write_json(tmp_path / "a.json", {})
  assert caught.value.filename == str(tmp_path / "a.json")
  assert ".tmp" not in str(caught.value)
  assert files.list_folder(tmp_path) == ["a.json"]


def test_one_of_many_claims_a_file(tmp_path):
  path, claimed = tmp_path / "lease", []
  start = threading.Barrier(8)

  def claim(number):
    start.wait()
    if files.claim(path, str(number)):
      claimed.append(number)

  threads = [threading.Thread(target=claim, args=(n,)) for n in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(claimed) == 1
  assert files.read_text(path) == str(claimed[0])


def test_a_partial_last_line_is_dropped(tmp_path):
  path = tmp_path / "lines.jsonl"
  files.append_line(path, "one")
  files.append_line(path, "two")
  with files.open_append(path) as file:
    file.write("thr")
  assert list(files.complete_lines(path)) == [b"one\n", b"two\n"]
  files.drop_partial_line(path)
  assert files.read_text(path) == "one\ntwo\n"
  files.drop_partial_line(path)
  assert files.read_text(path) == "one\ntwo\n"
  files.drop_partial_line(tmp_path / "absent")


def test_ranges_and_folders(tmp_path):
  path = tmp_path / "deep" / "a.bin"
  files.make_folder(path.parent)
  files.write_bytes(path, b"0123456789")
  assert files.read_range(path, 3, 4) == b"3456"
  assert files.read_range(path, 8, 4) == b"89"
  assert files.size(path) == 10
  assert files.list_folder(tmp_path) == ["deep"]
  assert files.list_folder(tmp_path / "absent") == []
  assert files.glob(f"{tmp_path}/**/*.bin") == [str(path)]
  files.remove(path)
  files.remove(path)
  assert not files.exists(path)


def test_a_file_is_hashed(tmp_path):
  (tmp_path / "a").write_bytes(b"abc")
  # FIPS 180-4.
  assert files.sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_a_small_file_is_overwritten_only_by_its_owner(tmp_path):
  path = tmp_path / "a"
  with pytest.raises(FileNotFoundError):
    files.overwrite(path, "me", "me 1")
  path.write_text("me 0")
  files.overwrite(path, "me", "me 10")
  assert path.read_text() == "me 10"
  path.write_text("you 0")
  files.overwrite(path, "me", "me 11")
  assert path.read_text() == "you 0"


def left_behind(folder, process, age=0.0):
  """A temporary file of a process, with the time it was written."""
  name = f".{process.machine}-{process.pid}-{process.started}-{'0' * 16}.tmp"
  path = folder / name
  path.write_text("half")
  os.utime(path, (time.time() - age, time.time() - age))
  return path


def test_what_killed_processes_left_is_deleted_by_the_next_writer(tmp_path):
  me, day = processes.this(), 86_400
  with subprocess.Popen(["true"]) as process:
    process.wait()
  elsewhere = me._replace(machine="0a0b0c0d", pid=7)
  dead = left_behind(tmp_path, me._replace(pid=process.pid))
  another = left_behind(tmp_path, me._replace(started=me.started + 1))
  old = left_behind(tmp_path, elsewhere, 2 * day)
  recent = left_behind(tmp_path, elsewhere._replace(pid=8), day / 2)
  mine = left_behind(tmp_path, me, 2 * day)
  of_user = tmp_path / ".mine.tmp"
  of_user.write_text("x")
  merge = tmp_path / f".{me.machine}-{2**22 + 5}-1-{'0' * 16}.tmp"
  orbax = tmp_path / f"{merge.name}.orbax-checkpoint-tmp"
  for folder in (merge, orbax):
    folder.mkdir()
    (folder / "00000.tar").write_text("x")
  files.write_text(tmp_path / "out", "x")
  for path in (dead, another, old, merge, orbax):
    assert not path.exists(), path
  for path in (recent, mine, of_user):
    assert path.exists(), path


@pytest.mark.parametrize(
  "content, problem",
  [
    (b"", "the file is empty"),
    (b" \n", "the file is empty"),
    (b'{"a": [1, ', "no JSON"),
    (b"\xff\xfe\x00", "no JSON"),
    (b"[" * 100_000, "no JSON"),
  ],
)
def test_json_that_is_damaged_names_its_file(tmp_path, content, problem):
  path = tmp_path / "a.json"
  path.write_bytes(content)
  with pytest.raises(files.DamagedFile, match=rf"a.json: damaged: {problem}"):
    files.read_json(path)


def test_damaged_lines_are_left_out_and_counted(tmp_path, caplog):
  path = tmp_path / "log.jsonl"
  path.write_bytes(b'{"a": 1}\n{"a": \n\xff\n[3]\n\n{"a": 2}\n{"a": 3}')
  assert [*files.json_lines(path)] == [{"a": 1}, {"a": 2}]
  assert "log.jsonl: left out 4 damaged lines" in caplog.text


# Name on disk -> how it is written.
NAMES = {
  b"caf\xe9.jpg": r"caf\xe9.jpg",  # latin-1
  b"\x94L.jpg": r"\x94L.jpg",  # Shift-JIS
  b"a\nb\t.jpg": r"a\x0ab\x09.jpg",
  b"\x1b[31m.jpg": r"\x1b[31m.jpg",
  b"\xc2\x85.jpg": r"\xc2\x85.jpg",  # a line end of Unicode
  b"\xe2\x80\xa8.jpg": r"\xe2\x80\xa8.jpg",  # another
  rb"literally\xe9.jpg": r"literally\x5cxe9.jpg",
  rb"a\b\new\x.jpg": r"a\b\new\x.jpg",
  "sub/\u00e9 \u65e5\u672c \U0001f415.jpg".encode(): (
    "sub/\u00e9 \u65e5\u672c \U0001f415.jpg"
  ),
}


@pytest.mark.parametrize("raw, text", NAMES.items())
def test_any_name_can_be_written_and_found_again(tmp_path, raw, text):
  name = os.fsdecode(raw)
  assert files.printable(name) == text
  assert files.named(text) == name
  assert len(text.encode().splitlines()) == 1
  path = tmp_path / "folder" / name
  files.make_folder(path.parent)
  files.write_text(path, "x")
  assert files.read_text(files.named(files.printable(str(path)))) == "x"


def test_names_that_differ_are_written_differently():
  raw = [bytes([92, 120, a, b]) for a in b"0a\\x\xe9" for b in b"9f\\x\xe9\n"]
  raw += [b"\\" + one for one in raw] + [b"\n", b"\xe9", b"\x0a"]
  names = {os.fsdecode(one) for one in raw}
  assert len({files.printable(name) for name in names}) == len(names)
  assert {files.named(files.printable(name)) for name in names} == names


def test_a_text_with_names_becomes_one_line():
  text = os.fsdecode(b"caf\xe9.jpg") + ": [Errno 2]\nb'\\xff'"
  assert files.one_line(text) == r"caf\xe9.jpg: [Errno 2]\x0ab'\xff'"


def test_half_of_a_surrogate_pair_can_be_written():
  assert files.printable("a\ud83d.jpg") == r"a\xed\xa0\xbd.jpg"


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\udce9"])
def test_the_longest_names_are_written(tmp_path, letter):
  path = tmp_path / (letter * (255 // len(os.fsencode(letter))))
  files.write_text(path, "first")
  files.write_text(path, "second")
  assert files.read_text(path) == "second"
  assert len(files.list_folder(tmp_path)) == 1


def test_a_long_name_is_shortened_and_stays_unique(tmp_path):
  assert files.shortened("a" * 190) == "a" * 190
  long = b"a" * 250
  stems = (long + b"b", long + b"c", b"\xe9" * 250, b"\xc3\xa9" * 125)
  names = [files.shortened(os.fsdecode(stem)) for stem in stems]
  for name in names:
    files.write_text(tmp_path / (name + "x" * 65), "")
  assert len(files.list_folder(tmp_path)) == len(stems)


def test_a_temporary_folder_is_deleted():
  with files.temporary_folder() as folder:
    (folder / "a").write_text("x")
  assert not folder.exists()


# Modules that reach the file system by another way, and which.
OTHER_WAYS = {
  # etils.epath, as Orbax needs it.
  "runtime/snapshot.py": {"exists", "is_dir"},
  "runtime/saved_arrays.py": {"exists"},
  "runtime/saved_items.py": {"iterdir", "read_text", "write_text"},
  "runtime/host.py": {"fsync"},  # a file that is synced in portions
  "runtime/processes.py": {"read_text"},  # of /proc, which files.py needs
  "runtime/objects.py": {"open", "tempfile", "glob"},  # what is uploaded
  "runtime/object_files.py": {"tempfile"},  # likewise
  "runtime/remote_steps.py": {"exists"},  # of digests.py
  "evaluators/scores/java.py": {"shutil"},  # the path of a program
}
MODULES = {"shutil", "tempfile", "glob"}
OF_OS = {
  *("open", "listdir", "scandir", "walk", "makedirs", "mkdir", "remove"),
  *("unlink", "rename", "replace", "link", "stat", "truncate", "utime"),
  *("access", "fsync"),
}
OF_OS_PATH = {"exists", "isfile", "isdir", "getsize", "getmtime", "realpath"}
OF_PATHS = {
  *("read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "rmdir"),
  *("iterdir", "unlink", "touch", "is_file", "is_dir", "rglob", "exists"),
}


def file_accesses(source):
  """Names by which Python code reaches the file system."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from {alias.name for alias in node.names} & MODULES
    elif isinstance(node, ast.ImportFrom):
      yield from {node.module} & MODULES
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
      yield from {node.func.id} & {"open"}
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
      owner, name = ast.unparse(node.func.value), node.func.attr
      if owner == "os":
        yield from {name} & OF_OS
      elif owner == "os.path":
        yield from {name} & OF_OS_PATH
      # `json_files` reads by `files`.
      elif owner not in ("files", "files_lib", "json_files", "disk"):
        yield from {name} & OF_PATHS


def test_accesses_are_recognised():
  assert set(file_accesses("import shutil")) == {"shutil"}
  assert set(file_accesses("from glob import glob")) == {"glob"}
  assert set(file_accesses("open(path)")) == {"open"}
  assert set(file_accesses("os.path.exists(path)")) == {"exists"}
  assert set(file_accesses("os.replace(a, b)")) == {"replace"}
  assert set(file_accesses("(folder / name).read_text()")) == {"read_text"}
  assert not set(file_accesses("files.exists(os.path.join(a, b))"))


def test_there_is_one_door_to_the_file_system():
  for path in sorted(PACKAGE.rglob("*.py")):
    name = path.relative_to(PACKAGE).as_posix()
    if name in ("runtime/files.py", "runtime/disk.py"):
      continue
    found = set(file_accesses(path.read_text()))
    assert found == OTHER_WAYS.get(name, set()), name


SCHEMES = (
  "GS://bucket/run",
  " gs://bucket/run",
  "gs://",
  "hdfs://host:9000/run",
  "file:///tmp/run",
  "https://a.org/run",
  "s3+boto-1.0://bucket/run",
  "data/gs://bucket/run",
  "/home/me/s3:/bucket/run",
)


@pytest.mark.parametrize("path", [*SCHEMES, pathlib.Path("hdfs://bucket/run")])
def test_paths_with_a_scheme_are_refused_before_anything_exists(
  tmp_path, monkeypatch, path
):
  """`os.makedirs` alone would make a folder that is called "hdfs:"."""
  monkeypatch.chdir(tmp_path)
  for access in (
    files.absolute,
    files.make_folder,
    files.list_folder,
    files.read_bytes,
    files.open_append,
    lambda path: files.write_text(path, "x"),
    lambda path: files.write_json(path, {}),
    lambda path: files.claim(path, "x"),
    lambda path: files.glob(str(path)),
    lambda path: list(files.walk(path)),
    lambda path: files.rename(tmp_path, path),
  ):
    # Readers of rows count an OSError, and jobs report a ValueError.
    for kind in (OSError, ValueError):
      with pytest.raises(kind, match=r"gs://.* not supported: mount or copy"):
        access(path)
  assert not list(tmp_path.iterdir())


def test_a_web_address_is_no_file_yet():
  """Callers that download look for a file of this name first."""
  assert not files.exists("https://a.org/model.pth")
  assert not files.is_folder("https://a.org/model.pth")
  with pytest.raises(ValueError, match="hdfs://"):
    files.exists("hdfs://bucket/model.pth")


@pytest.mark.parametrize("name", ["a:b.jpg", "12:30/x", "scenes:val", "x: y"])
def test_names_with_colons_are_files(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  files.write_json(name, {})
  assert files.is_file(name)


def test_the_parts_of_a_shortened_name():
  """173 bytes of the name, a hyphen, and 16 digits of its hash."""
  name = files.shortened("a" * 191)
  digest = hashlib.sha256(b"a" * 191).hexdigest()
  assert name == f"{'a' * 173}-{digest[:16]}" and len(name) == 190
  # No half of a letter is left.
  assert files.shortened("\u00e9" * 100).startswith("\u00e9" * 86 + "-")


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
@pytest.mark.parametrize(
  "read",
  [
    files.read_bytes,
    files.read_text,
    files.read_json,
    files.open_read,
    files.open_text,
    files.sha256,
    lambda path: files.read_range(path, 0, 9),
    lambda path: list(files.complete_lines(path)),
  ],
)
def test_only_regular_files_are_read(tmp_path, monkeypatch, kind, read):
  """A pipe that nobody writes to would be waited for for ever."""
  path = tmp_path / "x.png"
  with socket.socket(socket.AF_UNIX) as server:
    if kind == "pipe":
      os.mkfifo(path)
    elif kind == "device":
      path.symlink_to("/dev/zero")
    elif kind == "socket":
      monkeypatch.chdir(tmp_path)  # the path of a socket must be short
      server.bind(path.name)
    else:
      path.mkdir()
    with pytest.raises(OSError):
      read(path)
    assert not files.is_file(path)
