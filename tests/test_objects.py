"""Files in an object store, against a server that speaks S3."""

import concurrent.futures
import datetime
import json
import logging
import sys
import threading

import numpy as np
import pytest

from blip_jax.runtime import blocks, buckets, copies, files, object_files, paths
from tests import object_store


@pytest.fixture
def bucket(server):
  server.requests.clear()
  return server.bucket()


@pytest.fixture
def impatient(monkeypatch):
  """Two tries, without pauses."""
  retries = {"max_retries": 2, "backoff": {"init_backoff": _MILLISECOND}}
  monkeypatch.setattr(buckets, "RETRIES", retries)
  buckets._bucket.cache_clear()
  yield
  buckets._bucket.cache_clear()


_MILLISECOND = datetime.timedelta(milliseconds=1)


def test_what_is_written_is_read(bucket):
  path = f"{bucket}/run/a b#?%ü[1].json"
  assert not files.exists(path)
  files.write_json(path, {"x": 1})
  assert files.read_json(path) == {"x": 1}
  assert files.is_file(path) and not files.is_folder(path)
  assert files.is_folder(f"{bucket}/run") and not files.is_file(f"{bucket}/run")
  assert files.is_folder(f"{bucket}/run/") and not files.is_folder(
    f"{bucket}/ru"
  )
  assert files.list_folder(f"{bucket}/run") == ["a b#?%ü[1].json"]
  assert files.list_folder(f"{bucket}/none") == []
  assert files.size(path) == len(b'{\n  "x": 1\n}\n')
  files.remove(path)
  files.remove(path)
  assert not files.exists(path)
  with pytest.raises(FileNotFoundError, match=r"no such object.*s3://bucket-"):
    files.read_bytes(path)


@pytest.mark.parametrize(
  "form", ["s3:/{}/a/b", "s3://{}//a/b/", "s3://{}/a/./b"]
)
def test_an_address_has_several_forms(bucket, form):
  """`pathlib` and `normpath` leave one slash of two."""
  files.write_text(f"{bucket}/a/b", "x")
  assert files.read_text(form.format(bucket.removeprefix("s3://"))) == "x"


def test_an_address_stays_in_its_bucket(bucket):
  with pytest.raises(ValueError, match="leads out of its bucket"):
    files.read_text(f"{bucket}/a/../../other/x")


def test_as_path(bucket):
  path = files.as_path(f"{bucket}/run") / "x.json"
  assert str(path) == f"{bucket}/run/x.json"
  assert str(path.parent) == f"{bucket}/run"
  assert str(path.with_name("y")) == f"{bucket}/run/y"


def write_tree(bucket):
  for name in ("a.txt", "d/b.txt", "d/e/c.txt", "d/.hidden", "f/0.tar"):
    files.write_text(f"{bucket}/t/{name}", name)


def test_folders(bucket, server):
  write_tree(bucket)
  # As the console of S3 writes a folder.
  for name in ("t/", "t/f/"):
    server.put(bucket, name, b"")
  assert files.entries(f"{bucket}/t") == [
    ("a.txt", False, False),
    ("d", True, False),
    ("f", True, False),
  ]
  assert list(files.walk(f"{bucket}/t")) == [
    (f"{bucket}/t", ["d", "f"], ["a.txt"]),
    (f"{bucket}/t/d", ["e"], [".hidden", "b.txt"]),
    (f"{bucket}/t/d/e", [], ["c.txt"]),
    (f"{bucket}/t/f", [], ["0.tar"]),
  ]
  files.rename(f"{bucket}/t/d", f"{bucket}/t/g")
  assert files.list_folder(f"{bucket}/t") == ["a.txt", "f", "g"]
  assert files.read_text(f"{bucket}/t/g/e/c.txt") == "d/e/c.txt"
  files.remove_folder(f"{bucket}/t/g")
  assert files.list_folder(f"{bucket}/t") == ["a.txt", "f"]
  with pytest.raises(FileNotFoundError):
    files.entries(f"{bucket}/t/g")


@pytest.mark.parametrize(
  "pattern, found",
  [
    ("t/*/*.t*", ["t/d/b.txt", "t/f/0.tar"]),
    ("t/d/*", ["t/d/b.txt", "t/d/e"]),
    ("t/[ab].txt", ["t/a.txt"]),
    ("t/none*", []),
    ("t/d/b.txt", ["t/d/b.txt"]),
    ("t/x.txt", []),
  ],
)
def test_patterns(bucket, pattern, found):
  write_tree(bucket)
  assert files.glob(f"{bucket}/{pattern}") == [f"{bucket}/{p}" for p in found]


