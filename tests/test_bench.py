"""The benchmark: what it refuses, what it records, what it counts."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from blip_jax.tools.bench import (
  __main__ as bench,
)
from blip_jax.tools.bench import (
  contest,
  kinds,
  measure,
  programs,
  restart,
  results,
  roofline,
)

from blip_jax.models import config, flops
from tests import helpers

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "tools" / "bench" / "results").glob("*.json"))
PEAKS = {"tflops": 0.1, "gigabytes_per_second": 10.0}
SETUP = programs.Setup("tiny", 16, "float32")


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch):
  monkeypatch.setattr(measure, "peaks", lambda dtype: PEAKS)
  yield
  # Other tests share compiled programs.
  jax.config.update("jax_enable_compilation_cache", True)


def change(by):
  """A peer: the native program with other outputs."""

  def make(setup, batch_size):
    program = programs.encode(setup, batch_size)
    return measure.Program(program.items, lambda: program.run() + by)

  return make


def test_there_is_a_ratio_only_of_programs_with_the_same_outputs():
  def broken(setup, batch_size):
    raise MemoryError("no room")

  peers = {
    "same": change(0.0),
    "other": change(0.01),
    "broken": broken,
    "absent": "has no such program",
  }
  program, native, found = contest.run(programs.encode, peers, SETUP, [2], 3)
  assert program.items == native["batch_size"] == 2
  assert native["compiling_seconds"] > 0
  low, high = native["ms_quartiles"]
  assert 0 < low <= native["ms"] <= high
  assert found["same"]["differences"] == {"float32": 0}
  assert found["same"]["ratio"] == pytest.approx(
    native["per_second"] / found["same"]["per_second"]
  )
  assert found["other"]["note"].startswith("outputs differ")
  assert "MemoryError: no room" in found["broken"]["note"]
  assert found["absent"]["note"] == "has no such program"
  assert [name for name, peer in found.items() if "ratio" in peer] == ["same"]


def test_float8_is_compared_with_bfloat16():
  options = kinds.Options(batch_sizes=(2,), repeats=3, dtype="float8")
  row = kinds.measure_row("encode", "tiny", options)
  assert row["dtype"] == "float8"
  (peer,) = row["peers"].items()
  assert peer[0] == "bfloat16" and peer[1]["ratio"] > 0
  (difference,) = peer[1]["differences"].items()
  assert difference[0] == "float8" and 0.01 < difference[1] < 0.1


def test_ids_must_be_the_same():
  ids = np.arange(8).reshape(2, 4)
  assert contest.difference(ids, ids) == 0
  assert contest.difference(ids, ids + (ids == 3)) == 1 / 8
  assert contest.difference(ids, ids[:, :3]) == float("inf")


def test_a_program_runs_at_its_best_batch_size():
  def make(setup, batch_size):
    if batch_size == 8:
      raise MemoryError("no room")
    return measure.Program(batch_size, lambda: None)

  clock = iter([1.0, 4.0])  # seconds of a call
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(measure, "seconds_of", lambda run: next(clock))
    program, _, numbers = contest.best(make, SETUP, [2, 4, 8, 16])
  assert program.items == 2
  assert numbers["tried"] == {2: 2, 4: 1, 8: "MemoryError: no room"}


@pytest.fixture
def fake_kinds(monkeypatch):
  native = {
    "batch_size": 2,
    "per_second": 4.0,
    "ms": 500.0,
    "ms_quartiles": [400.0, 600.0],
  }

  def works(setup, batch_sizes, options):
    return {
      "unit": "images",
      "gflop": 5.0,
      "native": native | {"intensity": 2.0 * len(options.compare)},
      "peers": {"a|b": {"ratio": 2.0}},
    }

  def fails(setup, batch_sizes, options):
    raise MemoryError("out of\nmemory")

  monkeypatch.setattr(
    kinds,
    "KINDS",
    {"fails": kinds.Kind("what fails", fails), "works": kinds.Kind("", works)},
  )


def test_rows_are_recorded_one_by_one(fake_kinds, tmp_path, capsys):
  out = tmp_path / "bench.json"
  words = ["--size", "tiny", "--out", str(out)]
  assert bench.main(["all", *words]) == 0
  failed, row = results.read(out)
  assert failed["error"] == "MemoryError: out of memory"
  assert row["native"]["tflops"] == pytest.approx(0.02)
  assert row["native"]["mfu"] == pytest.approx(0.2)
  assert row["datasheet"] is None  # this device has none
  assert row["versions"]["jax"] and row["versions"]["commit"]
  assert "| 20% / unknown |" in capsys.readouterr().out

  # Another run of the same file: one row is replaced, one is added.
  assert bench.main(["works", *words, "--compare", "hf", "plain"]) == 0
  assert bench.main(["works", "--size", "base", "--out", str(out)]) == 0
  rows = results.read(out)
  assert [(row["kind"], row["size"]) for row in rows] == [
    ("fails", "tiny"),
    ("works", "tiny"),
    ("works", "base"),
  ]
  assert rows[1]["native"]["intensity"] == 4

  capsys.readouterr()
  assert bench.main(["--out", str(out), "--table"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert {line.count("|") for line in lines[2:] if line} == {9}
  assert "MemoryError: out of memory" in lines[4]
  assert "2.00x a/b" in lines[5]


def test_what_cannot_be_drawn_is_said(fake_kinds, tmp_path):
  out, plot = tmp_path / "bench.json", tmp_path / "roofline.png"
  bench.main(["fails", "--size", "tiny", "--out", str(out)])
  with pytest.raises(ValueError, match="no row of a model"):
    roofline.draw(results.read(out), plot)
  words = ["--size", "tiny", "--compare", "hf", "--out", str(out)]
  assert bench.main(["works", *words, "--plot", str(plot)]) == 0
  assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  "words, expected",
  [
    (["encoder"], ("pretrain", "capfilt", "'encoder'")),
    (["encode", "--size", "huge"], ("tiny", "large", "'huge'")),
    (["encode", "--compare", "timm"], ("hf", "plain", "'timm'")),
    (["encode", "--device", "npu"], ("cpu", "gpu", "tpu", "'npu'")),
    (["encode", "--repeats", "0"], ("--repeats", "found 0")),
    (["encode", "--batch-sizes", "-4"], ("--batch-sizes", "found -4")),
    (["--table"], ("--out",)),
    (["encode", "--dtype", "int8"], ("float32", "float8", "'int8'")),
    (["pretrain", "--dtype", "float8"], ("KIND of --dtype", "'pretrain'")),
    (["encode", "--dtype", "float8", "--compare", "hf"], ("leave out",)),
  ],
)
def test_unknown_names_are_refused(words, expected, capsys):
  assert bench.main(words) == 2
  error = capsys.readouterr().err
  assert all(text in error for text in expected), error


def test_nothing_is_measured_that_cannot_be_kept(fake_kinds, tmp_path, capsys):
  (tmp_path / "file").touch()
  out = str(tmp_path / "file" / "bench.json")
  assert bench.main(["works", "--size", "tiny", "--out", out]) == 1
  shown = capsys.readouterr()
  assert "file" in shown.err and not shown.out


def test_a_file_that_is_no_result_is_left_as_it_is(tmp_path, capsys):
  path = tmp_path / "mine.json"
  path.write_text('{"rows": [1]}')
  assert bench.main(["encode", "--size", "tiny", "--out", str(path)]) == 1
  assert "rows[0]: expected an object, found 1" in capsys.readouterr().err
  assert path.read_text() == '{"rows": [1]}'


@pytest.mark.parametrize(
  "size, pretraining, image, caption, filtering",
  [("base", 306.8, 111.0, 143, 142.8), ("large", 681.0, 382.1, 419, 419)],
)
def test_reference_count(size, pretraining, image, caption, filtering):
  def sizes(image_size):
    return config.variant(
      size, image_size=image_size, vocab_size=30524, tokens=helpers.TOKENS
    )

  giga = lambda flop: flop / 1e9
  c = sizes(384)
  assert giga(flops.pretraining(sizes(224), 30, 57600)) == pytest.approx(
    pretraining, abs=0.06
  )
  assert giga(flops.image(c.vit)) == pytest.approx(image, abs=0.06)
  assert giga(flops.captioning(c, 20, 3)) == pytest.approx(caption, abs=0.5)
  assert giga(flops.filtering(c, 35, 2)) == pytest.approx(filtering, abs=0.5)


def test_reference_count_of_an_answer():
  """Of three beams of nine tokens after [DEC]; a question of ten tokens."""
  c = config.variant(
    "base", image_size=480, vocab_size=30524, tokens=helpers.TOKENS
  )
  assert flops.answering(c, 10, 10, 3) / 1e9 == pytest.approx(218.81, abs=0.06)


def test_data_sheets():
  h100 = measure.datasheet("NVIDIA H100 80GB HBM3", "bfloat16")
  assert h100 == {"tflops": 989.5, "gigabytes_per_second": 3350}
  assert measure.datasheet("NVIDIA H100 80GB HBM3", "float32") is None
  assert measure.datasheet("NVIDIA H100 PCIe", "bfloat16") is None


def test_time_of_stages_within_each_other_counts_once():
  assert measure._covered([(2.0, 3.0), (0.0, 4.0), (3.0, 6.0), (8.0, 9.0)]) == 7


def test_rows_whose_packages_are_absent_say_so(tmp_path):
  out = tmp_path / "bench.json"
  code = f"""
