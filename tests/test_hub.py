"""Checkpoints on disk, on the hub, and behind an unreliable server."""

import email.message
import fnmatch
import hashlib
import http.client
import http.server
import logging
import os
import pathlib
import shutil
import socket
import threading
import urllib.error

import huggingface_hub
import pytest

from blip_jax.convert import hub, registry

CONTENT = os.urandom(3_000_000)
NAME = "model_of_a_test"
WAITS = hub._WAITS  # before the fixture removes them


class Server(http.server.ThreadingHTTPServer):
  """Serves `content` at every address, with the faults of its attributes.

  Attributes:
    cuts: bytes after which each of the next responses is interrupted.
    statuses: of the next responses, instead of 200.
    ranges: whether Range is supported.
    if_range: whether If-Range is supported.
    shift: bytes by which a range starts too early.
    requested: the Range of each request so far, or None.
    sent: bytes of content sent so far.
  """

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.content = CONTENT
    self.etag = '"one"'
    self.content_type = "application/octet-stream"
    self.cuts, self.statuses = [], []
    self.ranges = self.if_range = True
    self.shift = 0
    self.requested, self.sent = [], 0

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}/{NAME}.pth"


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    server, requested = self.server, self.headers["Range"]
    server.requested.append(requested)
    if server.statuses:
      return self.send_error(server.statuses.pop(0))
    start = 0
    same = self.headers["If-Range"] == server.etag or not server.if_range
    if requested and server.ranges and same:
      start = int(requested.removeprefix("bytes=").removesuffix("-"))
      start -= server.shift
    if start >= len(server.content):
      return self.send_error(416)
    self.send_response(206 if start else 200)
    size = len(server.content)
    if start:
      self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
    if server.etag:
      self.send_header("ETag", server.etag)
    self.send_header("Content-Type", server.content_type)
    self.send_header("Content-Length", str(size - start))
    self.end_headers()
    body = server.content[start:]
    body = body[: server.cuts.pop(0)] if server.cuts else body
    server.sent += len(body)
    self.wfile.write(body)

  def log_message(self, *_):
    pass


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  folder = tmp_path / "cache"
  monkeypatch.setenv("BLIP_JAX_CACHE", str(folder))
  monkeypatch.setenv("no_proxy", "*")
  monkeypatch.setattr(hub, "_WAITS", (0, 0))
  return folder


@pytest.fixture
def server(monkeypatch):
  with Server() as server:
    # As a released checkpoint, and under any other URL.
    row = registry.Released(NAME, server.url, "caption", "base", 384)
    monkeypatch.setitem(registry.RELEASED, NAME, row)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def _interrupt_once(server, at=1_000_000):
  server.cuts = [at, 0, 0]
  with pytest.raises(
    ValueError, match=f"interrupted after {at} of 3000000 bytes"
  ):
    hub.fetch(NAME)
  server.requested.clear()
  server.sent = 0


def _only(cache, *names):
  return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") == (
    sorted(names)
  )


def test_local_files_and_folders_are_returned_as_they_are(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "model_vqa").write_bytes(b"mine")
  (tmp_path / "Salesforce" / "blip-vqa-base").mkdir(parents=True)
  for name in ("model_vqa", "Salesforce/blip-vqa-base"):
    assert hub.fetch(name) == pathlib.Path(name)
    assert hub.fetch(tmp_path / name) == tmp_path / name


def test_a_file_is_downloaded_once(server, cache, caplog, monkeypatch):
  caplog.set_level(logging.INFO)
  path = hub.fetch(NAME)
  assert path == cache / f"{NAME}.pth" and path.read_bytes() == CONTENT
  assert _only(cache, path.name)
  assert hashlib.sha256(CONTENT).hexdigest() in caplog.text
  # A cache that this user may only read.
  monkeypatch.setattr(os, "access", lambda *_: False)
  assert hub.fetch(f"{NAME}.pth") == path
  assert server.requested == [None]


def test_an_interrupted_download_resumes_in_the_same_call(server):
  server.cuts = [1_000_000, 500_000]
  assert hub.fetch(NAME).read_bytes() == CONTENT
  assert server.requested == [None, "bytes=1000000-", "bytes=1500000-"]
  assert server.sent == len(CONTENT)


def test_retries_are_unlimited_while_there_is_progress(server):
  server.cuts = [300_000] * 9
  assert hub.fetch(NAME).read_bytes() == CONTENT


