r"""Builds a page that captions images in the browser, without a server's help.

  python -m blip_jax.tools.export MODEL exported --format onnx \
    --programs caption
  python -m blip_jax.tools.browser exported page
  python -m http.server --bind 127.0.0.1 --directory page 8000

EXPORTED has a captioner as ONNX for batches of 1. OUT is a new folder of static
files: the page, the model, and ONNX Runtime for browsers, which is taken from
npm once, in the version whose hash is below. The page loads nothing from
elsewhere, and images stay in the browser.
"""

import argparse
import base64
import hashlib
import io
import pathlib
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from typing import Any

from blip_jax.runtime import command, files

PAGE = pathlib.Path(__file__).parent
RUNTIME = "onnxruntime-web@1.30.0"
SHA512 = (
  "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1Sig"
  "qR4CXAfKYQ=="
)
# For processors; those for GPUs lack operations that the search needs.
_RUNTIME_FILES = (
  "package.json",  # with its licence
  "dist/ort.wasm.bundle.min.mjs",
  "dist/ort-wasm-simd-threaded.wasm",
)
_MODEL_FILES = ("caption.onnx", "caption.json", "vocab.txt")


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m blip_jax.tools.browser",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("exported", metavar="EXPORTED", type=command.local_path)
  parser.add_argument("out", metavar="OUT", type=command.local_path)
  args = parser.parse_args(argv)
  build(pathlib.Path(args.exported), pathlib.Path(args.out))
  print(f"written: {args.out}; to see it on http://127.0.0.1:8000")
  print(f"  python -m http.server --bind 127.0.0.1 --directory {args.out} 8000")
  return 0


def build(exported: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the page's folder; it appears complete or not at all.

  Raises:
    ValueError: the folder exists, there is no model, or no runtime.
  """
  if files.exists(out):
    raise ValueError(f"{out} exists already; give another path, or move it")
  _check_model(exported)
  temporary = pathlib.Path(files.temporary_path(out))
  try:
    for path in PAGE.iterdir():
      if path.suffix in (".html", ".js"):
        _write(temporary / path.name, files.read_bytes(path))
    for name in _MODEL_FILES:
      _write(temporary / "model" / name, files.read_bytes(exported / name))
    for name, content in _runtime().items():
      _write(temporary / "ort" / name, content)
    files.rename(temporary, out)
  finally:
    files.remove_folder(temporary)


def _check_model(exported: pathlib.Path) -> None:
  missing = [x for x in _MODEL_FILES if not files.is_file(exported / x)]
  if missing:
    raise ValueError(
      f"{exported}: no {', '.join(missing)}; write them with python -m "
      f"blip_jax.tools.export MODEL {exported} --format onnx --programs caption"
    )
  facts: dict[str, Any] = files.read_json(exported / "caption.json")
  batch, *_ = facts["inputs"]["pixels"]["shape"]
  if batch != 1:
    raise ValueError(
      f"{exported}: expected a model for batches of 1, found {batch}; export "
      "it without --batch-size"
    )


def _runtime() -> dict[str, bytes]:
  """ONNX Runtime's files, by name."""
  with files.temporary_folder() as folder:
    words = ["npm", "pack", RUNTIME, "--pack-destination", str(folder)]
    try:
      subprocess.run(words, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
      raise ValueError(
        f"{RUNTIME} is taken from npm, which is not installed"
      ) from error
    except subprocess.CalledProcessError as error:
      raise ValueError(f"{' '.join(words)}: {error.stderr.strip()}") from error
    (package,) = folder.glob("*.tgz")
    content = files.read_bytes(package)
  found = base64.b64encode(hashlib.sha512(content).digest()).decode()
  if found != SHA512:
    raise ValueError(f"{RUNTIME}: expected SHA-512 {SHA512}, found {found}")
  with tarfile.open(fileobj=io.BytesIO(content)) as tar:
    return {
      pathlib.PurePath(name).name: _member(tar, f"package/{name}")
      for name in _RUNTIME_FILES
    }


def _member(tar: tarfile.TarFile, name: str) -> bytes:
  file = tar.extractfile(name)
  assert file is not None, name
  return file.read()


def _write(path: pathlib.Path, content: bytes) -> None:
  files.make_folder(path.parent)
  files.write_bytes(path, content)


if __name__ == "__main__":
  sys.exit(main())