import sys
absent = {{"grain", "clu", "ml_collections", "tensorboardX", "torch"}}
sys.modules.update(dict.fromkeys(absent))
from blip_jax.tools.bench import __main__ as bench
words = "pretrain loader capfilt encode --size tiny --repeats 1 --batch-sizes 2"
sys.exit(bench.main([*words.split(), "--compare", "hf", "--out", {str(out)!r}]))
"""
  subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
  pretrain, loader, capfilt, encode = results.read(out)
  assert pretrain["error"].startswith("needs ml_collections")
  assert loader["error"].startswith("needs ")
  assert "needs " in capfilt["error"]
  assert encode["native"]["per_second"] > 0
  for peer in encode["peers"].values():
    assert peer == {"note": "needs torch, which is not installed"}


def test_results_are_what_the_readme_says():
  text = (ROOT / "tools" / "bench" / "README.md").read_text()
  assert RESULTS
  for path in RESULTS:
    assert results.table(results.read(path)) in text, path
    # A file says on what, and not where.
    assert not json.loads(path.read_text()).keys() - {"rows"}


def test_what_checkpoints_cost():
  """The first step compiles, and the last checkpoint is waited for."""
  rows = [
    {"step": 1, "train/loss": 1.0},
    {"step": 2, "train/loss": 1.0, "train/step_time": 2.0},
    {"step": 2, "train/save_seconds": 0.1},
    {"step": 3, "train/loss": 1.0, "train/step_time": 3.0},
    {"step": 3, "train/save_seconds": 0.3},
    {"step": 4, "train/loss": 1.0, "train/step_time": 5.0},
    {"step": 4, "train/save_seconds": 9.0},
  ]
  assert restart.stalls(rows) == pytest.approx((2, 0.2, 0.04))
  with pytest.raises(ValueError, match="too short for a checkpoint"):
    restart.stalls(rows[:3])


@pytest.mark.slow
def test_a_restart_is_measured(capsys):
  flags = "--config.checkpoint.every_seconds=1", "--config.batch_size=8"
  assert restart.main(["--seconds=5", *flags]) == 0
  said = capsys.readouterr().out
  assert said.count("s after the command") == 2 and "checkpoints:" in said
