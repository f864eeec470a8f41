"""Plans: what the tool says of a job."""

import json
import os
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from blip_jax.tools import plan

from blip_jax.cli import recipes
from blip_jax.plan import (
  chips,
  operations,
  processor,
  report,
  roofline,
  search,
  topology,
  traffic,
)
from blip_jax.runtime import command
from tests import helpers

# As a processor would be measured, so that tests need not.
CPU = chips.Chip(
  ("cpu",), "cpu", 0.2, 8 * 2**30, 1.0, 2e10, 4e10, 0.0, 1e-6, "a test"
)


def test_flops_of_what_is_computed_again_count():
  x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  layer = lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w).sum()
  of = lambda f: operations.flops(jax.make_jaxpr(jax.grad(f))(x, x).jaxpr)
  product = 2 * 8**3
  assert of(layer) == 4 * product
  assert of(jax.checkpoint(layer)) > 4 * product


def test_flops_of_loops_of_unknown_length():
  def decode(x):
    return jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ x, x)

  jaxpr = jax.make_jaxpr(decode)(jnp.ones((4, 4))).jaxpr
  assert operations.flops(jaxpr, loop_length=7) == 7 * 2 * 4**3


def test_time_of_collectives():
  h100 = chips.CHIPS["h100"]
  seconds = lambda kind, group: roofline.collective_seconds(
    h100, 8, traffic.Collective(kind, 8 * 10**9, group, 1)
  )
  host = tuple(range(8))
  assert seconds("all-gather", host) == pytest.approx(7 / 450)
  assert seconds("all-reduce", host) == pytest.approx(2 * 7 / 450)
  # One GPU of each host, through one adapter each.
  assert seconds("all-gather", (0, 8)) == pytest.approx(0.5 * 8 / 50)
  # Eight adapters of a host share the work.
  both = tuple(range(16))
  assert seconds("all-gather", both) == pytest.approx(7 / 450 + 0.5 / 50)


def test_times_are_those_of_a_roofline():
  counts = traffic.Counts((), 10**9, 2 * 10**9, 1000, 0)
  times = roofline.times(chips.CHIPS["v5e"], 256, 1.97e12, counts)
  assert times.products == pytest.approx(0.01 / 0.7)
  assert times.memory == pytest.approx(2 / 819 / 0.8)
  assert times.operations == pytest.approx(1e-3)
  assert times.best == pytest.approx(0.01)
  assert times.best < times.expected


def test_every_chip_of_the_table_can_be_found():
  for chip in chips.CHIPS.values():
    assert all(chips.of_kind(kind) is chip for kind in chip.kinds)
    assert chip.source.startswith("https://")
  assert chips.of_kind("NVIDIA H100 PCIe") is None


@pytest.mark.parametrize(
  "name, expected",
  [
    ("v5litepod-8", "v5e:16x16"),
    ("v9:2x2", "v5e:16x16"),
    ("v5e", "v5e:16x16"),
    ("h100:0x8", "h100:1x8"),
    ("cpu:2x2", "expected a number of devices"),
  ],
)
def test_unknown_topologies_are_refused(name, expected):
  with pytest.raises(command.UsageError, match=expected):
    topology.parse(name)


@pytest.mark.parametrize(
  "name, extra", [("v5e:2x2", "tpu-aot"), ("h100:1x8", "gpu-aot")]
)
def test_a_missing_extra_is_named(name, extra, monkeypatch):
  monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(ImportError, match=rf"pip install 'blip_jax\[{extra}\]'"):
    topology.parse(name)


@pytest.mark.parametrize(
  "words, expected",
  [
    (["--mesh", "data=3"], "must be the number of devices, 2"),
    (["--mesh", "model=2"], "expected sizes of data, fsdp, tensor"),
    (["--mesh", "data=0"], "'data=0'"),
    (["--batch", "7"], "do not split over 2 data shards"),
    (["--batch", "-1"], "--batch: expected more than 0"),
    (["--price", "nan"], "--price: expected more than 0"),
    (["--config.model.varaint=tiny"], "model.variant"),
  ],
)
def test_wrong_words_are_one_line(words, expected, monkeypatch, capsys):
  monkeypatch.setattr(processor, "measure", lambda number: CPU)
  known = ["--config", "quickstart", "--topology", "cpu:2"]
  assert plan.main([*known, *words]) in (1, 2)
  error = capsys.readouterr().err
  assert error.startswith("error: ") and expected in error
  assert len(error.splitlines()) == 1


