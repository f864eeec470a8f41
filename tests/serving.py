"""A service in a thread of this process, and what its clients send."""

import base64
import contextlib
import http.client
import io
import json
import threading
import time

import PIL.Image

from blip_jax.data import scenes
from blip_jax.serve import app as app_lib
from blip_jax.serve import connections, ports, programs
from tests import helpers

BOUNDS = app_lib.Bounds(
  queue=64, patience=0.005, deadline=120.0, max_body=1 << 20, body_seconds=2.0
)
LIMITS = programs.Limits(
  batch_size=4, max_n=2, max_inputs=8, max_pixels=1_000_000
)


def make_hosts(*families, limits=LIMITS):
  models = [helpers.make_model(family, text_depth=1) for family in families]
  return [
    programs.Host(family, model, limits)
    for family, model in zip(families, models, strict=True)
  ]


@contextlib.contextmanager
def started(hosts, bounds=BOUNDS, token="", connections_=200, head_seconds=2.0):
  """Yields a running server; its `address` is (host, port)."""
  port, up = ports.free("127.0.0.1"), threading.Event()
  server = connections.Server(
    app_lib.build(hosts, bounds, token),
    "127.0.0.1",
    port,
    connections_,
    head_seconds,
    grace=60.0,
    on_start=up.set,
  )
  server.address = "127.0.0.1", port
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    assert up.wait(30)
    yield server
  finally:
    server.stop()
    thread.join(90)
    assert not thread.is_alive()


def png(number=0, size=16):
  content = io.BytesIO()
  pixels = scenes.Scenes("val", size)[number]["image"]
  PIL.Image.fromarray(pixels).save(content, "PNG")
  return content.getvalue()


def data_url(content, kind="image/png"):
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def messages(content, text=""):
  """A chat about an image."""
  url = content if isinstance(content, str) else data_url(content)
  parts = [{"type": "image_url", "image_url": {"url": url}}]
  if text:
    parts.append({"type": "text", "text": text})
  return [{"role": "user", "content": parts}]


def chat(content, text="", **more):
  """The body of a request for captions."""
  asked = {"messages": messages(content, text), "model": "caption", **more}
  return json.dumps(asked).encode()


def post(address, path, body, **headers):
  """Returns status, headers and content of a response."""
  headers = {"Content-Type": "application/json", **headers}
  connection = http.client.HTTPConnection(*address, timeout=150)
  with contextlib.closing(connection):
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def get(address, path, **headers):
  connection = http.client.HTTPConnection(*address, timeout=30)
  with contextlib.closing(connection):
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read()


def wait_until(condition, seconds=30):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)
