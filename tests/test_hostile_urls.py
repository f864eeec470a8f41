"""URLs that never answer, lie, lead elsewhere, or ask for what is private."""

import socket
import ssl
import time

import jax
import numpy as np
import pytest

from blip_jax.data import transforms
from blip_jax.inference import images, urls
from blip_jax.runtime import sharding
from tests import hostile
from tests.hostile import images as hostile_images
from tests.hostile import urls as web

PIXELS = np.asarray(hostile_images.photo())


@pytest.fixture(scope="module")
def server():
  with web.served() as (port, questions):
    yield f"http://127.0.0.1:{port}", questions


def read(url, **options):
  size = transforms.EvalImage(PIXELS.shape[:2])
  return images.ImageReader(size, urls=True, **options)(url)


def reason(url, **options):
  with pytest.raises(transforms.BadSample) as caught:
    read(url, **options)
  return caught.value.reason


@pytest.mark.parametrize("path", web.SOUND)
def test_sound_answers_are_read(path, server):
  found = read(server[0] + path, allow_private=True)
  np.testing.assert_array_equal(found, PIXELS)


@pytest.mark.parametrize("path", web.BROKEN)
def test_broken_answers_are_bad_samples(path, server):
  expected = {"missing"}
  if path.startswith("/redirect-"):
    expected |= {"refused"}
  if path in ("/204", "/empty", "/half-a-header"):
    expected = {"empty"}
  if path in ("/html", "/packed", "/bomb"):
    expected = {"not_an_image"}
  if path == "/image-bomb":
    expected = {"too_large"}
  if path == "/two-lengths":
    expected |= {"truncated", "corrupt", "not_an_image"}
  assert reason(server[0] + path, allow_private=True) in expected


@pytest.mark.parametrize("path", web.SLOW)
def test_what_takes_too_long_is_given_up(path, server, monkeypatch):
  monkeypatch.setattr(urls, "MAX_SECONDS", 0.3)
  start = time.monotonic()
  assert reason(server[0] + path, allow_private=True) == "timed_out"
  assert time.monotonic() - start < 5


def test_the_limit_of_a_socket_is_as_good_as_that_of_all(server, monkeypatch):
  """Whichever of the two equal limits notices first."""
  monkeypatch.setattr(urls, "MAX_SECONDS", 0.3)
  join = urls._Fetch.join
  monkeypatch.setattr(urls._Fetch, "join", lambda self, _: join(self, 20))
  assert reason(server[0] + "/silent", allow_private=True) == "timed_out"


@pytest.mark.parametrize("path", web.ENDLESS)
def test_what_never_ends_is_cut(path, server, monkeypatch):
  monkeypatch.setattr(urls, "MAX_BYTES", 1 << 20)
  is_body = path in ("/endless-body", "/endless-chunks")
  expected = "too_large" if is_body else "missing"
  assert reason(server[0] + path, allow_private=True) == expected


@pytest.mark.parametrize("host", web.PRIVATE_HOSTS)
def test_private_addresses_are_refused(host, server):
  port = server[0].rpartition(":")[2]
  before = len(server[1])
  assert reason(f"http://{host}:{port}/image") == "refused"
  assert reason(f"http://{host}/image") == "refused"
  assert reason(f"https://{host}/image") == "refused"
  assert len(server[1]) == before


@pytest.mark.parametrize("address", web.PUBLIC_ADDRESSES)
def test_public_addresses_are_not_refused(address):
  assert urls.is_public(address)


@pytest.mark.parametrize("url", web.MALFORMED)
def test_malformed_urls_are_bad_samples(url):
  assert reason(url, allow_private=True) in ("missing", "refused")


def resolver(*answers):
  """Gives these addresses one call after the other; the last one for ever."""
  answers = list(answers)

  def resolve(host, port, *args, **options):
    address = answers.pop(0) if len(answers) > 1 else answers[0]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return [(family, socket.SOCK_STREAM, 6, "", (address, port))]

  return resolve


@pytest.mark.parametrize(
  "addresses", [("127.0.0.1",), ("10.0.0.1",), ("169.254.169.254",), ("::1",)]
)
def test_names_of_private_addresses_are_refused(addresses, monkeypatch):
  monkeypatch.setattr(socket, "getaddrinfo", resolver(*addresses))
  assert reason("http://images.example.com/image") == "refused"
  assert reason("https://images.example.com/image") == "refused"


