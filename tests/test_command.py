"""How a command ends: users' mistakes are one message, bugs a traceback."""

import pathlib

import jax.numpy as jnp
import pytest

from blip_jax.runtime import command


def end_of(error, monkeypatch, traceback=""):
  """The status of a command that raises."""
  monkeypatch.setenv(command.TRACEBACK, traceback)

  @command.reports_errors
  def main():
    raise error

  return main()


def missing_file():
  with pytest.raises(FileNotFoundError) as caught:
    pathlib.Path("nowhere/at.all").read_bytes()
  return caught.value


@pytest.mark.parametrize(
  "error, status, shown",
  [
    (ValueError("config.x: expected 1"), 1, "config.x: expected 1"),
    (command.UsageError("--x: no"), 2, "--x: no"),
    (FloatingPointError("step 4: loss is nan"), 1, "step 4: loss is nan"),
    (ImportError("pip install av"), 1, "pip install av"),
    (missing_file(), 1, "nowhere/at.all: No such file or directory"),
    (OSError("the disk is full"), 1, "the disk is full"),
    (ValueError(), 1, "ValueError"),
    (ValueError("two\nlines"), 1, "two\nlines"),
  ],
)
def test_a_mistake_is_one_message(monkeypatch, capsys, error, status, shown):
  assert end_of(error, monkeypatch) == status
  printed = capsys.readouterr()
  assert printed.err == f"error: {shown}\n" and not printed.out


@pytest.mark.parametrize(
  "error", [KeyError("x"), TypeError("x"), RuntimeError("x"), AssertionError()]
)
def test_a_bug_keeps_its_traceback(monkeypatch, capsys, error):
  with pytest.raises(type(error)):
    end_of(error, monkeypatch)
  assert not capsys.readouterr().err


def test_a_wrong_shape_is_a_bug(capsys):
  @command.reports_errors
  def main():
    jnp.ones(3) @ jnp.ones(4)

  with pytest.raises((TypeError, ValueError)):
    main()

  @command.reports_errors
  def reshape():
    jnp.ones(3).reshape(2, 2)

  with pytest.raises((TypeError, ValueError)):
    reshape()
  assert not capsys.readouterr().err


@pytest.mark.parametrize("wish, raises", [("1", True), ("0", False)])
def test_the_traceback_comes_back_on_request(monkeypatch, wish, raises):
  if raises:
    with pytest.raises(ValueError, match="x"):
      end_of(ValueError("x"), monkeypatch, wish)
  else:
    assert end_of(ValueError("x"), monkeypatch, wish) == 1


def test_the_status_is_what_main_returns():
  assert command.reports_errors(lambda: 3)() == 3
  assert command.reports_errors(lambda: None)() == 0
  assert command.reports_errors(lambda x, y: x + y)(1, y=2) == 3


@pytest.mark.parametrize("error, status", [(ValueError, 1), (KeyError, 1)])
def test_one_of_several_processes_ends_at_once(
  monkeypatch, capsys, error, status
):
  """At a normal exit it would wait for the others."""

  class Left(BaseException):
    pass

  def leave(status):
    raise Left(status)

  monkeypatch.setattr(command.os, "_exit", leave)
  monkeypatch.setattr(command, "_has_peers", lambda: True)
  with pytest.raises(Left) as left:
    end_of(error("what it says"), monkeypatch)
  assert left.value.args == (status,)
  shown = capsys.readouterr().err
  assert "what it says" in shown
  assert ("Traceback" in shown) == (error is KeyError)
