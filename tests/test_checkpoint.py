"""Runs resume bit for bit, start where they should, and say why not."""

import asyncio
import concurrent.futures
import contextlib
import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.runtime import (
  checkpoint,
  digests,
  saved_arrays,
  saved_items,
  snapshot,
  start,
)
from tests import helpers


def scrambled(state):
  """The state with other values everywhere, odd floats among them."""
  odd = jnp.asarray([jnp.nan, -0.0, 1e-42, jnp.inf], jnp.float32)

  def scramble(leaf):
    if leaf.dtype == jnp.float32 and leaf.shape[-1:] == (4,):
      return jnp.broadcast_to(odd, leaf.shape)
    return leaf + 7

  return jax.jit(lambda s: jax.tree.map(scramble, s))(state)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 1), (1, 8, 1)])
def test_the_state_returns_bit_for_bit_on_any_mesh(tmp_path, sizes):
  run = helpers.ToyRun((4, 2, 1))
  saved = run.save(tmp_path, 12, scrambled(run.make()), position=99)
  other, loader = helpers.ToyRun(sizes, seed=1), helpers.StubLoader()
  state, origin = other.start(tmp_path, loader)
  helpers.assert_same(state, saved)
  assert int(state.step) == 12
  assert loader.position == 99
  assert origin == f"resumed {tmp_path}/checkpoints/12"
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  assert shardings == jax.tree.map(lambda s: s.sharding, other.abstract)


def test_saving_is_not_disturbed_by_donating_the_state(tmp_path):
  run = helpers.ToyRun()
  state = run.make()
  before = jax.device_get(state)
  store = checkpoint.Checkpoints(tmp_path, every_steps=1)
  store.save(1, state, helpers.StubLoader(), helpers.TOY_CONFIG)
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  step(state)
  store.close()
  loaded, _ = run.start(tmp_path)
  helpers.assert_same(loaded.replace(step=np.int32(0)), before)


def test_loader_may_advance_while_its_position_is_written(tmp_path):
  class Folder:
    async def await_creation(self):
      return tmp_path

  async def save():
    loader = helpers.StubLoader(3)
    item = saved_items.JsonItem("data.json", loader.get_state())
    write = await item.save(Folder())
    loader.state["next_index"] = 4
    await write

  asyncio.run(save())
  text = (tmp_path / "data.json").read_text()
  assert json.loads(text)["next_index"] == 3


def test_interval_and_policy(tmp_path):
  run = helpers.ToyRun((1, 1, 1))
  state = run.make()
  store = checkpoint.Checkpoints(
    tmp_path, every_steps=2, keep=2, keep_every_steps=6
  )
  saved = [
    s
    for s in range(1, 12)
    if store.save(s, state, helpers.StubLoader(), helpers.TOY_CONFIG)
  ]
  assert saved == [2, 4, 6, 8, 10]
  assert store.save(
    11, state, helpers.StubLoader(), helpers.TOY_CONFIG, force=True
  )
  assert not store.save(
    11, state, helpers.StubLoader(), helpers.TOY_CONFIG, force=True
  )
  store.close()
  folders = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert folders == [6, 10, 11]
  assert store.latest.name == "11"


@pytest.mark.parametrize("wrong", [{"every_steps": 0}, {"keep": 0}])
def test_impossible_policy_is_refused(tmp_path, wrong):
  with pytest.raises(ValueError, match=r"config\.checkpoint\.every_steps"):
    checkpoint.Checkpoints(tmp_path, **{"every_steps": 1, **wrong})


