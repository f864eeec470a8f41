"""Requests to object stores, by the library obstore; needs the extra [cloud].

The library repeats requests that fail with 429 or 5xx, or time out, with
growing pauses. Credentials come from the environment (or the machine's own
role) alone, and no error has the text of a response, which may contain parts of
them.
"""

import collections
import contextlib
import datetime
import errno
import functools
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from blip_jax.runtime.paths import Address, Stat

# Of one request: as many tries, as long in all, and the pauses between them.
RETRIES: Any = {
  "max_retries": 10,
  "retry_timeout": datetime.timedelta(minutes=3),
  "backoff": {
    "init_backoff": datetime.timedelta(milliseconds=100),
    "max_backoff": datetime.timedelta(seconds=15),
  },
}

# A response is given up if nothing of it comes for so long.
READ_TIMEOUT = datetime.timedelta(seconds=30)

_TIMEOUT = datetime.timedelta(minutes=10)  # of one request of a few MiB

PART_BYTES = 1 << 23

_ENDPOINTS = (
  "AWS_ENDPOINT_URL",
  "AWS_ENDPOINT",
  "AZURE_STORAGE_ENDPOINT",
  "GOOGLE_BASE_URL",
)

# What the owner of a bucket has to grant.
_PERMISSIONS = {
  ("s3", "read"): "s3:GetObject",
  ("s3", "list"): "s3:ListBucket",
  ("s3", "write"): "s3:PutObject",
  ("s3", "delete"): "s3:DeleteObject",
  ("gs", "read"): "storage.objects.get",
  ("gs", "list"): "storage.objects.list",
  ("gs", "write"): "storage.objects.create and storage.objects.delete",
  ("gs", "delete"): "storage.objects.delete",
  ("az", "read"): "Storage Blob Data Reader",
  ("az", "list"): "Storage Blob Data Reader",
  ("az", "write"): "Storage Blob Data Contributor",
  ("az", "delete"): "Storage Blob Data Contributor",
}

# Where machines are asked for their own credentials, if there are no others.
_ROLES = r"://(169\.254\.(169\.254|170\.2)|metadata(\.google\.internal)?)[:/]"
_CREDENTIALS = {
  "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, "
  "AWS_ENDPOINT_URL, or the role of the machine",
  "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the account of the machine",
  "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or the "
  "identity of the machine",
}


class Unavailable(OSError):
  """A store does not answer, or only with errors, however often it is asked.

  It would hit any other object as well.
  """


class Changed(OSError):
  """An object is not the one any more that reading began with."""


def load_obstore(scheme: str) -> Any:
  try:
    import obstore  # pyright: ignore[reportMissingImports]
    import obstore.store  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ImportError(
      f"{scheme}:// is read and written by obstore, which is not installed: "
      "pip install 'blip_jax[cloud]'"
    ) from error
  return obstore


def client(address: Address) -> tuple[Any, Any]:
  """The library, and its client of the bucket."""
  return load_obstore(address.scheme), _bucket(address.scheme, address.bucket)


@functools.cache
def _bucket(scheme: str, bucket: str) -> Any:
  obstore = load_obstore(scheme)
  plain = any(os.environ.get(n, "").startswith("http://") for n in _ENDPOINTS)
  with named(Address(scheme, bucket, ""), "read"):
    return obstore.store.from_url(
      f"{scheme}://{bucket}",
      client_options={
        "connect_timeout": datetime.timedelta(seconds=10),
        "read_timeout": READ_TIMEOUT,
        "timeout": _TIMEOUT,
        "allow_http": plain,
      },
      retry_config=RETRIES,
    )


@contextlib.contextmanager
def named(address: Address, act: str) -> Iterator[None]:
  """Turns what the library raises into errors about an address.

  Args:
    address: of the object or folder.
    act: read, list, write or delete.
  """
  obstore = load_obstore(address.scheme)
  try:
    yield
  # Some of its types are those of Python.
  except (obstore.exceptions.BaseError, OSError) as error:
    if isinstance(error, Unavailable | Changed):
      raise
    translated = _translated(error, address, act)
  else:
    return
  # Without what led to it: the library's text has that of responses.
  raise translated from None


