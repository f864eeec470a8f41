"""Images from the web: in bounded time and size, from public addresses only.

urllib3 speaks HTTP. This module adds what depends on who is asked for what: a
URL from a data set must not reach services of this machine or its network, and
no server may hold a thread for ever.
"""

import contextlib
import functools
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Iterator

import urllib3
import urllib3.connection
from urllib3.util import parse_url

from blip_jax.data.transforms import BadSample

SCHEMES = ("http://", "https://")
MAX_BYTES = 64 << 20
# From the question for the address to the last byte, redirects included.
MAX_SECONDS = 30.0
MAX_REDIRECTS = 10

_PIECE = 1 << 16
_UNICAST = ipaddress.IPv6Network("2000::/3")
# Its last 32 bits are an IPv4 address.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def fetch(url: str, allow_private: bool = False) -> bytes:
  """Returns what a URL leads to.

  No credentials are sent, not even those in the URL, and no proxy is used.

  Args:
    url: http or https, as are all URLs that it redirects to.
    allow_private: whether it may lead to addresses that are not public: of this
      machine, of its network, and reserved ones.

  Raises:
    BadSample: it cannot be fetched ("missing"), is refused ("refused"), takes
      too long ("timed_out") or is larger than `MAX_BYTES` ("too_large").
  """
  attempt = _Fetch(url, allow_private)
  attempt.start()
  attempt.join(MAX_SECONDS)
  if attempt.is_alive():
    attempt.abandon()
    raise _timed_out(url)
  if isinstance(attempt.result, Exception):
    raise attempt.result
  return attempt.result


def _timed_out(url: str) -> BadSample:
  return BadSample("timed_out", f"{url}: takes more than {MAX_SECONDS:g} s")


def is_public(address: str) -> bool:
  """Whether an IP address is one of the public internet."""
  ip = ipaddress.ip_address(address)
  if isinstance(ip, ipaddress.IPv6Address):
    if ip in _NAT64:
      return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    if ip not in _UNICAST or ip.sixtofour or ip.teredo:
      return False
  return ip.is_global and not ip.is_multicast


class _Fetch(threading.Thread):
  """A fetch in a thread of its own, which can be given up at any point.

  Time limits of sockets are for one piece each, so that a server that sends a
  byte now and then holds a thread for ever; looking up a name has no limit.

  Attributes:
    result: the content, or the error, once the thread has ended.
  """

  def __init__(self, url: str, allow_private: bool):
    super().__init__(name="fetch", daemon=True)
    self._url, self._allow_private = url, allow_private
    self._lock = threading.Lock()
    self._abandoned = False
    self._handle: socket.socket | None = None
    self.result: bytes | Exception = b""

  def run(self) -> None:
    try:
      self.result = self._follow()
    except BadSample as error:
      self.result = error
    except (TimeoutError, urllib3.exceptions.TimeoutError):
      self.result = _timed_out(self._url)
    # Addresses, sockets, TLS and urllib3 have errors of their own.
    except Exception as error:
      self.result = BadSample("missing", f"{self._url}: {error}")

  def abandon(self) -> None:
    """Ends what the thread waits for, and lets it connect no more."""
    with self._lock:
      self._abandoned = True
      if self._handle is not None:
        with contextlib.suppress(OSError):
          self._handle.shutdown(socket.SHUT_RDWR)

  def connect(self, host: str, port: int) -> socket.socket:
    """A connection to the first address of a host that answers.

    The addresses that are checked are those that are connected to: a name may
    stand for others the next time.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, address in found:
      if not self._allow_private and not is_public(str(address[0])):
        raise BadSample(
          "refused",
          f"{self._url}: {host} is at {address[0]}, which is not public; "
          "allow_private=True permits such addresses",
        )
    error: OSError = socket.gaierror(f"{host} has no address")
    for family, kind, protocol, _, address in found:
      connection = socket.socket(family, kind, protocol)
      connection.settimeout(MAX_SECONDS)
      try:
        self._watch(connection)
        connection.connect(address)
        return connection
      except OSError as failed:
        connection.close()
        error = failed
    raise error

  def _watch(self, connection: socket.socket) -> None:
    """Keeps a handle: TLS takes the socket itself over."""
    with self._lock:
      if self._abandoned:
        raise TimeoutError("given up")
      if self._handle is not None:
        self._handle.close()
      self._handle = connection.dup()

  def _follow(self) -> bytes:
    url = self._url
    try:
      for _ in range(MAX_REDIRECTS + 1):
        with self._answer(url) as answer:
          location = answer.get_redirect_location()
          if not location:
            return self._content(answer)
        url = urllib.parse.urljoin(url, location)
    finally:
      with self._lock:
        if self._handle is not None:
          self._handle.close()
          self._handle = None
    detail = f"{self._url}: more than {MAX_REDIRECTS} redirects"
    raise BadSample("missing", detail)

  @contextlib.contextmanager
  def _answer(self, url: str) -> Iterator[urllib3.BaseHTTPResponse]:
    if not url.lower().startswith(SCHEMES):
      detail = f"{self._url}: leads to {url}; only http and https are read"
      raise BadSample("refused", detail)
    parts = parse_url(url)
    if not parts.host:
      raise ValueError("it has no host")
    host = parts.host.strip("[]")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if parts.scheme == "https":
      connection = _SecureConnection(
        host, port, timeout=MAX_SECONDS, ssl_context=_tls()
      )
    else:
      connection = _Connection(host, port, timeout=MAX_SECONDS)
    connection.fetch = self
    with contextlib.closing(connection):
      # Packed content could be a thousand times as large.
      headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
      connection.request(
        "GET", parts.request_uri, headers=headers, preload_content=False
      )
      with contextlib.closing(connection.getresponse()) as answer:
        yield answer

  def _content(self, answer: urllib3.BaseHTTPResponse) -> bytes:
    if not 200 <= answer.status < 300:
      raise ValueError(f"HTTP status {answer.status}")
    content = bytearray()
    while piece := answer.read(_PIECE, decode_content=False):
      content += piece
      if len(content) > MAX_BYTES:
        detail = f"{self._url}: more than {MAX_BYTES} bytes"
        raise BadSample("too_large", detail)
    return bytes(content)


class _Connection(urllib3.connection.HTTPConnection):
  fetch: _Fetch

  def _new_conn(self) -> socket.socket:
    return self.fetch.connect(self.host, self.port)


class _SecureConnection(_Connection, urllib3.connection.HTTPSConnection):
  """The host of the URL, not the address, is what a certificate must name."""


@functools.cache
def _tls() -> ssl.SSLContext:
  """Checks certificates; reading those of the authorities takes 20 ms."""
  return ssl.create_default_context()