def test_order_of_initialisation(tmp_path):
  run = helpers.ToyRun(seed=2)
  here, full, weights = (tmp_path / n for n in ("here", "full", "weights"))
  scratch, origin = run.start(here)
  assert origin == "from scratch" and int(scratch.step) == 0
  helpers.assert_same(scratch, run.make())

  theirs = helpers.ToyRun(seed=3).save(weights, 20)
  state, origin = run.start(here, weights=str(weights))
  assert origin == f"weights of {weights}/checkpoints/20"
  helpers.assert_same(state.params, theirs.params)
  # The momentum encoder starts equal to the weights, not to fresh ones.
  helpers.assert_same(state.momentum.params_m, theirs.params)
  assert int(state.step) == 0
  helpers.assert_same(state.opt_state, scratch.opt_state)

  saved = helpers.ToyRun(seed=4).save(full, 30, position=5)
  loader = helpers.StubLoader()
  state, origin = run.start(here, loader, restore=str(full))
  assert origin == f"restored {full}/checkpoints/30"
  helpers.assert_same(state, saved)
  assert loader.position == 5

  # Once this workdir has a checkpoint, nothing else is even looked at.
  mine = run.save(here, 1)
  for init in ({"restore": str(full)}, {"weights": "/nowhere"}):
    state, origin = run.start(here, **init)
    assert origin.startswith("resumed")
    helpers.assert_same(state, mine)


def test_restore_and_weights_exclude_each_other(tmp_path):
  with pytest.raises(ValueError, match="exclude each other"):
    helpers.ToyRun().start(tmp_path, restore="a", weights="b")


def test_one_step_of_a_run_can_be_named(tmp_path):
  run = helpers.ToyRun()
  store = checkpoint.Checkpoints(tmp_path / "a", every_steps=1)
  for step in (1, 2):
    store.save(step, run.make(), helpers.StubLoader(), helpers.TOY_CONFIG)
  store.close()
  folder = tmp_path / "a" / "checkpoints" / "1"
  # A copy under any name still knows its step.
  copy = folder.rename(tmp_path / "best")
  state, _ = run.start(tmp_path / "b", restore=str(copy))
  assert int(state.step) == 1


def test_weights_name_what_is_missing_and_unexpected(tmp_path):
  helpers.ToyRun(heads=("itm_head",)).save(tmp_path / "from", 1)
  run = helpers.ToyRun(heads=("vision_proj",), seed=5)
  weights = str(tmp_path / "from")
  with pytest.raises(ValueError) as error:
    run.start(tmp_path / "to", weights=weights)
  lines = str(error.value).splitlines()
  assert lines[1:5] == [
    " - vision_proj/bias",
    " - vision_proj/kernel",
    " + itm_head/bias",
    " + itm_head/kernel",
  ]
  assert "config.init.allow_missing" in lines[5]
  with pytest.raises(ValueError) as error:
    run.start(tmp_path / "to", weights=weights, allow_missing=("vision.*",))
  assert " + itm_head/bias" in str(error.value)
  assert " - " not in str(error.value).split("has it):\n")[1].split("\nIf")[0]

  state, origin = run.start(
    tmp_path / "to",
    weights=weights,
    allow_missing=("vision_proj/.*",),
    allow_unexpected=("itm_head/.*",),
  )
  assert " - vision_proj/kernel" in origin and " + itm_head/bias" in origin
  fresh = run.make().params
  helpers.assert_same(state.params["vision_proj"], fresh["vision_proj"])
  theirs = saved_arrays.load_on_mesh(snapshot.find(weights), "params", run.mesh)
  helpers.assert_same(state.params["text_proj"], theirs["text_proj"])
  helpers.assert_same(state.momentum.params_m, state.params)


def test_momentum_state_is_taken_along_on_request(tmp_path):
  """Queues of another size stay fresh, and their pointer with them."""
  state = scrambled(helpers.ToyRun().make())
  helpers.ToyRun().save(tmp_path / "from", 1, state)
  start = lambda run, name, **init: run.start(
    tmp_path / name, weights=str(tmp_path / "from"), **init
  )[0]
  for sizes in ((2, 2, 2), (1, 8, 1)):
    found = start(helpers.ToyRun(sizes), f"to{sizes[0]}", momentum_state=True)
    helpers.assert_same(found.momentum, state.momentum)
    helpers.assert_same(found.params, state.params)
    assert int(found.step) == 0
  fresh = start(helpers.ToyRun(), "unasked").momentum
  helpers.assert_same(fresh.params_m, state.params)
  assert int(fresh.queue_ptr) == 5 and (fresh.text_queue == 1).all()
  longer = start(
    helpers.ToyRun(queue=8), "longer", momentum_state=True
  ).momentum
  helpers.assert_same(longer.params_m, state.momentum.params_m)
  assert int(longer.queue_ptr) == 5 and (longer.text_queue == 1).all()