def test_other_jobs_are_refused(capsys):
  words = ["--config", "search", "--topology", "cpu:1"]
  assert plan.main(words) == 2
  assert "only train and capfilt" in capsys.readouterr().err


@pytest.fixture
def tiny(monkeypatch):
  """Words for a plan that takes seconds."""
  monkeypatch.setattr(processor, "measure", lambda number: CPU)
  shrink = ["model.image_size=16", "pretrain.queue_size=16"]
  words = [f"--config.{word}" for word in shrink]
  return ["--config", "quickstart", "--batch", "8", *words]


def test_plan_of_a_training(tiny, capsys):
  words = [*tiny, "--topology", "cpu:2", "--mesh", "data=1,fsdp=2"]
  assert plan.main([*words, "--price", "2"]) == 0
  lines = capsys.readouterr().out.splitlines()
  said = {line.split()[0]: line for line in lines if line.startswith("  ")}
  assert "fits" in said["memory"] and "of 8.00 GiB" in said["memory"]
  assert "all-gather" in said["collectives"]
  assert "expected" in said["time"] and "reference" in said["MFU"]
  assert "at 2 an hour" in lines[-1]


def test_programs_of_gpus_and_of_labelling_are_not_saved(capsys, monkeypatch):
  h100 = topology.Topology("h100:1x8", chips.CHIPS["h100"], [], 8)
  monkeypatch.setattr(topology, "parse", lambda _: h100)
  known = ["--topology", "h100:1x8", "--save", "unused"]
  assert plan.main(["--config", "quickstart", *known]) == 2
  assert "a GPU's own compiler" in capsys.readouterr().err
  assert plan.main(["--config", "capfilt", *known]) == 2
  assert "only the step of a training" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_starts_with_the_program_of_a_plan(tmp_path):
  saved, shrink = tmp_path / "saved", ["batch_size=8", "model.image_size=16"]
  shrink += ["num_steps=2", "optim.steps_per_epoch=2", "optim.warmup_steps=1"]
  shrink += ["pretrain.queue_size=16", "evals.scenes_val.source="]
  words = ["--config=quickstart", *(f"--config.{word}" for word in shrink)]

  def run(module, *words, **environment):
    done = subprocess.run(
      [sys.executable, "-m", f"blip_jax.{module}", *words],
      env={**os.environ, "XLA_FLAGS": "", **environment},
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr

  run("tools.plan", *words, "--topology=cpu:1", f"--save={saved}")
  (program,) = saved.glob("jit_train_step-*-cache")
  said = run(
    "main",
    *words,
    f"--workdir={tmp_path / 'run'}",
    JAX_COMPILATION_CACHE_DIR=str(saved),
    JAX_LOG_COMPILES="1",
  )
  assert "cache hit for 'jit_train_step'" in said
  assert [*saved.glob("jit_train_step-*-cache")] == [program]


def row(memory, seconds, batch_size=8):
  times = roofline.Times(seconds, 0.0, 0.0, 0.0, seconds)
  program = plan.programs.Program(
    "step", batch_size, 0, memory, 1.0, 1.0, None, times, 1.0
  )
  return search.Row(batch_size, "none", {"data": 1}, program)


def test_pareto_is_what_nothing_else_beats():
  target = topology.Topology("cpu:1", CPU, [], 1)
  small, fast = row(2**20, 2.0), row(2**30, 1.0)
  worse, large = row(2**30, 3.0), row(9 * 2**30, 0.1)
  left_out = search.Row(8, "none", {"data": 1}, None, "too large")
  rows = [small, fast, worse, large, left_out]
  assert search.pareto(rows, target) == [small, fast]


def test_what_does_not_fit_is_said():
  target = topology.Topology("cpu:1", CPU, [], 1)
  small, large = row(2**20, 1.0).program, row(9 * 2**30, 1.0).program
  unknown = plan.programs.Program(
    "step", 8, 2**30, None, 1.0, 1.0, None, None, 1.0, "Used 24.24G"
  )
  assert report.fits(small, target)
  assert not report.fits(large, target)
  assert not report.fits(unknown, target)
  said = "\n".join(report.of_program(unknown, target))
  assert "does not fit" in said and "Used 24.24G" in said
  assert "1.00 GiB of 8.00" in said


@pytest.mark.parametrize(
  "message, expected",
  [
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory "
      "in memory space hbm. Used 24.24G of 15.75G hbm.",
      "Used 24.24G",
    ),
    ("RESOURCE_EXHAUSTED: no room", "RESOURCE_EXHAUSTED: no room"),
  ],
)
def test_what_the_compiler_says_of_a_large_program(message, expected):
  assert plan.programs._too_large(message) == expected


