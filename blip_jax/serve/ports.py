"""Addresses that the page and the service listen at."""

import errno
import os
import socket

_LAST = 65535


def check(host: str, port: int) -> None:
  """Refuses an address before models are loaded for it.

  Args:
    host: a name or an address, of IPv4 or IPv6; "": all of this machine.
    port: 0: any that is free.

  Raises:
    ValueError: this machine has no such address, there is no such port, or
      another program uses it.
  """
  if not 0 <= port <= _LAST:
    raise ValueError(
      f"config.port: expected a number from 0 to {_LAST}, found {port}"
    )
  try:
    _listening(host, port).close()
  except OSError as error:
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
      key, advice = "port", "choose another, such as 7861, or 0 for a free one"
    else:
      key, advice = "host", "expected an address of this machine, as 127.0.0.1"
    raise ValueError(
      f"config.{key}: cannot listen on {address(host, port)}: {_why(error)}; "
      f"{advice}"
    ) from error


def free(host: str) -> int:
  """A port that nobody uses now."""
  with _listening(host, 0) as server:
    return server.getsockname()[1]


def address(host: str, port: int) -> str:
  """As in a URL."""
  return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listening(host: str, port: int) -> socket.socket:
  (family, *_), *_ = socket.getaddrinfo(
    host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
  )
  return socket.create_server((host, port), family=family)


def _why(error: OSError) -> str:
  # The text of a resolver is its own; that of a socket repeats the address.
  if isinstance(error, socket.gaierror) or error.errno is None:
    return str(error.strerror or error)
  return os.strerror(error.errno)