def test_weights_of_another_shape_are_refused_even_if_allowed(tmp_path):
  helpers.ToyRun(width=8).save(tmp_path / "from", 1)
  with pytest.raises(ValueError) as error:
    helpers.ToyRun(width=16).start(
      tmp_path / "to",
      weights=str(tmp_path / "from"),
      allow_missing=(".*",),
      allow_unexpected=(".*",),
    )
  assert (
    "text_proj/kernel: checkpoint float32[8, 4], config float32[16, 4]"
    in str(error.value)
  )


def test_resuming_another_model_names_parameter_and_both_shapes(tmp_path):
  helpers.ToyRun(width=8).save(tmp_path, 1)
  with pytest.raises(ValueError) as error:
    helpers.ToyRun(width=16).start(tmp_path)
  message = str(error.value)
  assert f"{tmp_path}/checkpoints/1" in message
  line = "text_proj/kernel: checkpoint float32[8, 4], config float32[16, 4]"
  assert line in message
  assert "use another --workdir" in message


def test_load_params_onto_another_mesh(tmp_path):
  saved = helpers.ToyRun((1, 4, 2)).save(tmp_path, 1)
  mesh = helpers.ToyRun((8, 1, 1)).mesh
  params = saved_arrays.load_on_mesh(snapshot.find(tmp_path), "params", mesh)
  helpers.assert_same(params, saved.params)
  assert params["temp"].sharding.mesh == mesh


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, make):
  make(tmp_path / "foreign")
  with pytest.raises(ValueError) as error:
    snapshot.find(tmp_path / "foreign")
  assert f"{tmp_path}/foreign holds no checkpoint" in str(error.value)
  assert "checkpoints/<step>/" in str(error.value)


def _lose_params(folder):
  shutil.rmtree(folder / "params")


def _lose_opt_state(folder):
  shutil.rmtree(folder / "opt_state")


def _truncate_arrays(folder):
  for file in (folder / "params").glob("**/d/*"):
    file.write_bytes(file.read_bytes()[:20])


def _truncate_position(folder):
  file = folder / "data" / "process_0-of-1.json"
  file.write_bytes(file.read_bytes()[:20])


def _lose_everything(folder):
  shutil.rmtree(folder)
  folder.mkdir()


# TensorStore's thread may report to an event loop that the error has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
  ("damage", "item"),
  [
    (_lose_params, "params"),
    (_lose_opt_state, "opt_state"),
    (_truncate_arrays, "params"),
    (_truncate_position, "data"),
    (_lose_everything, "params"),
  ],
)
def test_damaged_checkpoint_is_named(tmp_path, damage, item):
  run = helpers.ToyRun()
  run.save(tmp_path / "a", 3)
  folder = tmp_path / "a" / "checkpoints" / "3"
  damage(folder)
  for init in ({}, {"restore": str(tmp_path / "a")}):
    with pytest.raises(ValueError) as error:
      run.start(tmp_path / ("b" if init else "a"), **init)
    assert f"{folder} is damaged: {item}/" in str(error.value)
    assert "Restore one of these folders from a copy" in str(error.value)


def test_a_checkpoint_without_digests_is_named_if_it_cannot_be_read(tmp_path):
  run = helpers.ToyRun()
  run.save(tmp_path, 3)
  folder = tmp_path / "checkpoints" / "3"
  (folder / "digests.json").unlink()
  _truncate_arrays(folder)
  with pytest.raises(ValueError) as error:
    run.start(tmp_path)
  message = f"{folder} is not a complete checkpoint: cannot read params/"
  assert message in str(error.value)


