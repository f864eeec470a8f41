"""Eight fake devices, and where the golden arrays are."""

import json
import os
import pathlib
import shutil
import tempfile

from tests import QUICK_TO_COMPILE

# XLA reads these once, when jax is first imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    QUICK_TO_COMPILE,
  )
)

# Programs that several tests, or the processes they start, have in common are
# compiled once.
_CACHE = tempfile.mkdtemp(prefix="blip_jax_tests_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE)

import jax
import pytest
from absl import flags

# grain's worker processes read absl flags, which pytest never parses.
flags.FLAGS.mark_as_parsed()

# A silent rank promotion is a broadcasting mistake in waiting.
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parent.parent


# Files that take minutes begin first; the last one would keep one worker busy
# while the other has nothing left to do.
_LONG = (
  "test_train.py",
  "test_docs.py",
  "test_parity.py",
  "test_mesh.py",
  "test_pretrain.py",
)


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.name not in _LONG)


def pytest_unconfigure():
  shutil.rmtree(_CACHE)


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
  return ROOT


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
  return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def golden_manifest(golden_dir) -> dict:
  return json.loads((golden_dir / "manifest.json").read_text())


@pytest.fixture(scope="session")
def golden_facts(golden_manifest):
  """Facts of one case by name: `golden_facts("vit")["grad_names"]`."""

  def facts(name: str) -> dict:
    (case,) = [c for c in golden_manifest["cases"] if c["name"] == name]
    return {k: v["value"] for k, v in case["facts"].items()}

  return facts


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
  """Material too large or not free to be committed (README, "Tests")."""
  path = pathlib.Path(os.environ.get("BLIP_JAX_SHARED", ROOT.parent / "shared"))
  if not path.is_dir():
    if "BLIP_JAX_SHARED" in os.environ:
      pytest.fail(f"BLIP_JAX_SHARED: {path} is no folder")
    pytest.skip(f"needs the shared material; set BLIP_JAX_SHARED ({path})")
  return path