def test_rows_of_a_search():
  target = topology.Topology("cpu:1", CPU, [], 1)
  gives_up = plan.programs.Program(
    "step", 8, 0, None, 1.0, 1.0, None, None, 1.0, "Used 24.24G"
  )
  mesh = {"data": 1, "fsdp": 2}
  left_out = search.Row(8, "dots", mesh, None, "a smaller batch is too large")
  rows = [row(2**30, 2.0), row(9 * 2**30, 2.0), left_out]
  rows.append(search.Row(8, "full", mesh, gives_up))
  assert [search.line(each, target) for each in rows] == [
    "| 8 | none | data=1 | 1.00 | 4 |",
    "| 8 | none | data=1 | 9.00 | does not fit |",
    "| 8 | dots | data=1, fsdp=2 |  | a smaller batch is too large |",
    "| 8 | full | data=1, fsdp=2 |  | does not fit Used 24.24G |",
  ]


def test_a_search_tries_each_mesh_once():
  config = recipes.load("quickstart").copy_and_resolve_references()
  of = lambda number: search.meshes(
    config, topology.Topology("cpu", CPU, jax.devices()[:number], number)
  )
  mesh = lambda data, fsdp: {"data": data, "fsdp": fsdp, "tensor": 1}
  assert of(1) == [mesh(1, 1)]
  assert of(4) == [mesh(4, 1), mesh(1, 4)]
  with config.unlocked():
    config.mesh.fsdp = 2
  assert of(8) == [mesh(4, 2), mesh(8, 1), mesh(1, 8)]


def test_a_search_goes_on_until_a_batch_is_too_large(monkeypatch):
  config = recipes.load("quickstart").copy_and_resolve_references()
  target = topology.Topology("cpu:1", CPU, jax.devices()[:1], 1)
  compiled = []

  def training(config, target):
    size, remat = config.batch_size, config.model.vit_remat
    assert config.model.text_remat == remat
    compiled.append((size, remat))
    if size == 8 and remat == "dots":
      raise ValueError("a reason")
    memory = 9 * 2**30 if size * (remat != "full") >= 16 else 2**30
    return row(memory, 1.0, size).program, config

  monkeypatch.setattr(plan.programs, "training", training)
  found = [*search.run(config, target, [{"data": 1}])]
  assert compiled == [
    (8, "none"),
    (16, "none"),
    (8, "dots"),
    (16, "dots"),
    (8, "full"),
    (16, "full"),
    (32, "full"),
  ]
  notes = {(each.batch_size, each.remat): each.note for each in found}
  assert len(found) == 9
  assert (
    notes[32, "none"] == notes[32, "dots"] == "a smaller batch is too large"
  )
  assert notes[8, "dots"] == "a reason"
  assert [each.batch_size for each in search.pareto(found, target)] == [32]


@pytest.mark.parametrize(
  "words, expected",
  [
    (["--config", "capfilt"], "--search: only a training"),
    (["--config", "quickstart", "--price", "2"], "plan the row that you"),
    (["--config", "quickstart", "--batch", "7"], "do not split over 2 data"),
    (["--config", "quickstart", "--mesh", "data=3"], "the number of devices"),
  ],
)
def test_a_search_of_what_cannot_be_is_refused(
  words, expected, monkeypatch, capsys
):
  monkeypatch.setattr(processor, "measure", lambda number: CPU)
  known = ["--topology", "cpu:2", "--search"]
  assert plan.main([*words, *known]) in (1, 2)
  found = capsys.readouterr()
  assert expected in found.err and "batch |" not in found.out