def test_another_number_of_processes_gets_the_positions_of_all(tmp_path):
  run, loader = helpers.ToyRun(), helpers.StubLoader()
  run.save(tmp_path, 1, position=72)
  data = tmp_path / "checkpoints" / "1" / "data"
  saved = (data / "process_0-of-1.json").read_text()
  (data / "process_0-of-1.json").unlink()
  (data.parent / "digests.json").unlink()
  # Of eleven, number 10 is not the third.
  for index in range(11):
    text = saved.replace("72", str(70 + index))
    (data / f"process_{index}-of-11.json").write_text(text)
  run.start(tmp_path, loader)
  assert [state["next_index"] for state in loader.states] == [*range(70, 81)]
  (data / "process_3-of-11.json").unlink()
  with pytest.raises(ValueError, match=r"data lacks process_3-of-11\.json"):
    run.start(tmp_path, loader)


def run_python(script, *args):
  root = pathlib.Path(__file__).resolve().parent.parent
  code = f"import sys; sys.path.insert(0, {str(root)!r})\n"
  code += "from tests import conftest, helpers\n" + textwrap.dedent(script)
  return subprocess.Popen([sys.executable, "-c", code, *map(str, args)])


def test_a_kill_during_a_save_costs_only_that_save(tmp_path):
  # The second save stops for ever between its arrays and its data position, so
  # that the kill surely falls inside it.
  script = """
    import pathlib, sys, threading
    from tests.test_checkpoint import scrambled
    from blip_jax.runtime import checkpoint, snapshot

    workdir, run = sys.argv[1], helpers.ToyRun((1, 1, 1))
    store = checkpoint.Checkpoints(workdir, every_steps=1)
    store.save(1, run.make(), helpers.StubLoader(41), helpers.TOY_CONFIG)
    store.wait()
    def write_text(self, text):
      if self.name.startswith("process_"):
        (pathlib.Path(workdir) / "inside").touch()
        threading.Event().wait()
    type(snapshot.epath.Path(workdir)).write_text = write_text
    state = scrambled(run.make())
    store.save(2, state, helpers.StubLoader(42), helpers.TOY_CONFIG)
    store.wait()
  """
  child = run_python(script, tmp_path)
  deadline = time.monotonic() + 120
  while not (tmp_path / "inside").exists():
    assert child.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  child.send_signal(signal.SIGKILL)
  child.wait()
  left = [p.name for p in (tmp_path / "checkpoints").iterdir()]
  assert len(left) == 2 and "2" not in left, left

  run, loader = helpers.ToyRun(), helpers.StubLoader()
  state, origin = run.start(tmp_path, loader)
  assert origin.endswith("checkpoints/1") and loader.position == 41
  helpers.assert_same(state, run.make().replace(step=jnp.int32(1)))
  # The step can be saved again, and the torn folder is gone.
  run.save(tmp_path, 2)
  folders = [p.name for p in (tmp_path / "checkpoints").iterdir()]
  assert sorted(folders) == ["1", "2"]
  assert int(run.start(tmp_path)[0].step) == 2


def test_two_processes_save_and_resume_one_run(tmp_path):
  script = """
    import sys
    import jax, numpy as np
    workdir, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    from tests.test_checkpoint import scrambled
    from blip_jax.runtime import checkpoint, sharding

    assert jax.device_count() == 4
    run = helpers.ToyRun((2, 2, 1))
    rows = np.full((2, 3), index, np.int32)
    batch = sharding.put_batch({"rows": rows}, run.mesh)["rows"]
    assert batch.shape == (4, 3)
    for shard in batch.addressable_shards:
      assert shard.data.shape == (1, 3) and (shard.data == index).all()
    state = run.save(workdir, 7, position=70 + index)
    loader = helpers.StubLoader()
    loaded, _ = run.start(workdir, loader)
    assert loader.position == 70 + index
    same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x == y).all(), a, b))
    assert all(jax.tree.leaves(jax.device_get(same(state, loaded))))
  """
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  children = [run_python(script, tmp_path, port, i) for i in range(2)]
  assert [child.wait(timeout=180) for child in children] == [0, 0]
  # One process can continue it, and knows the positions of both.
  loader = helpers.StubLoader()
  helpers.ToyRun().start(tmp_path, loader)
  assert [state["next_index"] for state in loader.states] == [70, 71]
  params = saved_arrays.load_on_mesh(
    snapshot.find(tmp_path), "params", helpers.ToyRun((1, 1, 1)).mesh
  )
  helpers.assert_same(params, helpers.ToyRun().make().params)


