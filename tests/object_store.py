"""A server that speaks S3, and makes mistakes when it is asked to."""

import contextlib
import functools
import itertools
import logging
import threading
import time

import pytest

# What says "S3" to clients; the secret must not appear anywhere.
SECRET = "WouldBeASecretOfTheUser"
_numbers = itertools.count()


class Server:
  """The server of moto, in a thread of this process.

  Attributes:
    requests: (method, path) of all requests, with those that failed.
  """

  def __init__(self):
    from moto import server
    from werkzeug import serving

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    self._app = server.DomainDispatcherApplication(server.create_backend_app)
    self._faults, self._lock = [], threading.Lock()
    self.requests = []
    self._server = serving.make_server("127.0.0.1", 0, self._answer, True)
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def environment(self):
    """The environment variables of a client."""
    return {
      "AWS_ENDPOINT_URL": self.url,
      "AWS_ACCESS_KEY_ID": "SomeKey",
      "AWS_SECRET_ACCESS_KEY": SECRET,
      "AWS_REGION": "us-east-1",
    }

  @functools.cached_property
  def client(self):
    """Another client than ours."""
    import boto3

    return boto3.client(
      "s3",
      endpoint_url=self.url,
      region_name="us-east-1",
      aws_access_key_id="SomeKey",
      aws_secret_access_key=SECRET,
    )

  def bucket(self):
    """The address of a new bucket."""
    name = f"bucket-{next(_numbers)}"
    self.client.create_bucket(Bucket=name)
    return f"s3://{name}"

  def put(self, bucket, name, content):
    """Writes an object as another process would."""
    bucket = bucket.removeprefix("s3://")
    self.client.put_object(Bucket=bucket, Key=name, Body=content)

  @contextlib.contextmanager
  def fails(
    self, status="503 Slow Down", times=1, method="", seconds=0.0, code=""
  ):
    """Answers as many requests like this; `seconds` late, without a status."""
    fault = {
      "status": status,
      "times": times,
      "method": method,
      "seconds": seconds,
      "code": code,
    }
    with self._lock:
      self._faults.append(fault)
    try:
      yield fault
    finally:
      self._faults.remove(fault)

  def _answer(self, environ, start_response):
    method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
    with self._lock:
      self.requests.append((method, path))
      found = [
        fault
        for fault in self._faults
        if fault["times"] > 0 and fault["method"] in ("", method)
      ]
      for fault in found[:1]:
        fault["times"] -= 1
    for fault in found[:1]:
      time.sleep(fault["seconds"])
      if fault["status"]:
        body = (
          f"<Error><Code>{fault['code'] or 'SlowDown'}</Code><AWSAccessKeyId>"
          f"{SECRET}</AWSAccessKeyId></Error>"
        )
        # What was sent is read, or the connection would be broken.
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(fault["status"], [("Content-Type", "application/xml")])
        return [b"" if method == "HEAD" else body.encode()]
    return self._app(environ, start_response)


@contextlib.contextmanager
def started():
  """A server, by which all s3:// addresses of this process are served."""
  from blip_jax.runtime import buckets

  with pytest.MonkeyPatch.context() as patch:
    server = Server()
    for name, value in server.environment().items():
      patch.setenv(name, value)
    buckets._bucket.cache_clear()
    yield server
    buckets._bucket.cache_clear()