def test_the_address_that_was_checked_is_connected_to(server, monkeypatch):
  """A name that is public when it is checked and private afterwards."""
  before = len(server[1])
  port = server[0].rpartition(":")[2]
  connected = []

  def connect(self, address):
    connected.append(address)
    raise ConnectionRefusedError

  monkeypatch.setattr(socket.socket, "connect", connect)
  monkeypatch.setattr(socket, "getaddrinfo", resolver("8.8.8.8", "127.0.0.1"))
  assert reason(f"http://a.example.com:{port}/image") == "missing"
  assert connected == [("8.8.8.8", int(port))] and len(server[1]) == before


def test_redirects_are_checked_at_every_hop(server, monkeypatch):
  """The first hop counts as public here, the second one does not."""
  asked = []

  def is_public(address):
    asked.append(address)
    return len(asked) == 1

  monkeypatch.setattr(urls, "is_public", is_public)
  before = len(server[1])
  assert reason(server[0] + "/relative") == "refused"
  assert len(server[1]) == before + 1 and len(asked) == 2


def test_a_name_server_that_never_answers_is_given_up(monkeypatch):
  monkeypatch.setattr(urls, "MAX_SECONDS", 0.2)
  monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1))
  start = time.monotonic()
  assert reason("http://a.example.com/") == "timed_out"
  assert time.monotonic() - start < 0.9


def test_no_credentials_and_no_cookies_are_sent(server, monkeypatch, tmp_path):
  (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
  monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
  url = server[0].replace("//", "//user:secret@") + "/image"
  read(url, allow_private=True)
  question = server[1][-1].lower()
  assert "authorization" not in question and "cookie" not in question
  assert "secret" not in question


def test_certificates_are_checked(tmp_path, monkeypatch):
  (tmp_path / "a.pem").write_text(web.CERTIFICATE)
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(tmp_path / "a.pem")
  with web.served(context) as (port, questions):
    url = f"https://localhost:{port}/image"
    assert reason(url, allow_private=True) == "missing"  # signed by nobody
    assert reason(url) == "refused"
    trusting = ssl.create_default_context(cafile=tmp_path / "a.pem")
    monkeypatch.setattr(urls, "_tls", lambda: trusting)
    other = f"https://127.0.0.1:{port}/image"  # another name
    assert reason(other, allow_private=True) == "missing"
    assert not questions
    found = read(url, allow_private=True)
    np.testing.assert_array_equal(found, PIXELS)
    assert reason(f"http://localhost:{port}/", allow_private=True) == "missing"
  monkeypatch.setattr(urls, "MAX_SECONDS", 0.5)
  with web.served() as (port, _):  # speaks no TLS
    url = f"https://localhost:{port}/image"
    assert reason(url, allow_private=True) in ("timed_out", "missing")


@pytest.mark.parametrize(
  "url",
  ["ftp://localhost/a.png", "file:///etc/hostname", "gopher://a/", "data:,"],
)
def test_other_schemes_are_no_files(url):
  assert reason(url, allow_private=True) in ("unreadable", "missing")


def test_failures_have_the_number_of_their_image(server):
  address = server[0]
  given = [f"{address}/image", f"{address}/404", f"{address}/loop"]
  read = images.ImageReader(
    transforms.EvalImage(8), urls=True, allow_private=True
  )
  mesh = sharding.make_mesh(
    {"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]
  )
  (batch,) = images.batches(given, read, 4, mesh, "skip")
  first, second, third = batch.errors
  assert first is None
  assert second.startswith("image 1: missing: ") and "404" in second
  assert third.startswith("image 2: missing: ") and "10 redirects" in third


@pytest.mark.slow
def test_every_answer_ends(server, monkeypatch, capsys):
  """All answers, with limits that are lower than the real ones."""
  monkeypatch.setattr(urls, "MAX_SECONDS", 2.0)
  monkeypatch.setattr(urls, "MAX_BYTES", 1 << 22)
  failed, tried = [], 0
  for path in web.ANSWERS:
    tried += 1
    start = time.monotonic()
    try:
      read(server[0] + path, allow_private=True)
      held = path in web.SOUND
    except transforms.BadSample:
      held = path not in web.SOUND
    seconds = time.monotonic() - start
    if not held or seconds > 5:
      failed.append(f"{path}: {seconds:.1f} s")
  for host in web.PRIVATE_HOSTS:
    tried += 1
    try:
      urls.fetch(f"http://{host}/")
      failed.append(host)
    except transforms.BadSample as error:
      failed += [host] if error.reason != "refused" else []
  with capsys.disabled():
    hostile.report("urls", tried, failed)