def test_an_interrupted_download_resumes_in_a_later_call(server, cache):
  _interrupt_once(server)
  assert _only(cache, f"{NAME}.pth.part", f"{NAME}.pth.part.etag")
  assert hub.fetch(NAME).read_bytes() == CONTENT
  assert server.requested == ["bytes=1000000-"]
  assert server.sent == len(CONTENT) - 1_000_000
  assert _only(cache, f"{NAME}.pth")


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("etag", ['"two"', 'W/"one"', ""])
def test_a_changed_file_is_downloaded_from_the_start(server, etag, if_range):
  _interrupt_once(server)
  server.content, server.etag = CONTENT[::-1], etag
  server.if_range = if_range
  assert hub.fetch(NAME).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("etag", ['W/"one"', ""])
def test_a_file_without_a_strong_etag_is_not_resumed(server, etag):
  server.etag = etag
  server.cuts = [1_000_000]
  assert hub.fetch(NAME).read_bytes() == CONTENT
  assert server.requested == [None, None]


def test_a_server_without_ranges_sends_the_complete_file_again(server):
  server.ranges = False
  server.cuts = [1_000_000]
  assert hub.fetch(NAME).read_bytes() == CONTENT
  assert server.requested == [None, "bytes=1000000-"]


def test_a_range_with_another_start_is_not_appended(server):
  _interrupt_once(server)
  server.shift = 7
  assert hub.fetch(NAME).read_bytes() == CONTENT


def test_a_file_that_shrank_is_downloaded_again(server):
  _interrupt_once(server)
  server.content, server.if_range = b"short", False
  assert hub.fetch(NAME).read_bytes() == b"short"


@pytest.mark.parametrize("sha256", [("0" * 64, ""), ("", "0000000")])
def test_a_wrong_checksum_is_refused(server, cache, monkeypatch, sha256):
  row = registry.Released(
    NAME, server.url, "caption", "base", 384, sha256=sha256
  )
  monkeypatch.setitem(registry.RELEASED, NAME, row)
  with pytest.raises(ValueError, match=r"expected SHA-256 .*0000, found"):
    hub.fetch(NAME)
  assert not [p for p in cache.iterdir() if p.suffix in (".pth", ".part")]
  digest = hashlib.sha256(CONTENT).hexdigest()
  row = registry.Released(
    NAME, server.url, "caption", "base", 384, sha256=(digest[:8], digest[-7:])
  )
  monkeypatch.setitem(registry.RELEASED, NAME, row)
  assert hub.fetch(NAME).read_bytes() == CONTENT
  assert server.requested == [None, None]


@pytest.mark.parametrize(
  "content, content_type",
  [
    (b"log in, please", "text/html; charset=utf-8"),
    (b"\n<!DOCTYPE html><p>log in, please", "application/octet-stream"),
  ],
)
def test_a_web_page_is_refused_and_received_bytes_are_kept(
  server, content, content_type
):
  _interrupt_once(server)
  right = server.content, server.content_type, server.etag
  server.content, server.content_type, server.etag = content, content_type, ""
  with pytest.raises(ValueError, match="found a web page"):
    hub.fetch(NAME)
  server.content, server.content_type, server.etag = right
  assert hub.fetch(NAME).read_bytes() == CONTENT
  assert server.sent == len(content) + len(CONTENT) - 1_000_000


@pytest.mark.parametrize("status", [403, 404])
def test_a_missing_file_is_not_requested_again(server, cache, status):
  server.statuses = [status]
  with pytest.raises(ValueError, match=f"answered {status} .*check the addr"):
    hub.fetch(NAME)
  assert server.requested == [None] and _only(cache)


def test_a_busy_server_is_retried(server, caplog):
  server.statuses = [500, 503]
  assert hub.fetch(NAME).read_bytes() == CONTENT
  assert "500 Internal Server Error. Retrying" in caplog.text
  server.statuses = [503] * 3
  with pytest.raises(ValueError, match="503 Service Unavailable"):
    hub.fetch(server.url)
  assert not server.statuses


def test_without_a_network_the_error_says_where_to_put_the_file(
  server, cache, monkeypatch
):
  _interrupt_once(server)
  with socket.create_server(("127.0.0.1", 0)) as closed:
    port = closed.getsockname()[1]
  url = f"http://127.0.0.1:{port}/{NAME}.pth"
  row = registry.Released(NAME, url, "caption", "base", 384)
  monkeypatch.setitem(registry.RELEASED, NAME, row)
  with pytest.raises(ValueError) as error:
    hub.fetch(NAME)
  message = str(error.value)
  assert f"{url} cannot be downloaded: no connection (" in message
  assert f"put it at {cache / NAME}.pth, or pass the path" in message
  kept = f"1000000 bytes received so far are kept in {cache / NAME}.pth.part"
  assert kept in message


