"""Commands in forks of a server do what processes of their own do."""

import os
import subprocess
import sys

import pytest

from tests import preloaded

PROGRAMS = {
  "output": "import sys; print('a'); print('b', file=sys.stderr)",
  "status": "import sys; sys.exit(3)",
  "message": "raise SystemExit('no such file')",
  "signal": "import os; os.kill(os.getpid(), 15)",
  "arguments": "import sys; print(sys.argv, sys.path[0], __name__)",
  "folder": "import os; print(os.listdir(), os.environ['SAID'])",
  "end": "import atexit; atexit.register(print, 'at last'); print('first')",
  "input": "import sys; print(repr(sys.stdin.read()))",
  "main": "import sys; print(sys.modules['__main__'].__dict__ is globals())",
  "processes": "import multiprocessing as m; "
  "p = m.Process(target=print, args=('from another',)); "
  "p.start(); p.join(); print(p.exitcode, m.get_start_method())",
}
ENV = {**os.environ, "SAID": "before"}


@pytest.fixture(scope="module")
def server():
  with preloaded.started(ENV, ["json"]) as server:
    yield server


def run(words, cwd):
  return subprocess.run(
    words,
    cwd=cwd,
    env=ENV,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
  )


def same(server, words, cwd):
  mine, real = server.run(words, cwd), run(words, cwd)
  assert mine.args == real.args
  assert mine.returncode == real.returncode
  assert (mine.stdout, mine.stderr) == (real.stdout, real.stderr)
  return real


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_the_same(server, tmp_path, name):
  (tmp_path / "file").touch()
  same(server, [sys.executable, "-c", PROGRAMS[name], "x", "y z"], tmp_path)


def test_a_module_does_the_same(server, tmp_path):
  text = "import sys\nprint(__name__, __spec__.name, sys.argv[1:])\n"
  (tmp_path / "mine.py").write_text(text)
  real = same(server, [sys.executable, "-m", "mine", "--a=b"], tmp_path)
  assert real.stdout == "__main__ mine ['--a=b']\n"


def test_a_mistake_is_told(server, tmp_path):
  done = server.run([sys.executable, "-c", "1 / 0"], tmp_path)
  assert done.returncode == 1
  assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_modules_are_imported_once(server, tmp_path):
  text = "import sys; print('json' in sys.modules)"
  done = server.run([sys.executable, "-c", text], tmp_path)
  assert done.stdout == "True\n"