def test_arrays_are_read_one_by_one_in_parts(tmp_path, monkeypatch):
  """In order, each comes from the disk once, and a part is let go in time."""
  expected = saved_arrays.by_path(helpers.ToyRun().save(tmp_path, 1).params)
  folder = snapshot.find(tmp_path)
  sizes = [array.nbytes for array in expected.values()]
  monkeypatch.setattr(saved_arrays, "PART_BYTES", max(sizes))
  loaded = []
  load = saved_arrays.Arrays.load

  def counting(self, leaves):
    loaded.append(list(leaves))
    return load(self, leaves)

  monkeypatch.setattr(saved_arrays.Arrays, "load", counting)
  readers = saved_arrays.Arrays(folder).readers()
  assert readers.keys() == expected.keys()
  first = weakref.ref(next(iter(readers.values()))())
  for path, read in readers.items():
    array = read()
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, expected[path])
  assert 3 < len(loaded) < len(expected)
  assert [p for paths in loaded for p in paths] == list(expected)
  assert first() is None


def test_a_part_is_read_once_for_many_threads(tmp_path, monkeypatch):
  helpers.ToyRun().save(tmp_path, 1)
  loaded = []
  load = saved_arrays.Arrays.load

  def slow(self, leaves):
    loaded.append(list(leaves))
    time.sleep(0.1)
    return load(self, leaves)

  monkeypatch.setattr(saved_arrays.Arrays, "load", slow)
  readers = saved_arrays.Arrays(snapshot.find(tmp_path)).readers()
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda read: read(), readers.values()))
  assert loaded == [list(readers)]


def _flip_a_bit(folder, item="params"):
  (path,) = (folder / item / "d").iterdir()
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)
  return path


def test_a_job_starts_again_from_the_newest_sound_step(tmp_path, caplog):
  """A flipped bit does not keep Orbax from loading; the digests tell."""
  run = helpers.ToyRun((1, 1, 1))
  for step in (1, 2, 3):
    store = checkpoint.Checkpoints(tmp_path, every_steps=1, keep=5)
    store.save(step, run.make(), helpers.StubLoader(step), helpers.TOY_CONFIG)
    store.close()
  folder = tmp_path / "checkpoints"
  _flip_a_bit(folder / "3", "opt_state")
  _flip_a_bit(folder / "2", "momentum")
  config = types.SimpleNamespace(
    job="train", init=types.SimpleNamespace(restore="", weights="")
  )
  origins = []

  @start.falls_back
  def job(workdir):
    origin = start.origin(config, workdir)
    origins.append(pathlib.Path(origin.source).name)
    verification = start.verify(origin)
    store = checkpoint.Checkpoints(workdir, every_steps=1, keep=5)
    with contextlib.closing(store):
      loader = helpers.StubLoader()
      state, _ = run.start(workdir, loader)
      verification.wait()
      store.save(3, state, loader, helpers.TOY_CONFIG)
    return loader.position

  assert job(tmp_path) == 1
  assert origins == ["3", "2", "1"]
  for step, item in (("3", "opt_state"), ("2", "momentum")):
    assert f"{folder}/{step} is damaged: {item}/d/" in caplog.text
  assert caplog.text.count("The newest sound step is used instead") == 2
  # Damaged steps are kept under another name, and do not block the new one.
  names = sorted(path.name for path in folder.iterdir())
  assert names == ["1", "2.damaged", "3", "3.damaged"]
  assert str(snapshot.find(tmp_path)) == str(folder / "3")
  assert snapshot.find_sound(tmp_path).name == "3"