def _translated(error: Exception, address: Address, act: str) -> OSError:
  kind, text, url = type(error).__name__, str(error), str(address)
  match = re.search(r"<Code>(\w+)</Code>", text)
  code = match[1] if match else ""
  match = re.search(r"status code: (\d{3})", text)
  status = match[1] if match else ""
  if kind == "PreconditionError":
    problem = "the object has changed since reading it began"
    return Changed(errno.ESTALE, problem, url)
  if code == "NoSuchBucket" or code == "ContainerNotFound":
    return _no_bucket(address)
  if kind in ("NotFoundError", "FileNotFoundError") or status == "404":
    return FileNotFoundError(errno.ENOENT, "no such object", url)
  if status in ("401", "403") or kind in (
    "PermissionDeniedError",
    "UnauthenticatedError",
    "PermissionError",
  ):
    permission = _PERMISSIONS[address.scheme, act]
    reason = " ".join(filter(None, (status, code)))
    return PermissionError(
      errno.EACCES,
      f"access denied ({reason}): to {act} here needs the permission "
      f"{permission}. Credentials are those of the environment: "
      f"{_CREDENTIALS[address.scheme]}",
      url,
    )
  if not status and re.search(_ROLES, text):
    return PermissionError(
      errno.EACCES,
      "no credentials are found. They are those of the environment: "
      f"{_CREDENTIALS[address.scheme]}",
      url,
    )
  answer = f"status {status} {code}".strip() if status else "no answer"
  return Unavailable(
    errno.EIO,
    f"the object store could not {act} this ({answer}), also when asked again",
    url,
  )


def _no_bucket(address: Address) -> OSError:
  what = "container" if address.scheme == "az" else "bucket"
  problem = (
    f"there is no {what} {address.bucket!r}; check its name, or create it"
  )
  return OSError(errno.ENODEV, problem, str(address))


@functools.cache
def _check_bucket(scheme: str, name: str) -> None:
  """Raises `OSError` if there is no such bucket; once it is found, no more.

  The answer to a question for the head of an object does not say it.
  """
  address = Address(scheme, name, "")
  obstore, bucket = client(address)
  # Who may read need not be allowed to list.
  with contextlib.suppress(PermissionError), named(address, "list"):
    next(iter(obstore.list(bucket, chunk_size=1)), None)


class Head(NamedTuple):
  """What a store says of an object."""

  stat: Stat
  etag: str
  version: dict[str, str]  # by which a store knows it when it is replaced


def _as_head(meta: Any) -> Head:
  etag = meta["e_tag"] or ""
  modified: datetime.datetime = meta["last_modified"]
  seconds = modified.timestamp()
  digest = hashlib.sha256(etag.encode()).digest()[:7]
  nanoseconds = round(seconds * 1e6) * 1000
  number = int.from_bytes(digest, "big")
  found = Stat(meta["size"], seconds, nanoseconds, number)
  version = {key: meta[key] for key in ("e_tag", "version") if meta[key]}
  return Head(found, etag, version)


def head(address: Address) -> Head:
  """Raises `FileNotFoundError` if there is no such object."""
  obstore, bucket = client(address)
  if not address.name:
    raise FileNotFoundError(errno.ENOENT, "no object", str(address))
  try:
    with named(address, "read"):
      return _as_head(obstore.head(bucket, address.name))
  except FileNotFoundError:
    _check_bucket(*address[:2])
    raise


class _Pins:
  """The ETags of objects that are read in parts.

  Parts of two objects are none. An object that is asked for its size is taken
  as it is then.
  """

  def __init__(self):
    self._etags: collections.OrderedDict[str, str] = collections.OrderedDict()
    self._lock = threading.Lock()

  def of(self, url: str) -> str:
    """The ETag that an object must have; "" for any."""
    return self._etags.get(url, "")

  def renew(self, url: str, head: Head) -> None:
    """Takes an object as it is now, if it is or will be read in parts."""
    if url in self._etags or head.stat.size > 1 << 20:
      self.set(url, head.etag)

  def set(self, url: str, etag: str) -> None:
    with self._lock:
      self._etags[url] = etag
      if len(self._etags) > 1_000_000:
        self._etags.popitem(last=False)

  def drop(self, url: str) -> None:
    self._etags.pop(url, None)


pins = _Pins()


class Part(NamedTuple):
  """A part of an object, and what the object is."""

  content: memoryview
  head: Head


def get(
  address: Address, start: int, size: int, etag: str | None = None
) -> Part | None:
  """Reads a part of an object; None if it ends before.

  Args:
    address: of the object.
    start: of the part, in bytes.
    size: of the part, if the object is as large.
    etag: the object must still have this one.

  Raises:
    Changed: it has another one.
  """
  obstore, bucket = client(address)
  if not address.name:
    raise IsADirectoryError(errno.EISDIR, "no object", str(address))
  options: Any = {"range": (start, start + size)}
  if etag:
    options["if_match"] = etag
  try:
    with named(address, "read"):
      try:
        result = obstore.get(bucket, address.name, options=options)
        return Part(memoryview(result.bytes()), _as_head(result.meta))
      except obstore.exceptions.BaseError as error:
        if "<Code>InvalidRange</Code>" in str(error) or (
          "status code: 416" in str(error)
        ):
          return None
        raise
  except FileNotFoundError:
    _check_bucket(*address[:2])
    raise


def put(address: Address, content: Any, mode: Any = "overwrite") -> None:
  obstore, bucket = client(address)
  with named(address, "write"):
    obstore.put(bucket, address.name, content, mode=mode, chunk_size=PART_BYTES)
  pins.drop(str(address))
