"""Many clients of the service at once, clients that leave, and its end."""

import concurrent.futures
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

import psutil
import pytest

from blip_jax.serve import programs
from tests import helpers, serving

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def hosts():
  hosts = serving.make_hosts("caption")
  for host in hosts:
    programs.warm_up(host)
  return hosts


@pytest.fixture
def slow(monkeypatch):
  """Batches wait until this is set."""
  gate, compute = threading.Event(), programs.Captions.__call__

  def wait(self, rows):
    assert gate.wait(60)
    return compute(self, rows)

  monkeypatch.setattr(programs.Captions, "__call__", wait)
  yield gate
  gate.set()


def metric(server, name):
  _, body = serving.get(server.address, "/metrics")
  lines = [x for x in body.decode().splitlines() if x.startswith(name)]
  return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def text(content):
  return json.loads(content)["choices"][0]["message"]["content"]


def ask_all(address, images, clients, number):
  """Sends requests; returns the texts, and the seconds of each."""

  def ask(n):
    start = time.monotonic()
    body = serving.chat(images[n % len(images)])
    status, _, content = serving.post(address, CHAT, body)
    assert status == 200, content
    return text(content), time.monotonic() - start

  with concurrent.futures.ThreadPoolExecutor(clients) as pool:
    return zip(*pool.map(ask, range(number)), strict=True)


def test_no_answer_is_lost_or_wrong(hosts):
  images = [serving.png(number) for number in range(8)]
  expected = [hosts[0].model.caption(image)[0].text for image in images]
  assert len({*expected}) > 1
  with serving.started(hosts) as server:
    texts, _ = ask_all(server.address, images, 16, 64)
    rows = metric(server, "blip_batch_rows_sum")
    batches = metric(server, "blip_batch_rows_count")
  assert [*texts] == [expected[n % 8] for n in range(64)]
  assert rows == 64 and batches < 40


def test_a_full_queue_says_when_to_come_back(hosts, slow):
  bounds = serving.BOUNDS._replace(queue=6)
  body = serving.chat(serving.png())
  send = lambda _: serving.post(server.address, CHAT, body)
  with (
    serving.started(hosts, bounds) as server,
    concurrent.futures.ThreadPoolExecutor(9) as pool,
  ):
    found = [pool.submit(send, n) for n in range(9)]
    serving.wait_until(lambda: sum(one.done() for one in found) == 3)
    slow.set()
    answers = [one.result() for one in found]
  assert sorted(status for status, *_ in answers) == [200] * 6 + [429] * 3
  refused = [headers for status, headers, _ in answers if status == 429]
  assert all(headers["Retry-After"] == "1" for headers in refused)


def test_after_the_deadline_nobody_waits(hosts, slow):
  bounds = serving.BOUNDS._replace(deadline=0.5)
  body = serving.chat(serving.png())
  with serving.started(hosts, bounds) as server:
    status, headers, content = serving.post(server.address, CHAT, body)
    assert status == 503 and headers["Retry-After"] == "1"
    assert b"no answer within 0.5 s" in content
    slow.set()


def test_clients_that_leave_make_room(hosts, slow):
  body = serving.chat(serving.png())
  head = (
    f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(body)}\r\n\r\n"
  )
  bounds = serving.BOUNDS._replace(queue=8)
  with serving.started(hosts, bounds) as server:
    gone = [socket.create_connection(server.address) for _ in range(8)]
    for one in gone:
      one.sendall(head.encode() + body)
    serving.wait_until(lambda: metric(server, "blip_rows ") == 8)
    for one in gone:
      one.close()
    # Those of the batch that runs stay.
    serving.wait_until(lambda: metric(server, "blip_rows ") == 4)
    slow.set()
    assert serving.post(server.address, CHAT, body)[0] == 200
    left = 'blip_requests_total{endpoint="/v1/chat/completions",status="499"}'
    assert metric(server, left) == 8


def test_what_was_taken_is_finished(hosts, slow):
  body = serving.chat(serving.png())
  with (
    serving.started(hosts) as server,
    concurrent.futures.ThreadPoolExecutor(6) as pool,
  ):
    send = lambda _: serving.post(server.address, CHAT, body)
    found = [pool.submit(send, n) for n in range(6)]
    serving.wait_until(lambda: metric(server, "blip_rows ") == 6)
    server.stop()
    serving.wait_until(lambda: not server.servers[0].is_serving())
    with pytest.raises(OSError):
      socket.create_connection(server.address, timeout=5)
    slow.set()
    assert [one.result()[0] for one in found] == [200] * 6


@pytest.mark.slow
def test_500_requests_of_32_clients(tmp_path):
  """A process of its own: throughput, memory, and SIGTERM under load."""
  helpers.write_captioner(tmp_path / "tiny")
  port = serving.ports.free("127.0.0.1")
  address = "127.0.0.1", port
  command = [
    *(sys.executable, "-m", "blip_jax.main", "--config", "serve"),
    f"--config.model={tmp_path / 'tiny'}",
    f"--config.port={port}",
    "--config.batch_size=32",
    "--config.max_n=1",
  ]
  # Tests compile programs that are slow; this one measures.
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  process = subprocess.Popen(
    command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment
  )
  try:
    assert "The service is at" in process.stdout.readline()
    memory = psutil.Process(process.pid).memory_info
    images = [serving.png(number, 64) for number in range(50)]
    # Without a model's name: the only one.
    bodies = [
      json.dumps({"messages": serving.messages(image)}).encode()
      for image in images
    ]
    ask = lambda n: timed(address, bodies[n % 50])
    alone = [ask(n) for n in range(50)]
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
      together = [*pool.map(ask, range(500))]
    took = time.monotonic() - start
    texts = [one for one, _ in alone]
    assert [one for one, _ in together] == texts * 10
    assert len({*texts}) > 1
    one_by_one = 50 / sum(seconds for _, seconds in alone)
    before = memory().rss
    p95 = statistics.quantiles([s for _, s in together], n=20)[-1]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
      [*pool.map(ask, range(500))]
    grown = (memory().rss - before) / 2**20
    print(
      f"\n{one_by_one:.0f} requests/s one at a time, {500 / took:.0f} of 32 "
      f"clients; p95 {p95 * 1000:.0f} ms; memory grew by {grown:.1f} MiB in "
      "another 500"
    )
    assert 500 / took >= 3 * one_by_one
    assert grown < 25
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
      found = [pool.submit(ask, n) for n in range(64)]
      time.sleep(0.1)
      process.send_signal(signal.SIGTERM)
      for number, one in enumerate(found):
        error = one.exception()
        if error is None:
          assert one.result()[0] == texts[number % 50]
        else:  # it was not taken any more, but refused or in the backlog
          refused = ConnectionRefusedError, ConnectionResetError
          assert isinstance(error, refused), error
      assert sum(one.exception() is None for one in found) > 0
    assert process.wait(60) == 0
  finally:
    process.kill()


def timed(address, body):
  start = time.monotonic()
  status, _, content = serving.post(address, CHAT, body)
  assert status == 200, content
  return text(content), time.monotonic() - start
