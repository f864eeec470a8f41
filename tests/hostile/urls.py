"""A hostile web server on loopback, and URLs that must not be asked."""

import contextlib
import itertools
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator

from tests.hostile import images

IMAGE = images.encoded(images.photo(), "PNG")
# A certificate of nobody, for the host "localhost".
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgj7sLqC7LRe0ySYQr
0hLAhGNOOPtKwzswDb3aV5jAD6ahRANCAARQThSfFRXD48+N81AcekeFLAylM0rb
gIc5sSP+UP+52Qkg47VpoLA4FDwgQnBOKqbbSPKzbRY6AZtPjSVp1D7m
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBlDCCATugAwIBAgIUCI3/PKREJHBHVF0BfKInHzBb324wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNzA0MDI0N1oYDzIxMjYxMTAz
MDQwMjQ3WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARQThSfFRXD48+N81AcekeFLAylM0rbgIc5sSP+UP+52Qkg47VpoLA4
FDwgQnBOKqbbSPKzbRY6AZtPjSVp1D7mo2kwZzAdBgNVHQ4EFgQU+ngHAamH3/Bs
IsdqWaYKUdbpvOkwHwYDVR0jBBgwFoAU+ngHAamH3/BsIsdqWaYKUdbpvOkwDwYD
VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
RwAwRAIgKWhdj3UipaCLT0tLlUUX8NmSSQ4i8f6u8Zb6f4R2Q98CIFQ3wmVNR846
6p1tvOuaxvtu3PkBm1kBXNUHThghtov7
-----END CERTIFICATE-----
"""

Answer = bytes | Callable[[socket.socket], None]


def answer(
  body: bytes = b"", status: str = "200 OK", *headers: str, length: bool = True
) -> bytes:
  lines = [f"HTTP/1.1 {status}", "Connection: close", *headers]
  if length:
    lines.append(f"Content-Length: {len(body)}")
  return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def redirect(to: str, status: str = "302 Found") -> bytes:
  return answer(b"", status, f"Location: {to}")


def slowly(content: bytes, seconds: float = 0.1) -> Answer:
  """Sends a byte at a time, and then one byte again and again."""

  def send(connection: socket.socket) -> None:
    for byte in itertools.chain(content, itertools.repeat(ord("a"))):
      connection.sendall(bytes([byte]))
      time.sleep(seconds)

  return send


def endlessly(start: bytes, piece: bytes) -> Answer:
  def send(connection: socket.socket) -> None:
    connection.sendall(start)
    while True:
      connection.sendall(piece)

  return send


def silently(connection: socket.socket) -> None:
  """Says nothing until the other side hangs up."""
  while connection.recv(1024):
    pass


def reset(connection: socket.socket) -> None:
  linger = b"\1\0\0\0\0\0\0\0"
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def redirect_with_endless_body(connection: socket.socket) -> None:
  head = answer(b"", "302 Found", "Location: /image", "X: 1", length=False)
  with contextlib.suppress(OSError):
    endlessly(head, bytes(1 << 16))(connection)


CHUNKED = answer(b"", "200 OK", "Transfer-Encoding: chunked", length=False)
OPEN = answer(length=False)

# Path -> what is sent.
SOUND: dict[str, Answer] = {
  "/image": answer(IMAGE),
  "/close-delimited": OPEN + IMAGE,
  "/chunked": CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(IMAGE), IMAGE),
  "/http-1.0": b"HTTP/1.0 200 OK\r\n\r\n" + IMAGE,
  "/wrong-type": answer(IMAGE, "200 OK", "Content-Type: text/html"),
  "/relative": redirect("image"),
  "/301": redirect("/image", "301 Moved Permanently"),
  "/303": redirect("/image", "303 See Other"),
  "/307": redirect("/image", "307 Temporary Redirect"),
  "/308": redirect("/image", "308 Permanent Redirect"),
  "/continue": b"HTTP/1.1 100 Continue\r\n\r\n" + answer(IMAGE),
  # As browsers do, relative to where it comes from.
  "/redirect-no-host": redirect("http:///image"),
  "/redirect-with-endless-body": redirect_with_endless_body,
}
BROKEN: dict[str, Answer] = {
  "/404": answer(b"no", "404 Not Found"),
  "/401": answer(
    b"no", "401 Unauthorized", 'WWW-Authenticate: Basic realm="a"'
  ),
  "/407": answer(b"no", "407 Proxy Authentication Required"),
  "/429": answer(b"no", "429 Too Many Requests", "Retry-After: 99999"),
  "/500": answer(IMAGE, "500 Internal Server Error"),
  "/503": answer(b"no", "503 Service Unavailable", "Retry-After: 99999"),
  "/204": answer(b"", "204 No Content"),
  "/304": answer(b"", "304 Not Modified"),
  "/status-999": answer(IMAGE, "999 What"),
  "/status-none": b"HTTP/1.1\r\n\r\n" + IMAGE,
  "/status-text": b"HTTP/1.1 fine OK\r\n\r\n" + IMAGE,
  "/status-negative": b"HTTP/1.1 -200 OK\r\n\r\n" + IMAGE,
  "/no-http": b"SSH-2.0-OpenSSH_9.9\r\n" * 9,
  "/http-0.9": IMAGE,
  "/http-9": b"HTTP/9.9 200 OK\r\n\r\n" + IMAGE,
  "/nothing": b"",
  "/reset": reset,
  "/half-a-header": b"HTTP/1.1 200 OK\r\nContent-Le",
  "/101-headers": answer(IMAGE, "200 OK", *(f"X-{n}: 1" for n in range(101))),
  "/long-header": answer(IMAGE, "200 OK", "X: " + "a" * 70_000),
  "/long-status": b"HTTP/1.1 200 " + b"a" * 70_000,
  "/too-short": answer(IMAGE)[:-9],
  "/length-too-large": answer(
    IMAGE, "200 OK", "Content-Length: 9" + "9" * 18, length=False
  ),
  "/two-lengths": answer(IMAGE, "200 OK", "Content-Length: 5"),
  "/chunk-size-text": CHUNKED + b"zz\r\nabc",
  "/chunk-size-negative": CHUNKED + b"-5\r\nabc",
  "/chunk-size-none": CHUNKED + b"\r\n\r\n",
  "/chunk-size-huge": CHUNKED + b"f" * 99 + b"\r\nabc",
  "/chunk-size-long": CHUNKED + b"5;" + b"a" * 70_000,
  "/chunk-cut": CHUNKED + b"ffff\r\nabc",
  "/html": answer(b"<html>not found</html>"),
  "/empty": answer(b""),
  "/packed": answer(
    images.zlib.compress(IMAGE), "200 OK", "Content-Encoding: deflate"
  ),
  "/bomb": answer(
    images.zeros(200 << 20), "200 OK", "Content-Encoding: deflate"
  ),
  "/image-bomb": answer(images.png(79_000, 1000, content=b"")),
  "/loop": redirect("/loop"),
  "/ping": redirect("/pong"),
  "/pong": redirect("/ping"),
  "/redirect-nowhere": answer(b"", "302 Found"),
  "/redirect-empty": redirect(""),
  "/redirect-broken": redirect("http://["),
  "/redirect-port": redirect("http://localhost:99999/"),
  "/redirect-ftp": redirect("ftp://localhost/image"),
  "/redirect-file": redirect("file:///etc/passwd"),
  "/redirect-data": redirect("data:image/png;base64,AAAA"),
  "/redirect-gopher": redirect("gopher://localhost/"),
  "/redirect-javascript": redirect("javascript:1"),
  "/redirect-binary": redirect("/\xff\xfe"),
}
SLOW: dict[str, Answer] = {
  "/slow-status": slowly(b"HTTP/1.1 200 OK\r\n"),
  "/slow-headers": slowly(b"HTTP/1.1 200 OK\r\nX: "),
  "/slow-body": slowly(OPEN, 0.02),
  "/slow-chunks": slowly(CHUNKED + b"fffff\r\n", 0.01),
  "/silent": silently,
  "/endless-continue": endlessly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
  "/endless-trailers": endlessly(CHUNKED + b"0\r\n", b"X: 1\r\n" * 99),
}
ENDLESS: dict[str, Answer] = {
  "/endless-body": endlessly(OPEN, bytes(1 << 16)),
  "/endless-chunks": endlessly(CHUNKED, b"1000\r\n%s\r\n" % bytes(4096)),
  "/endless-header": endlessly(b"HTTP/1.1 200 OK\r\nX: ", bytes(1 << 16)),
  "/endless-headers": endlessly(b"HTTP/1.1 200 OK\r\n", b"X: 1\r\n" * 99),
  "/endless-status": endlessly(b"HTTP/1.1 200 ", b"a" * 9999),
  "/endless-chunk-size": endlessly(CHUNKED, b"0" * 9999),
}
ANSWERS = SOUND | BROKEN | SLOW | ENDLESS

# Hosts that no public address stands behind, however they are written.
PRIVATE_HOSTS = [
  *("127.0.0.1", "127.1", "127.255.255.254", "2130706433", "0x7f000001"),
  *("0177.0.0.1", "0x7f.1", "017700000001", "0", "0.0.0.0", "localhost"),
  *("LOCALHOST", "localhost.", "10.0.0.1", "172.16.0.1", "192.168.1.1"),
  *("169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1"),
  *("224.0.0.1", "240.0.0.1", "255.255.255.255", "[::1]", "[::]"),
  *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[fe80::1]"),
  *("[fc00::1]", "[fec0::1]", "[ff02::1]", "[2001:db8::1]"),
  *("[64:ff9b::7f00:1]", "[64:ff9b::10.0.0.1]", "[2002:7f00:1::]"),
  *("[2001:0:7f00:1::]", "[0:0:0:0:0:ffff:a9fe:a9fe]", "[100::1]"),
]
PUBLIC_ADDRESSES = [
  *("8.8.8.8", "1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111"),
  "64:ff9b::808:808",
]
# What is no URL that can be asked at all.
MALFORMED = [
  *("http://", "http://[", "http://[::1", "http://:80/", "http:///a.png"),
  *("http://a:b:c/", "http://localhost:0/", "http://localhost:99999/"),
  *("http://localhost:-1/", "http://localhost:x/", "http://\0/", "http:// /"),
  *(f"http://{'a' * 70}.invalid/", f"http://{'a.' * 200}invalid/"),
  *("http://\ud800/", "http://xn--a/", "http://*/", "http://%00/"),
]


class _Handler(socketserver.BaseRequestHandler):
  def handle(self) -> None:
    server = self.server
    assert isinstance(server, _Server)
    connection = self.request
    if server.tls is not None:
      with contextlib.suppress(OSError):
        connection = server.tls.wrap_socket(connection, server_side=True)
        self._answer(server, connection)
        connection.close()
    else:
      self._answer(server, connection)

  def _answer(self, server: "_Server", connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
      question = b""
      while b"\r\n\r\n" not in question:
        if not (piece := connection.recv(4096)):
          return
        question += piece
      server.questions.append(question.decode("latin-1"))
      sent = ANSWERS.get(question.split()[1].decode("latin-1"), b"")
      if callable(sent):
        sent(connection)
      else:
        connection.sendall(sent)


class _Server(socketserver.ThreadingTCPServer):
  daemon_threads = True
  allow_reuse_address = True
  request_queue_size = 64
  tls: ssl.SSLContext | None = None
  questions: list[str]

  def handle_error(self, *_) -> None:
    pass


@contextlib.contextmanager
def served(
  tls: ssl.SSLContext | None = None,
) -> Iterator[tuple[int, list[str]]]:
  """Yields the port of a server on loopback, and the questions it gets."""
  with _Server(("127.0.0.1", 0), _Handler) as server:
    server.questions = []
    server.tls = tls
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], server.questions
    server.shutdown()