def test_ranges(bucket):
  files.write_bytes(f"{bucket}/x", b"0123456789")
  read = lambda start, size: files.read_range(f"{bucket}/x", start, size)
  assert (read(0, 3), read(7, 100), read(10, 1), read(99, 9), read(4, 0)) == (
    b"012",
    b"789",
    b"",
    b"",
    b"",
  )


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
  monkeypatch.setattr(blocks, "_NEAR_BYTES", 1000)


def random_bytes(size, seed=0):
  return np.random.default_rng(seed).bytes(size)


def test_ranges_in_order_are_read_in_blocks(bucket, server, small_blocks):
  content = random_bytes(20_500)
  files.write_bytes(f"{bucket}/x", content)
  server.requests.clear()
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    read = lambda start: files.read_range(f"{bucket}/x", start, 130)
    assert b"".join(pool.map(read, range(0, 20_500, 130))) == content
  # 158 ranges; 21 blocks, and some before the order shows.
  assert len(server.requests) < 40


def test_ranges_in_any_order_are_single_requests(bucket, server, small_blocks):
  files.write_bytes(f"{bucket}/x", random_bytes(500_000))
  server.requests.clear()
  for start in np.random.default_rng(0).permutation(50)[:20] * 10_000:
    files.read_range(f"{bucket}/x", int(start), 100)
  assert len(server.requests) == 20


def test_the_text_behind_an_image_is_no_request(bucket, server, small_blocks):
  """Samples of a shard in any order, as in training."""
  content = random_bytes(500_000)
  files.write_bytes(f"{bucket}/x", content)
  server.requests.clear()
  for start in np.random.default_rng(0).permutation(50)[:20] * 10_000:
    for begin, size in ((start + 512, 3000), (start + 4000, 40)):
      found = files.read_range(f"{bucket}/x", int(begin), size)
      assert found == content[begin : begin + size]
  assert len(server.requests) == 21  # the first learns the ETag


def test_a_file_is_read_in_pieces(bucket, server, small_blocks):
  content = random_bytes(10_250)
  files.write_bytes(f"{bucket}/x", content)
  with files.open_read(f"{bucket}/x") as file:
    assert file.read(10) == content[:10]
    assert file.seek(-300, 2) == 9_950
    assert file.read() == content[-300:]
    file.seek(995)
    assert file.read(1500) == content[995:2495]
    file.seek(0)
    assert file.read() == content
    assert file.seek(99_999) and file.read() == b""
  server.requests.clear()
  files.write_bytes(f"{bucket}/empty", b"")
  assert files.read_bytes(f"{bucket}/empty") == b""
  files.write_bytes(f"{bucket}/small", b"x")
  server.requests.clear()
  files.read_bytes(f"{bucket}/small")
  assert len(server.requests) == 1


@pytest.mark.parametrize(
  "text, kind, problem",
  [
    (
      "error sending request for url (http://169.254.169.254/latest/api/token)",
      PermissionError,
      "no credentials are found",
    ),
    (
      "GET http://x/b/metadata.jsonl - status code: 503 Slow <Code>Slow</Code>",
      files.Unavailable,
      "status 503 Slow",
    ),
    ("operation timed out", files.Unavailable, "no answer"),
  ],
)
def test_errors_in_words(text, kind, problem):
  address = paths.address("s3://b/metadata.jsonl")
  error = buckets._translated(Exception(text), address, "read")
  assert type(error) is kind and problem in str(error)


def test_an_object_that_changes_while_it_is_read(bucket, small_blocks):
  files.write_bytes(f"{bucket}/x", random_bytes(50_000))
  with files.open_read(f"{bucket}/x") as file:
    file.read(10)
    files.write_bytes(f"{bucket}/x", random_bytes(50_000, 1))
    file.seek(30_000)
    with pytest.raises(OSError, match="changed since reading it began"):
      file.read(10)


def test_ranges_of_an_object_that_another_process_changes(bucket, server):
  files.write_bytes(f"{bucket}/x", random_bytes(50_000))
  files.read_range(f"{bucket}/x", 0, 10)
  other = random_bytes(50_000, 1)
  server.put(bucket, "x", other)
  with pytest.raises(OSError, match="changed since reading it began"):
    files.read_range(f"{bucket}/x", 100, 10)
  # Who asks what it is now reads it as it is now.
  assert files.size(f"{bucket}/x") == 50_000
  assert files.read_range(f"{bucket}/x", 100, 10) == other[100:110]


@pytest.mark.parametrize(
  "status", ["503 Slow Down", "500 Oops", "429 Too Many"]
)
def test_requests_are_repeated(bucket, server, status):
  files.write_text(f"{bucket}/x", "x")
  with server.fails(status, times=2) as fault:
    assert files.read_text(f"{bucket}/x") == "x"
  assert fault["times"] == 0
  with server.fails(status, times=2, method="PUT") as fault:
    files.write_text(f"{bucket}/x", "y")
  assert fault["times"] == 0
  assert files.read_text(f"{bucket}/x") == "y"


