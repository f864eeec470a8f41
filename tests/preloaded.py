"""Commands in forks of a process that has imported the package already.

Most commands of tests do little, and importing JAX and the package takes longer
than the rest. The server imports both once, and starts no backend of JAX and no
thread. It forks for each command, and the fork becomes `python -m MODULE ...`
or `python -c TEXT`: with its arguments and folder, and an interpreter that ends
as it always does. The environment is the server's.
"""

import contextlib
import gc
import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import types

# What every training and all models import when they start: tensorboardX takes
# two seconds, and the tokenizer one.
MODULES = (
  "blip_jax.main",
  "tensorboardX",
  "transformers.models.bert.tokenization_bert",
)


class Server:
  """Runs commands one after another."""

  def __init__(self, env, modules):
    self._env = env
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.preloaded", *modules],
      env=env,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def run(self, words, cwd):
    """Does what `subprocess.run` does, and captures the output.

    Args:
      words: `[sys.executable, "-m" or "-c", ...]`.
      cwd: the folder to run in.
    """
    assert words[0] == sys.executable and words[1] in ("-m", "-c"), words
    with tempfile.TemporaryDirectory() as folder:
      outputs = [f"{folder}/out", f"{folder}/err"]
      request = {"words": words[1:], "cwd": str(cwd), "outputs": outputs}
      print(json.dumps(request), file=self._process.stdin, flush=True)
      status = int(self._process.stdout.readline())
      texts = [pathlib.Path(path).read_text() for path in outputs]
    return subprocess.CompletedProcess(words, status, *texts)

  def close(self):
    self._process.stdin.close()
    assert self._process.wait() == 0


@contextlib.contextmanager
def started(env, modules=MODULES):
  """Starts a server that has imported some modules; stops it at the end."""
  server = Server(env, modules)
  yield server
  server.close()


def serve(lines):
  """Forks for each request; returns it in the fork, and None at the end."""
  for line in lines:
    pid = os.fork()
    if not pid:
      return json.loads(line)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
  return None


def become(words, cwd, outputs):
  """Turns this fork into a command."""
  for number, path in enumerate((os.devnull, *outputs)):
    opened = os.open(path, os.O_RDWR | os.O_CREAT)
    os.dup2(opened, number)
    os.close(opened)
  os.chdir(cwd)
  option, what, *arguments = words
  if option == "-m":
    sys.argv[:], sys.path[0] = [what, *arguments], cwd
    # It is executed once more, as the main module.
    sys.modules.pop(what, None)
    runpy.run_module(what, run_name="__main__", alter_sys=True)
  else:
    sys.argv[:], sys.path[0] = [option, *arguments], ""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
  for name in sys.argv[1:]:
    importlib.import_module(name)
  # Otherwise each fork copies these pages in search of garbage, which takes a
  # second at its end alone.
  gc.freeze()
  request = serve(sys.stdin)
  if request is not None:
    become(**request)
