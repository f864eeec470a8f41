"""200 requests that a service must not answer, and cannot be hurt by."""

import concurrent.futures
import contextlib
import io
import json
import random
import re
import socket
import struct
import time
import zlib

import PIL.Image
import pytest

from tests import serving

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server():
  with serving.started(serving.make_hosts("caption", "retrieval")) as server:
    yield server


@pytest.fixture(autouse=True)
def stays_up(server):
  """After each test the service still answers."""
  yield
  body = serving.chat(serving.png())
  assert serving.post(server.address, CHAT, body)[0] == 200


def claiming(width, height):
  """A PNG of some hundred bytes that claims to be large."""

  def chunk(kind, data):
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum

  head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  pixels = zlib.compress(bytes(1 << 20), 9)
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    chunk(*one) for one in [(b"IHDR", head), (b"IDAT", pixels), (b"IEND", b"")]
  )


def image(width, height, kind="PNG"):
  content = io.BytesIO()
  PIL.Image.new("RGB", (width, height)).save(content, kind)
  return content.getvalue()


def bad_images():
  rng = random.Random(0)
  good = serving.png(size=64)
  for number in range(30):
    yield f"random bytes {number}", rng.randbytes(rng.randint(0, 5000))
  for number in range(30):
    yield f"cut at {number}", good[: rng.randrange(8, len(good) // 2)]
  for number in range(10):
    noisy = bytearray(good)
    for _ in range(30):
      noisy[rng.randrange(16, 60)] = rng.randrange(256)
    yield f"noise {number}", bytes(noisy)
  for size in [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)]:
    yield f"claims {size}", claiming(*size)
  yield "20,000 px", image(20_000, 20_000 // 64)
  yield "text", b"hello"
  yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
  yield "eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
  yield "zip", b"PK\x03\x04" + bytes(100)


def bad_urls():
  good = serving.data_url(serving.png())
  yield "wrong type", serving.data_url(serving.png(), "text/html")
  yield "no type", good.replace("image/png", "")
  yield "no base64", good.replace(";base64", "")
  yield "no comma", good.replace(",", "")
  yield "garbage", "data:image/png;base64,@@@@"
  yield "spaces", "data:image/png;base64,AAAA AAAA"
  yield "odd", good[:-5]
  yield "empty", "data:image/png;base64,"
  yield "nothing", ""
  yield "unicode", "data:image/png;base64,\u00e9\u4e2d"
  for url in (
    "http://127.0.0.1/a.png",
    "https://example.org/a.png",
    "http://169.254.169.254/latest",
    "file:///etc/passwd",
    "/etc/passwd",
    "../../etc/passwd",
    "ftp://example.org/a.png",
    "javascript:1",
  ):
    yield url, url


def bad_fields():
  """Changes of a good request to chat."""
  for name, values in {
    "n": (0, -1, 10**9, 10**30, 1.5, "1", None, True, [1]),
    "temperature": (-1, 2.1, "hot", [], 1e308),
    "top_p": (0, -0.1, 1.1, "all"),
    "max_tokens": (0, -5, 2.5, "many"),
    "seed": (-1, 2**31, 2**70, 1.5, "x"),
    "messages": ([], {}, "hi", None, [1], [{}], [{"role": "user"}]),
    "model": (1, [], "x" * 5000, "\u0000", "../caption"),
    "stream": ("yes", 3),
    "logprobs": ("yes", 5),
    "top_logprobs": (5,),
    "tools": ([{"type": "function"}],),
    "stop": ("a", ["b"]),
    "response_format": ({"type": "json_object"},),
    "logit_bias": ({"1": 2},),
    "frequency_penalty": (1,),
    "metadata": ("x", {"a": 1}),
    "no_such_field": (1,),
    "__class__": ("x",),
  }.items():
    for value in values:
      yield f"{name}={value!r:.30}", {name: value}
  yield "both limits", {"max_tokens": 3, "max_completion_tokens": 3}


def bad_messages():
  (good,) = serving.messages(serving.png())
  image = good["content"][0]
  user = lambda *parts: [{"role": "user", "content": [*parts]}]
  text = lambda text: {"type": "text", "text": text}
  yield "no image", user(text("hi"))
  yield "only text", [{"role": "user", "content": "hi"}]
  yield "two images", user(image, image)
  yield "many parts", user(image, *[text("a")] * 100)
  yield "a system", [{"role": "system", "content": "be brief"}, good]
  yield "a history", [good, {"role": "assistant", "content": "a"}, good]
  yield "two messages", [good, good]
  yield "huge prompt", user(image, text("a " * 40_000))
  yield "long prompt", user(image, text("red " * 16))
  yield "audio", user({"type": "input_audio", "input_audio": {}})
  yield "no url", user({"type": "image_url", "image_url": {}})
  yield "number", user({"type": "image_url", "image_url": 3})
  yield "more", user({**image, "more": 1})


def bad_bodies():
  good = serving.chat(serving.png())
  rng = random.Random(1)
  for number in range(10):
    yield f"random {number}", rng.randbytes(100 * number)
  yield "deep", b"[" * 10**6
  yield "deep objects", b'{"a":' * 150_000
  yield "deep and closed", b"[" * 10**5 + b"]" * 10**5
  yield (
    "many keys",
    b"{" + b",".join(b'"k%d":1' % n for n in range(60_000)) + b"}",
  )
  yield "many numbers", b'{"messages":[' + b"1," * 300_000 + b"1]}"
  yield "cut", good[:-20]
  yield "NaN", good.replace(b'"model"', b'"temperature": NaN, "model"')
  yield "Infinity", good.replace(b'"model"', b'"top_p": Infinity, "model"')
  yield (
    "long number",
    good.replace(b'"model"', b'"n": 1' + b"0" * 9000 + b', "model"'),
  )
  yield "surrogate", good.replace(b'"caption"', b'"\\ud800"')
  yield "latin-1", good.replace(b'"caption"', b'"caf\xe9"')
  yield "utf-16", good.decode().encode("utf-16")
  yield "null", b"null"
  yield "list", b"[]"
  yield "number", b"1e999"
  yield "two", good + good
  yield "too large", b'{"a": "' + b"A" * (2 << 20) + b'"}'


def bad_embeddings():
  for name, asked in {
    "nothing": {},
    "null": {"input": None},
    "empty": {"input": []},
    "no words": {"input": ["...", " "]},
    "tokens": {"input": [1, 2, 3]},
    "lists of tokens": {"input": [[1, 2]]},
    "too many": {"input": ["a"] * 9},
    "one is bad": {"input": ["a", "data:image/png;base64,AAAA"]},
    "long": {"input": "a " * 60_000},
    "size": {"input": "a", "dimensions": 7},
    "format": {"input": "a", "encoding_format": "int8"},
    "other model": {"input": "a", "model": "caption"},
  }.items():
    yield name, json.dumps({"model": "retrieval", **asked}).encode()


def bad_requests():
  """(name, path, body) of each."""
  for name, content in bad_images():
    yield f"image: {name}", CHAT, serving.chat(content)
  for name, url in bad_urls():
    yield f"url: {name}", CHAT, serving.chat(url)
  for name, change in bad_fields():
    yield f"field: {name}", CHAT, serving.chat(serving.png(), **change)
  for name, said in bad_messages():
    body = json.dumps({"model": "caption", "messages": said}).encode()
    yield f"message: {name}", CHAT, body
  for name, body in bad_bodies():
    yield f"body: {name}", CHAT, body
  for name, body in bad_embeddings():
    yield f"embeddings: {name}", EMBEDDINGS, body


BAD = [*bad_requests()]


def test_each_bad_request_gets_a_4xx_that_says_why(server):
  assert len(BAD) >= 200

  def send(bad):
    name, path, body = bad
    start = time.monotonic()
    status, _, content = serving.post(server.address, path, body)
    return name, status, content, time.monotonic() - start

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = [*pool.map(send, BAD)]
  wrong = [(name, status) for name, status, *_ in found if status // 100 != 4]
  assert not wrong
  for name, _, content, _ in found:
    error = json.loads(content)["error"]
    assert 0 < len(error["message"]) <= 1000, name
    assert "/root" not in error["message"], name
    assert ".py" not in error["message"], name
  slow = [(name, seconds) for name, *_, seconds in found if seconds > 10]
  assert not slow


@pytest.mark.parametrize(
  "change, expected",
  [
    ({"n": 0}, "n: Input should be greater than or equal to 1, found 0"),
    ({"n": 10**9}, "n: expected at most 3 beams; .*; found 1000000000"),
    ({"n": 10**9, "temperature": 1}, "n: .* 2 samples; found 1000000000"),
    ({"temperature": -1}, "temperature: .* equal to 0, found -1"),
    ({"temperature": 1e-40}, "temperature: .* from 1e-12 .*, found 1e-40"),
    ({"temperature": "hot"}, 'temperature: .* number, found "hot"'),
    ({"temperature": float("nan")}, "temperature: .* finite .*, found NaN"),
    ({"logprobs": 1}, "logprobs: .* boolean, found 1"),
    ({"model": ["a"]}, "model: .* string, found a list"),
    ({"seed": 10**40}, "seed: .*, found a longer number"),
    (
      {"messages": serving.messages(serving.png(), "a " * 9000)},
      r'messages\.0\.content\.1\.text: .*10000 .*, found "a a a .{35}$',
    ),
    ({"messages": None}, "messages: .* array, found null"),
  ],
)
def test_errors_say_what_was_found(server, change, expected):
  body = serving.chat(serving.png(), **change)
  status, _, content = serving.post(server.address, CHAT, body)
  error = json.loads(content)["error"]
  assert status == 400 and re.match(expected, error["message"]), error
  assert error["param"] == expected.partition(":")[0].replace("\\", "")


def test_good_requests_among_bad_ones_are_answered(server):
  good = ("good", CHAT, serving.chat(serving.png()))
  mixed = [bad for bad in BAD[:40] for bad in (bad, good)]
  send = lambda one: serving.post(server.address, *one[1:])[0]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = [*pool.map(send, mixed)]
  assert found[1::2] == [200] * 40
  assert {status // 100 for status in found[::2]} == {4}


def test_small_images_and_odd_but_harmless_requests(server):
  good = serving.chat(serving.png())
  for body in (
    serving.chat(image(1, 1)),
    serving.chat(image(20_000, 2)),
    serving.chat(image(8, 8, "JPEG")),
    serving.chat(serving.png(), max_tokens=10**9),
    serving.chat(serving.png(), tools=[], stop=None, top_logprobs=0),
    # As everywhere in Python, the last one counts.
    good.replace(b'"model"', b'"model": "nothing", "model"'),
  ):
    status, _, content = serving.post(server.address, CHAT, body)
    assert status == 200, content


@pytest.mark.parametrize(
  ("status", "headers"),
  [
    (415, {"Content-Type": "text/plain"}),
    (415, {"Content-Type": "multipart/form-data; boundary=a"}),
    (415, {"Content-Type": ""}),
    (415, {**JSON, "Content-Encoding": "gzip"}),
    (200, {**JSON, "Content-Encoding": "Identity"}),
    (413, {**JSON, "Content-Length": str(10**12)}),
    (400, {**JSON, "X-Long": "a" * 2_000_000}),
    (400, {**JSON, **{f"X-{n}": "a" * 200 for n in range(10_000)}}),
  ],
)
def test_bad_heads(server, status, headers):
  body = serving.chat(serving.png())
  headers = {"Content-Length": str(len(body)), **headers}
  lines = [f"{name}: {value}" for name, value in headers.items()]
  head = "\r\n".join([f"POST {CHAT} HTTP/1.1", "Host: a", *lines])
  with socket.create_connection(server.address, timeout=30) as connection:
    answer = None
    # Who floods may find that it has hung up before all was sent.
    with contextlib.suppress(OSError):
      connection.sendall(f"{head}\r\n\r\n".encode() + body)
      answer = connection.recv(1000)
  if answer is None:
    assert len(head) > 1_000_000
  else:
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def test_bad_methods_and_places(server):
  for path, expected in [
    ("/v1/chat/completions", 405),
    ("/v1/no", 404),
    ("/..%2f..%2fetc/passwd", 404),
    ("/v1/models/no", 404),
    ("/v1/models/", 404),
    ("/health/", 404),
  ]:
    status, content = serving.get(server.address, path)
    assert status == expected
    assert json.loads(content)["error"]["type"] == "invalid_request_error"


def test_who_sends_slowly_is_not_waited_for(server):
  """Heads and bodies that never end, while others are served."""
  head = (
    f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
  )
  starts = [b"", b"POST ", head.encode(), b"GET /health HTTP/1.1\r\nX: "]
  body = f"{head}Content-Length: 9000\r\n\r\n{{".encode()
  slow = []
  for start in [*starts * 5, *[body] * 20]:
    connection = socket.create_connection(server.address, timeout=30)
    connection.sendall(start)
    slow.append(connection)
  end, seconds = time.monotonic() + 30, {}
  begin = time.monotonic()
  while len(seconds) < len(slow) and time.monotonic() < end:
    for number, connection in enumerate(slow):
      try:
        connection.sendall(b"a")
      except OSError:
        seconds.setdefault(number, time.monotonic() - begin)
    if len(seconds) < 2:
      good = serving.chat(serving.png())
      assert serving.post(server.address, CHAT, good)[0] == 200
    time.sleep(0.2)
  assert len(seconds) == len(slow)
  for connection in slow:
    connection.close()


def test_a_slow_body_gets_a_408(server):
  head = (
    f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    "Content-Length: 9000\r\n\r\n{"
  )
  with socket.create_connection(server.address, timeout=30) as connection:
    connection.sendall(head.encode())
    assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