def test_slow_answers_are_given_up_and_repeated(bucket, server, monkeypatch):
  files.write_text(f"{bucket}/x", "x")
  timeout = datetime.timedelta(milliseconds=200)
  monkeypatch.setattr(buckets, "READ_TIMEOUT", timeout)
  buckets._bucket.cache_clear()
  with server.fails("", times=1, seconds=1.0, method="GET") as fault:
    assert files.read_text(f"{bucket}/x") == "x"
  assert fault["times"] == 0
  buckets._bucket.cache_clear()


def test_a_store_that_fails_for_good(bucket, server, impatient):
  with (
    server.fails(times=99),
    pytest.raises(
      files.Unavailable, match=r"status 503 SlowDown.*/x'"
    ) as error,
  ):
    files.read_text(f"{bucket}/x")
  assert object_store.SECRET not in str(error.value)
  assert error.value.__suppress_context__


@pytest.mark.parametrize(
  "method, act, permission",
  [
    ("GET", lambda path: files.read_text(path), "s3:GetObject"),
    ("HEAD", lambda path: files.size(path), "s3:GetObject"),
    ("PUT", lambda path: files.write_text(path, "x"), "s3:PutObject"),
    ("PUT", lambda path: files.claim(path, "x"), "s3:PutObject"),
    ("GET", lambda path: files.list_folder(path), "s3:ListBucket"),
  ],
)
def test_a_bucket_that_refuses(bucket, server, method, act, permission):
  refused = server.fails(
    "403 Forbidden", times=9, method=method, code="AccessDenied"
  )
  with refused, pytest.raises(PermissionError) as error:
    act(f"{bucket}/x")
  said = str(error.value)
  assert "access denied (403" in said and f"{bucket}/x" in said
  assert f"needs the permission {permission}." in said
  assert "AWS_ACCESS_KEY_ID" in said
  assert object_store.SECRET not in said


@pytest.mark.parametrize(
  "act",
  [
    files.read_text,
    files.exists,
    files.size,
    files.list_folder,
    lambda path: files.write_text(path, "x"),
    lambda path: files.claim(path, "x"),
  ],
)
def test_a_bucket_that_does_not_exist(server, act):
  with pytest.raises(OSError, match="there is no bucket 'missing-bucket'"):
    act("s3://missing-bucket/x")


def test_nothing_secret_is_logged(bucket, server, caplog, impatient):
  caplog.set_level(logging.DEBUG)
  with (
    server.fails("403 Forbidden", times=9),
    pytest.raises(PermissionError) as error,
  ):
    files.read_text(f"{bucket}/x")
  assert object_store.SECRET not in caplog.text + repr(error.value)
  assert object_store.SECRET not in repr(buckets._bucket("s3", "x"))


def test_one_of_many_claims_succeeds(bucket):
  path, start = f"{bucket}/.lock", threading.Barrier(8)

  def claim(number):
    start.wait()
    return files.claim(path, f"process {number}")

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert sum(pool.map(claim, range(8))) == 1
  assert not files.claim(path, "late")


def test_a_claim_whose_answer_was_lost_is_known_as_ours(bucket):
  files.write_text(f"{bucket}/.lock", "process 1")
  assert files.claim(f"{bucket}/.lock", "process 1")
  assert not files.claim(f"{bucket}/.lock", "process 2")


def test_only_an_object_with_the_mark_is_overwritten(bucket):
  path = f"{bucket}/.lock"
  files.write_text(path, "mine 1")
  files.overwrite(path, "mine", "mine 2")
  files.overwrite(path, "other", "other 3")
  assert files.read_text(path) == "mine 2"
  with pytest.raises(FileNotFoundError):
    files.overwrite(f"{bucket}/none", "mine", "x")


def test_an_object_that_was_replaced_is_not_overwritten(
  bucket, server, monkeypatch
):
  path, get = f"{bucket}/.lock", buckets.get
  files.write_text(path, "mine 1")

  def slow(*args):
    part = get(*args)
    server.put(bucket, ".lock", b"another owner")
    return part

  monkeypatch.setattr(buckets, "get", slow)
  files.overwrite(path, "mine", "mine 2")
  monkeypatch.undo()
  assert files.read_text(path) == "another owner"