def test_a_run_of_which_no_step_is_sound_starts_nowhere(tmp_path):
  run = helpers.ToyRun()
  run.save(tmp_path, 1)
  path = _flip_a_bit(tmp_path / "checkpoints" / "1")
  config = types.SimpleNamespace(
    job="train", init=types.SimpleNamespace(restore="", weights="")
  )

  @start.falls_back
  def job():
    start.verify(start.origin(config, tmp_path)).wait()

  for init in ({}, {"restore": str(tmp_path)}, {"weights": str(tmp_path)}):
    vars(config.init).update({"restore": "", "weights": "", **init})
    with pytest.raises(ValueError) as error:
      job()
    assert f"{tmp_path}/checkpoints holds no sound checkpoint" in str(
      error.value
    )
    assert f"{path.relative_to(path.parents[2])}: expected" in str(error.value)
    assert "Restore one of these folders from a copy" in str(error.value)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_step_that_is_named_is_not_replaced_by_another(tmp_path):
  run = helpers.ToyRun()
  run.save(tmp_path, 1)
  run.save(tmp_path, 2)
  _flip_a_bit(tmp_path / "checkpoints" / "2")
  step = tmp_path / "checkpoints" / "2"
  assert snapshot.find_sound(tmp_path).name == "1"
  for _ in range(2):
    with pytest.raises(digests.Damaged, match="2 is damaged: params/d/"):
      snapshot.find_sound(step)


def test_damage_explains_why_a_step_cannot_be_loaded(tmp_path):
  """What Orbax raises first comes after the digests."""
  run = helpers.ToyRun()
  run.save(tmp_path, 1)
  path = tmp_path / "checkpoints" / "1" / "params" / "manifest.ocdbt"
  content = path.read_bytes()
  path.write_bytes(b"\0" * len(content))
  with pytest.raises(digests.Damaged, match=r"params/manifest.ocdbt: expected"):
    run.start(tmp_path)


def test_a_step_of_a_newer_version_is_refused(tmp_path):
  """An older step is not used in its place."""
  run = helpers.ToyRun((1, 1, 1))
  for step in (1, 2):
    run.save(tmp_path, step)
  newest = tmp_path / "checkpoints" / "2"
  path = newest / "meta" / "meta.json"
  assert json.loads(path.read_text()) == {"format": 1, "step": 2}
  path.write_text('{"format": 2, "step": 2}')
  (newest / "digests.json").unlink()
  with pytest.raises(ValueError, match=r"checkpoints/2 was saved by a newer"):
    run.start(tmp_path)


def test_checkpoints_of_earlier_versions_load_and_say_so(tmp_path, caplog):
  run = helpers.ToyRun()
  saved = run.save(tmp_path, 1)
  (tmp_path / "checkpoints" / "1" / "digests.json").unlink()
  caplog.set_level("INFO")
  state, _ = run.start(tmp_path)
  helpers.assert_same(state, saved)
  assert snapshot.find_sound(tmp_path).name == "1"
  assert caplog.text.count("has no digests.json, so it cannot be verified") == 1


def test_a_run_from_before_layers_were_stacked_says_what_helps(
  tmp_path, monkeypatch
):
  run = helpers.ToyRun()
  run.save(tmp_path, 1)
  one = {"layer_0": {"ln": {"scale": jax.ShapeDtypeStruct((4,), np.float32)}}}
  monkeypatch.setattr(saved_arrays, "stored", lambda *_: {"text_encoder": one})
  hint = re.escape(f"--config.init.weights={tmp_path}")
  with pytest.raises(ValueError, match=rf"saved before 0\.1\.0.*{hint}"):
    run.start(tmp_path)