@pytest.mark.slow
def test_search(tiny, capsys):
  words = [*tiny, "--topology", "cpu:1", "--search"]
  assert plan.main(words) == 0
  table, best = capsys.readouterr().out.split("\nPareto:\n")
  rows = table.partition(f"{search.HEADER}\n")[2].splitlines()
  assert len(rows) == 9 and sum(x.startswith("| 4 | ") for x in rows) == 3
  header, repeated = best.splitlines()[:2], best.splitlines()[2:]
  assert "\n".join(header) == search.HEADER
  assert repeated and set(repeated) <= set(rows)


@pytest.mark.slow
def test_plan_of_capfilt(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(processor, "measure", lambda number: CPU)
  captioner = helpers.write_captioner(tmp_path / "captioner")
  filters = helpers.write_golden("blip_itm", tmp_path / "filter")
  words = [f"--config.captioner={captioner}", f"--config.filter={filters}"]
  known = ["--config", "capfilt", "--topology", "cpu:1", "--batch", "2"]
  assert plan.main([*known, *words, "--images", "2e9"]) == 0
  out = capsys.readouterr().out
  assert out.count("fits: ") == 5
  assert "2 billion images take" in out


# A process of its own, in which nothing else has used memory or threads. What
# the processor can do is measured before each series of steps, because its
# caches and its clock belong to other processes, too.
_PROOF = """
import json, sys, time
from blip_jax.plan import processor, programs, roofline, topology
target = topology.parse("cpu:1")
import jax
import numpy as np
from blip_jax import build
from blip_jax.cli import command_line
from blip_jax.runtime import sharding

def resident(key):
  lines = open("/proc/self/status").read().splitlines()
  return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key))

config = command_line.parse(sys.argv[1:]).config
program, config = programs.training(config, target)
mesh = build.make_mesh(config, target.devices)
run = build.build(config, mesh)
rng = np.random.default_rng(0)
batch = {
  name: rng.integers(1, 60, x.shape).astype(x.dtype)
  for name, x in run.abstract_batch().items()
}
batch["attention_mask"] = np.ones_like(batch["attention_mask"])
state = run.create_state()
with sharding.activate(mesh):
  batch = sharding.put_batch(batch, mesh)
jax.block_until_ready((state, batch))
arguments = sum(x.nbytes for x in jax.tree.leaves((state, batch)))
begin = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
state, metrics = program.compiled(state, batch, 0)
jax.block_until_ready(metrics)
memory = arguments + resident("VmHWM") - begin
seconds, step = [], 0
for _ in range(5):
  chip = processor.measure(1)
  predicted = roofline.times(chip, 1, program.flops, program.counts).expected
  start, first = time.process_time(), step
  while time.process_time() < start + 1:
    step += 1
    state, metrics = program.compiled(state, batch, step)
    jax.block_until_ready(metrics)
  seconds.append((predicted, (time.process_time() - start) / (step - first)))
print(json.dumps({"memory": [program.memory, memory], "seconds": seconds}))
"""


def proof(*words):
  """Predicted and measured memory, and such pairs of seconds of a step."""
  words = [f"--config.{word}" for word in ("tokenizer=scenes", *words)]
  done = subprocess.run(
    [sys.executable, "-c", _PROOF, "--config=quickstart", *words],
    # Compiled as a job compiles.
    env={**os.environ, "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_memory_is_what_was_predicted(remat):
  words = ["batch_size=128", "model.image_size=96", f"model.vit_remat={remat}"]
  predicted, measured = proof(*words)["memory"]
  assert predicted == pytest.approx(measured, rel=0.05)


# Their sizes had no part in choosing the shares of `roofline`.
@pytest.mark.slow
@pytest.mark.parametrize(
  "words",
  [
    ["batch_size=32", "model.image_size=64"],
    [
      "batch_size=64",
      "model.image_size=80",
      "model.vit_remat=none",
      "model.text_remat=none",
    ],
  ],
)
def test_time_is_what_was_predicted(words):
  seconds = proof(*words)["seconds"]
  ratio = statistics.median(found / said for said, found in seconds)
  assert ratio == pytest.approx(1, rel=0.25)
