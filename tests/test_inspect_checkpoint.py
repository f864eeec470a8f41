"""The tool's table and digests, on real checkpoints."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blip_jax.tools import inspect_checkpoint

from blip_jax.runtime import best, saved_arrays, snapshot
from tests import helpers


@pytest.fixture(scope="module")
def tool():
  return inspect_checkpoint


def digests(tool, capsys, *args):
  assert tool.main([*map(str, args), "--digest"]) == 0
  lines = capsys.readouterr().out.splitlines()
  return dict(line.split(" ") for line in lines)


def test_table_counts_numbers_and_bytes(tool, capsys, tmp_path):
  helpers.ToyRun().save(tmp_path, 3)
  assert tool.main([str(tmp_path)]) == 0
  folder, head, *rows = capsys.readouterr().out.splitlines()
  assert folder == f"{tmp_path}/checkpoints/3"
  assert head.split() == ["item", "leaves", "numbers", "bytes"]
  # temp, and two heads of an 8 x 4 kernel and a bias of 4.
  assert rows[0].split() == ["params", "5", "73", "292"]
  assert [row.split()[0] for row in rows] == [
    "params",
    "momentum",
    "opt_state",
    "data",
  ]


def test_steps_have_sizes_and_arrays_have_shardings(tool, capsys, tmp_path):
  run = helpers.ToyRun((2, 2, 2))
  for step in (1, 2):
    run.save(tmp_path, step)
  best.Best(tmp_path, ("val/x",)).update(2, {"a": np.ones(4)}, {"val/x": 1.0})
  assert tool.main([str(tmp_path), "--steps"]) == 0
  head, *lines = capsys.readouterr().out.splitlines()
  assert head.split() == ["bytes", "processes", "saved", "checkpoint"]
  found = [line.split() for line in lines]
  folders = [f"{tmp_path}/{x}" for x in ("checkpoints/1", "checkpoints/2")]
  assert [row[-1] for row in found] == [*folders, f"{tmp_path}/best/2"]
  on_disk = sum(
    path.stat().st_size
    for path in (tmp_path / "checkpoints" / "1").rglob("*")
    if path.is_file()
  )
  assert found[0][:2] == [f"{on_disk:,}", "1"] and found[2][1] == "-"
  assert tool.main([str(tmp_path), "--arrays", "--step", "1"]) == 0
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  by_name = {row[-1]: row[:-1] for row in rows}
  assert by_name["params/text_proj/kernel"] == [
    "128",
    "float32[8,4]",
    "fsdp=2",
    "-",
  ]
  assert by_name["params/temp"] == ["4", "float32[]"]
  assert by_name["momentum/queue_ptr"] == ["4", "int32[]"]
  assert len(rows) == len(
    jax.tree.leaves(
      (run.abstract.params, run.abstract.opt_state, run.abstract.momentum)
    )
  )


def test_equal_runs_have_equal_digests_on_any_mesh(tool, capsys, tmp_path):
  for name, sizes in {"a": (2, 2, 2), "b": (1, 1, 1)}.items():
    helpers.ToyRun(sizes).save(tmp_path / name, 3, position=8)
  first = digests(tool, capsys, tmp_path / "a")
  assert list(first) == ["params", "momentum", "opt_state", "data"]
  assert all(len(value) == 64 for value in first.values())
  assert digests(tool, capsys, tmp_path / "b") == first


def test_one_bit_changes_only_its_item(tool, capsys, tmp_path):
  run = helpers.ToyRun()
  state = run.make()
  run.save(tmp_path / "a", 3, state, position=8)
  momentum = state.momentum.replace(queue_ptr=state.momentum.queue_ptr ^ 1)
  run.save(tmp_path / "b", 3, state.replace(momentum=momentum), position=9)
  a, b = (digests(tool, capsys, tmp_path / name) for name in "ab")
  assert {item for item in a if a[item] != b[item]} == {"momentum", "data"}


def test_digest_sees_names_types_and_shapes(tool):
  def digest(tree):
    return saved_arrays.digest(tree)

  zeros = {"a": np.zeros(4, np.float32)}
  others = [
    {"b": np.zeros(4, np.float32)},
    {"a": np.zeros(4, np.int32)},
    {"a": np.zeros((2, 2), np.float32)},
    {"a": -np.zeros(4, np.float32)},
  ]
  assert len({digest(tree) for tree in [zeros, *others]}) == 5
  # The order in which a tree was built is no difference.
  pair = {"x": np.ones(1), "y": np.zeros(1)}
  assert digest(pair) == digest(dict(reversed(pair.items())))


def test_task_without_momentum_says_so(tool, capsys, tmp_path):
  run = helpers.ToyRun()
  run.save(tmp_path, 3, run.make().replace(momentum=None))
  assert digests(tool, capsys, tmp_path)["momentum"] == "absent"


def test_step_is_chosen(tool, capsys, tmp_path):
  run = helpers.ToyRun()
  state = run.save(tmp_path, 1)
  run.save(tmp_path, 2, jax.tree.map(lambda x: x + 1, state))
  last = digests(tool, capsys, tmp_path)
  assert digests(tool, capsys, tmp_path, "--step", 2) == last
  first = digests(tool, capsys, tmp_path, "--step", 1)
  assert first["params"] != last["params"]
  assert tool.main([str(tmp_path), "--step", "7"]) == 1
  assert "checkpoints/7 holds no checkpoint" in capsys.readouterr().err


def test_arrays_come_to_the_host_as_they_were(tmp_path):
  state = helpers.ToyRun().save(tmp_path, 1)
  params = saved_arrays.load_to_host(snapshot.find(tmp_path), "params")
  assert isinstance(params["temp"], np.ndarray)
  helpers.assert_same(params, jax.tree.map(jnp.asarray, state.params))


def test_command_line_names_a_foreign_folder(root, tmp_path):
  script = root / "tools" / "inspect_checkpoint.py"
  done = subprocess.run(
    [sys.executable, script, tmp_path],
    cwd=root,
    env={"PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and not done.stdout
  assert f"{tmp_path} holds no checkpoint" in done.stderr


def test_verify_prints_a_line_for_each_step_and_the_best(
  tool, capsys, tmp_path
):
  run = helpers.ToyRun()
  for step in (1, 2):
    run.save(tmp_path, step)
  best.Best(tmp_path, ("val/x",)).update(2, {"a": np.ones(4)}, {"val/x": 1.0})
  steps = [
    tmp_path / name for name in ("checkpoints/1", "checkpoints/2", "best/2")
  ]

  def verify(path=tmp_path):
    status = tool.main([str(path), "--verify"])
    return status, capsys.readouterr().out.splitlines()

  sound = [f"{step}: sound" for step in steps]
  assert verify() == (0, sound)
  assert verify(steps[1]) == (0, sound[1:2])
  (steps[0] / "digests.json").unlink()
  status, lines = verify()
  assert status == 3 and lines[1:] == sound[1:]
  assert lines[0] == f"{steps[0]}: not verified: it has no digests.json"
  (path,) = (steps[2] / "params" / "d").iterdir()
  path.write_bytes(path.read_bytes()[::-1])
  status, lines = verify()
  assert status == 1 and lines[1] == sound[1]
  assert lines[2].startswith(f"{steps[2]}: damaged: params/d/{path.name}: exp")
  assert verify(tmp_path / "none") == (
    1,
    [f"{tmp_path}/none holds no checkpoint"],
  )