def test_lines_are_appended(bucket, monkeypatch):
  path = f"{bucket}/metrics.jsonl"
  files.write_text(path, '{"step": 1}\n')
  monkeypatch.setattr(object_files, "APPEND_SECONDS", 0.0)
  with files.open_append(path) as file:
    file.write('{"step": 2}\n')
    file.flush()
    assert [*files.json_lines(path)] == [{"step": 1}, {"step": 2}]
    file.write('{"step"')
  assert files.read_text(path).endswith('{"step"')
  files.drop_partial_line(path)
  assert files.read_text(path) == '{"step": 1}\n{"step": 2}\n'


def test_appended_lines_are_uploaded_now_and_then(bucket, server, monkeypatch):
  monkeypatch.setattr(object_files, "APPEND_SECONDS", 0.3)
  path, is_there = f"{bucket}/x.jsonl", threading.Event()
  put = buckets.put
  monkeypatch.setattr(
    buckets, "put", lambda *args: (put(*args), is_there.set())
  )
  with files.open_append(path) as file:
    for number in range(100):
      file.write(f"{number}\n")
      file.flush()
    assert is_there.wait(10)
    assert files.read_text(path).splitlines() == [*map(str, range(100))]
  assert sum(method == "PUT" for method, _ in server.requests) <= 3


def test_single_lines_are_appended(bucket, server, monkeypatch):
  monkeypatch.setattr(object_files, "APPEND_SECONDS", 0.0)
  monkeypatch.setattr(object_files, "_APPEND_PATIENCE", 0.0)
  files.write_text(f"{bucket}/x", "0\n")
  server.requests.clear()
  for number in range(1, 4):
    files.append_line(f"{bucket}/x", str(number))
  # What is there is read once.
  assert [method for method, _ in server.requests] == ["GET", *["PUT"] * 3]
  assert files.read_text(f"{bucket}/x") == "0\n1\n2\n3\n"


def test_a_failure_to_append_is_raised(bucket, server, impatient):
  refused = server.fails("403 Forbidden", times=9, method="PUT")
  with (
    refused,
    pytest.raises(PermissionError, match="s3:PutObject"),
    files.open_append(f"{bucket}/x") as file,
  ):
    file.write("line")


def test_what_fails_is_not_written(bucket):
  with (
    pytest.raises(RuntimeError, match="stop"),
    files.open_atomic(f"{bucket}/x") as file,
  ):
    file.write(b"half")
    raise RuntimeError("stop")
  assert not files.exists(f"{bucket}/x")


def test_a_large_object_is_written_whole(bucket):
  content = random_bytes(9 << 20)
  with files.open_atomic(f"{bucket}/x") as file:
    file.write(content)
  assert files.size(f"{bucket}/x") == len(content)
  assert (
    files.sha256(f"{bucket}/x") == files.hashlib.sha256(content).hexdigest()
  )


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "blip_jax"


def test_a_local_copy_is_made_once(bucket, server, cache):
  files.write_text(f"{bucket}/train.json", "[1]")
  copy = copies.local_copy(f"{bucket}/train.json")
  assert copy.startswith(f"{cache}/") and copy.endswith("/train.json")
  assert files.read_text(copy) == "[1]"
  server.requests.clear()
  assert copies.local_copy(f"{bucket}/train.json") == copy
  assert [method for method, _ in server.requests] == ["HEAD"]
  files.write_text(f"{bucket}/train.json", "[2]")
  new = copies.local_copy(f"{bucket}/train.json")
  assert files.read_text(new) == "[2]" and not files.exists(copy)
  assert copies.local_copy("data/x.json") == "data/x.json"


def test_the_last_file_of_a_folder_is_copied_last(bucket, server, tmp_path):
  names = ["a", "done.json", "z/y"]
  for name in names:
    files.write_json(tmp_path / "x" / name, name)
  server.requests.clear()
  copies.copy_folder(tmp_path / "x", f"{bucket}/y", last=["done.json"])
  assert server.requests[-1][1].endswith("/y/done.json")
  copies.copy_folder(f"{bucket}/y", tmp_path / "z")
  assert [files.read_json(tmp_path / "z" / name) for name in names] == names


def test_a_mirror(bucket, tmp_path, cache):
  mirror = copies.Mirror(f"{bucket}/tb")
  files.write_json(f"{mirror.folder}/a/events", 1)
  mirror.update()
  assert files.read_json(f"{bucket}/tb/a/events") == 1
  assert copies.Mirror(tmp_path).folder == str(tmp_path)


def test_without_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, "obstore", None)
  with pytest.raises(ImportError, match=r"pip install 'blip_jax\[cloud\]'"):
    files.check("gs://bucket/x")
  assert files.check("data/x") == "data/x"


def test_json_numbers_survive(bucket):
  files.write_json(f"{bucket}/x.json", {"a": float("nan")})
  assert json.loads(files.read_text(f"{bucket}/x.json")) == {"a": "NaN"}