def test_a_full_disk_is_noticed_before_the_download(server, cache, monkeypatch):
  usage = shutil.disk_usage(cache.parent)._replace(free=2_000_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  with pytest.raises(ValueError, match=r"0\.0 GB free.*set BLIP_JAX_CACHE"):
    hub.fetch(NAME)
  assert _only(cache)


def test_only_the_missing_bytes_must_fit_the_disk(server, cache, monkeypatch):
  _interrupt_once(server)
  usage = shutil.disk_usage(cache)._replace(free=2_000_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  assert hub.fetch(NAME).read_bytes() == CONTENT


def test_an_unusable_cache_folder_is_named(server, cache):
  cache.write_bytes(b"a file")
  with pytest.raises(
    ValueError, match=f"{cache}, the folder .* cannot be written; set BLIP_"
  ):
    hub.fetch(NAME)
  assert server.requested == []


def test_concurrent_calls_download_once(server):
  contents = []
  download = lambda: contents.append(hub.fetch(NAME).read_bytes())
  threads = [threading.Thread(target=download) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert contents == [CONTENT] * 4
  assert server.requested == [None]


@pytest.mark.parametrize(
  "path, name",
  [
    ("/a/mine.pth?signature=1/2", "mine.pth"),
    ("/model*_vqa.pth", "model__vqa.pth"),
    ("/a/..%2f..%2Fevil.pth", "evil.pth"),
    ("/a/%2e%2e", ".."),
    ("/a/b%5c..%5cc", "b_.._c"),
    ("/a/", ""),
  ],
)
def test_a_url_cannot_choose_the_folder_of_its_file(server, cache, path, name):
  base = server.url.removesuffix(f"/{NAME}.pth")
  file = hub.fetch(base + path)
  assert file.parent == cache and file.read_bytes() == CONTENT
  assert file.name[9:] == name
  # Files with the same name from two URLs are two files.
  assert hub.fetch(f"{base}/other{path}") != file


def test_the_cache_folder_follows_the_environment(monkeypatch, cache):
  assert hub.cache_dir() == cache
  monkeypatch.delenv("BLIP_JAX_CACHE")
  monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
  assert hub.cache_dir() == pathlib.Path("/xdg/blip_jax")
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", "/home/me")
  assert hub.cache_dir() == pathlib.Path("/home/me/.cache/blip_jax")


@pytest.mark.parametrize(
  "name, message",
  [
    ("model_large_captoin", r"\. Did you mean model_large_caption "),
    (
      "weights/model_vqq.pth",
      r"folder, nor the name .* Did you mean model_vqa",
    ),
    ("ftp://127.0.0.1/model.pth", r"nor an http\(s\) URL"),
    ("file:///etc/passwd", r"nor an http\(s\) URL"),
    ("", "is neither a local file or folder"),
    ("a/b/c", r"nor a repository .* \(Owner/name\)$"),
  ],
)
def test_the_error_for_an_unknown_name_says_what_was_tried(
  name, message, monkeypatch
):
  monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
  with pytest.raises(ValueError, match=message) as error:
    hub.fetch(name)
  assert repr(name) in str(error.value)


@pytest.fixture
def repository(tmp_path, monkeypatch):
  """A hub with one repository: its file names, and the local snapshot."""
  files, folder = set(), tmp_path / "snapshot"

  def download(name, allow_patterns):
    folder.mkdir(exist_ok=True)
    for file in files:
      if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
        (folder / file).touch()
    return str(folder)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  return files, folder


SMALL = {
  "config.json",
  "generation_config.json",
  "preprocessor_config.json",
  "processor_config.json",
  "vocab.txt",
  "tokenizer.json",
  "tokenizer_config.json",
  "added_tokens.json",
  "special_tokens_map.json",
}


@pytest.mark.parametrize(
  "weights, unwanted",
  [
    ({"model.safetensors"}, {"pytorch_model.bin", "tf_model.h5"}),
    (
      {"model.safetensors.index.json", "model-00001-of-00002.safetensors"},
      set(),
    ),
    ({"pytorch_model.bin"}, {"tf_model.h5", "README.md"}),
  ],
)
def test_one_format_of_the_weights_of_a_repository_is_fetched(
  repository, weights, unwanted
):
  files, folder = repository
  files |= SMALL | weights | unwanted
  assert hub.fetch("Salesforce/blip-vqa-base") == folder
  assert set(os.listdir(folder)) == SMALL | weights


def test_a_repository_without_weights_is_refused(repository):
  files, _ = repository
  files |= SMALL
  with pytest.raises(ValueError, match=r"no weights.*only \['added_t"):
    hub.fetch("somebody/blip")


def test_without_a_network_a_repository_is_found_in_the_cache_only(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(
    huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub")
  )
  with pytest.raises(ValueError) as error:
    hub.fetch("Salesforce/blip-vqa-base")
  kept = tmp_path / "hub" / "models--Salesforce--blip-vqa-base"
  message = str(error.value)
  assert "run `hf download Salesforce/blip-vqa-base --local-dir" in message
  assert "pass its path" in message and f"to {kept}" in message
  assert "Did you mean" not in message
  with pytest.raises(ValueError, match="mean Salesforce/blip-vqa-base "):
    hub.fetch("salesforce/blip-vqa-bas")

  snapshot = kept / "snapshots" / "1234"
  snapshot.mkdir(parents=True)
  (kept / "refs").mkdir()
  (kept / "refs" / "main").write_text("1234")
  (snapshot / "model.safetensors").touch()
  assert hub.fetch("Salesforce/blip-vqa-base") == snapshot


def test_an_invalid_repository_name_is_refused():
  with pytest.raises(ValueError, match="nor a visible repository on "):
    hub.fetch("some--body/blip..base")


def test_waits_grow_and_start_over_after_progress(server, monkeypatch):
  waited = []
  monkeypatch.setattr(hub, "_WAITS", WAITS)
  monkeypatch.setattr(hub.time, "sleep", waited.append)
  server.statuses = [503] * 4
  with pytest.raises(ValueError, match="503"):
    hub.fetch(NAME)
  assert waited == [1, 2, 4]
  waited.clear()
  # A thousand bytes arrive, then nothing twice, then a thousand more.
  server.cuts = [1000, 0, 0, 1000, 0]
  assert hub.fetch(NAME).read_bytes() == CONTENT
  assert waited == [1, 2, 4, 1, 2]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_faults_of_a_server_are_retried(server, status):
  server.statuses = [status, status]
  assert hub.fetch(NAME).read_bytes() == CONTENT
  assert len(server.requested) == 3


@pytest.mark.parametrize("status", [400, 401, 409, 430, 501, 505])
def test_lasting_faults_of_a_server_are_not_retried(server, status):
  server.statuses = [status, status]
  with pytest.raises(ValueError, match=f"answered {status}"):
    hub.fetch(NAME)
  assert len(server.requested) == 1


class Response(http.client.HTTPResponse):
  """A response of `size` bytes that records how it is read."""

  status, url = 200, "http://a/b.pth"

  def __init__(self, size):
    self.fp = None
    self.length, self.left, self.asked = size, size, []
    self.headers = email.message.Message()
    self.headers["Content-Type"] = "application/octet-stream"

  def read(self, size):
    self.asked.append(size)
    size = min(size, self.left)
    self.left -= size
    return b"x" * size

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass


def test_a_stalled_connection_is_given_up_after_half_a_minute(
  cache, monkeypatch
):
  response = Response(300_000)
  timeouts = []

  def urlopen(request, timeout):
    timeouts.append(timeout)
    return response

  monkeypatch.setattr(hub.urllib.request, "urlopen", urlopen)
  assert hub.fetch("http://a/b.pth").read_bytes() == b"x" * 300_000
  assert timeouts == [30]
  # A quarter of a megabyte at a time, until nothing is left.
  assert response.asked == [2**18] * 3


@pytest.mark.parametrize(
  "free, is_enough", [(1000, True), (999, False), (10**12, True)]
)
def test_a_disk_may_be_filled_to_the_last_byte(
  tmp_path, monkeypatch, free, is_enough
):
  monkeypatch.setattr(hub.files, "free_bytes", lambda _: free)
  part = tmp_path / "a.part"
  part.write_bytes(b"x" * 500)
  if is_enough:
    hub._check_space(part, 1500)
  else:
    with pytest.raises(ValueError, match="set BLIP_JAX_CACHE"):
      hub._check_space(part, 1500)


@pytest.mark.parametrize(
  "head, is_page",
  [
    (b"<HTML>", True),
    (b"  \n<?xml version", True),
    (b"<!DOCTYPE html>", True),
    (b" " * 1019 + b"<html>", True),
    (b" " * 1020 + b"<html>", False),
    (b"PK\x03\x04<html>", False),
    (b"", False),
  ],
)
def test_the_first_kilobyte_tells_a_web_page(head, is_page):
  if is_page:
    with pytest.raises(ValueError, match="found a web page"):
      hub._refuse_web_page(Response(1), head)
  else:
    hub._refuse_web_page(Response(1), head)


def test_names_of_downloads_are_not_too_long():
  url = f"http://a/{'n' * 200}.pth"
  name = hub._file_name(url, None)
  digest, rest = name.split("-")
  assert rest == "n" * 96 + ".pth"
  assert digest == hashlib.sha256(url.encode()).hexdigest()[:8]
  released = registry.RELEASED["model_base"]
  assert hub._file_name(released.source, released) == "model_base.pth"


@pytest.mark.parametrize(
  "error, text",
  [
    (OSError("first\nsecond"), "first"),
    (OSError(), "OSError"),
    (urllib.error.URLError("refused"), "refused"),
  ],
)
def test_a_reason_is_one_line(error, text):
  assert hub._reason(error) == text
