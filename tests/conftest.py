"""Eight fake devices, the order and the selection of tests, common fixtures."""

import gc
import json
import os
import pathlib
import shutil
import sys
import tempfile

# The workers read it when they import NumPy. Small products gain nothing by
# threads, which wait for cores that other tests have: some products took six
# times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests import QUICK_TO_COMPILE, type_checks

# Before anything of blip_jax is imported.
type_checks.install()

# XLA reads these once, when jax is first imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    QUICK_TO_COMPILE,
  )
)

# Programs that tests, or the processes they start, have in common are compiled
# once.
_CACHE = tempfile.mkdtemp(prefix="blip_jax_tests_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE)
# Most take less than the second from which on JAX keeps a program.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest
from absl import flags

# Worker processes of grain read absl flags, which pytest does not parse.
flags.FLAGS.mark_as_parsed()

# Programs are made of many objects that stay. For every 700 new ones Python
# looks for garbage, which takes a twentieth of the suite's time.
gc.set_threshold(10_000, 10, 10)

# Silent rank promotion hides broadcasting mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parent.parent


# Files that take minutes start first: the last file keeps one worker busy while
# the other has nothing left to do.
_LONG = (
  "test_parity.py",
  "test_train.py",
  "test_docs.py",
  "test_mesh.py",
  "test_pretrain.py",
)

# The inner loop (`-m quick`) leaves out files that trace or compile models,
# train, start processes, or read much data.  Single tests in these files can be
# marked quick too.
_NOT_QUICK = (
  "test_actors.py",
  "test_adapt.py",
  "test_align.py",
  "test_annotations.py",
  "test_array.py",
  "test_bad_input.py",
  "test_bench.py",
  "test_best.py",
  "test_bootstrap.py",
  "test_build.py",
  "test_caption.py",
  "test_caption_images.py",
  "test_caption_metrics.py",
  "test_captions.py",
  "test_checkpoint.py",
  "test_choosing.py",
  "test_choosing_evaluator.py",
  "test_companions.py",
  "test_comparing_evaluator.py",
  "test_context.py",
  "test_convert_checkpoint.py",
  "test_dialog.py",
  "test_digests.py",
  "test_distributed.py",
  "test_docs.py",
  "test_docstrings.py",
  "test_engines.py",
  "test_evaluators_base.py",
  "test_export.py",
  "test_generation.py",
  "test_held_out_loss.py",
  "test_hostile_checkpoints.py",
  "test_hostile_configs.py",
  "test_hostile_images.py",
  "test_hostile_requests.py",
  "test_hostile_states.py",
  "test_hostile_tars.py",
  "test_hostile_urls.py",
  "test_hub.py",
  "test_hugging_face.py",
  "test_index.py",
  "test_inspect_checkpoint.py",
  "test_install.py",
  "test_itm_accuracy.py",
  "test_java.py",
  "test_job.py",
  "test_launchers.py",
  "test_label.py",
  "test_layers.py",
  "test_loader.py",
  "test_lock.py",
  "test_main.py",
  "test_matching.py",
  "test_med.py",
  "test_mesh.py",
  "test_model.py",
  "test_model_configs.py",
  "test_momentum.py",
  "test_names.py",
  "test_nlvr.py",
  "test_objects.py",
  "test_opening.py",
  "test_optim.py",
  "test_order.py",
  "test_parity.py",
  "test_pipelines.py",
  "test_pretrain.py",
  "test_ptb.py",
  "test_public_face.py",
  "test_quickstart.py",
  "test_ranking.py",
  "test_ray.py",
  "test_reader.py",
  "test_remote_data.py",
  "test_remote_runs.py",
  "test_retrieval.py",
  "test_retrieval_suite.py",
  "test_samples.py",
  "test_scenes.py",
  "test_scoring.py",
  "test_search.py",
  "test_service.py",
  "test_service_load.py",
  "test_sharding.py",
  "test_tar_headers.py",
  "test_train.py",
  "test_video.py",
  "test_vit.py",
  "test_vqa.py",
  "test_weights.py",
  "test_write.py",
)


# First, for pytest selects by markers in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.name not in _LONG)
  for item in items:
    if item.path.name not in _NOT_QUICK and not item.get_closest_marker("slow"):
      item.add_marker(pytest.mark.quick)


def pytest_unconfigure():
  shutil.rmtree(_CACHE)


@pytest.fixture(scope="module", autouse=True)
def free_programs():
  """Frees compiled programs before the process runs out of memory maps.

  Linux allows 65,530 of a process, a program takes several, and at the limit
  the compiler crashes.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
    jax.clear_caches()


@pytest.fixture(autouse=True)
def same_compiler_flags():
  """Processes that later tests start would inherit other ones."""
  before = os.environ["XLA_FLAGS"]
  yield
  after, os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"], before
  assert after == before


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
  """Material that is too large, or not licensed, to be committed (README)."""
  path = pathlib.Path(os.environ.get("BLIP_JAX_SHARED", ROOT.parent / "shared"))
  if not path.is_dir():
    if "BLIP_JAX_SHARED" in os.environ:
      pytest.fail(f"BLIP_JAX_SHARED: {path} is not a folder")
    pytest.skip(f"needs the shared material; set BLIP_JAX_SHARED ({path})")
  return path


@pytest.fixture(scope="module")
def server():
  """A server that speaks S3."""
  from tests import object_store

  with object_store.started() as started:
    yield started


@pytest.fixture(scope="module")
def commands():
  """Runs commands on one device, without the import of the package."""
  from tests import preloaded

  env = {**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE}
  with preloaded.started(env) as server:
    yield server


@pytest.fixture(scope="module")
def run(commands):
  """A training as a user starts it; see `user_runs`."""
  from tests import user_runs

  def run(workdir, *extra, check=True):
    done = commands.run(user_runs.command(workdir, *extra), workdir.parent)
    if check:
      assert done.returncode == 0, done.stderr[-3000:]
    return done

  return run


@pytest.fixture(scope="module")
def digest(commands):
  """What `tools/inspect_checkpoint.py --digest` prints, for comparison."""

  def digest(workdir):
    tool = (sys.executable, "-m", "blip_jax.tools.inspect_checkpoint")
    done = commands.run([*tool, str(workdir), "--digest"], workdir.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

  return digest
