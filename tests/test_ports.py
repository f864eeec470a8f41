"""Addresses to listen at: what is refused, and how it is named."""

import socket

import pytest

from blip_jax.serve import ports


def test_a_port_that_is_in_use_is_named():
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    expected = rf"config\.port: .*127\.0\.0\.1:{port}: .*in use; choose another"
    with pytest.raises(ValueError, match=expected):
      ports.check("127.0.0.1", port)
  ports.check("127.0.0.1", port)


@pytest.mark.parametrize("port", [-1, 65536, 10**9])
def test_what_is_no_port_is_refused(port):
  with pytest.raises(ValueError, match=rf"0 to 65535, found {port}"):
    ports.check("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "a b"])
def test_addresses_of_other_machines_are_refused(host):
  expected = rf"config\.host: cannot listen on {host}:0: (?!Unknown).*127"
  with pytest.raises(ValueError, match=expected):
    ports.check(host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", ""])
def test_both_families_of_addresses(host):
  ports.check(host, 0)
  port = ports.free(host)
  assert 0 < port < 65536
  ports.check(host, port)


def test_addresses_in_urls():
  assert ports.address("::1", 80) == "[::1]:80"
  assert ports.address("localhost", 80) == "localhost:80"
