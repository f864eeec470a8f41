"""Helpers of checkpoints: paths, digests, differences, parts."""

import jax
import numpy as np
import pytest
from etils import epath

from blip_jax.runtime import saved_arrays, saved_items, snapshot


def test_twenty_lines_are_shown_and_the_others_counted():
  lines = [f"line {n}" for n in range(22)]
  assert saved_arrays.first_lines(lines[:20]) == "\n".join(lines[:20])
  shown = saved_arrays.first_lines(lines[:21]).split("\n")
  assert shown == [*lines[:20], "   ... and 1 more"]
  assert saved_arrays.first_lines(lines, 1) == "line 0\n   ... and 21 more"
  assert saved_arrays.first_lines([]) == ""


def array(*shape, dtype="float32"):
  return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def test_differences_of_names_shapes_and_dtypes():
  saved = {"a": array(2), "b": array(2), "c": array(2), "x": array(1)}
  expected = {"a": array(2), "b": array(3), "d": array(1)}
  expected["c"] = array(2, dtype="int32")
  assert saved_arrays.differences(saved, expected) == [
    " - d",
    " + x",
    "   b: checkpoint float32[2], config float32[3]",
    "   c: checkpoint float32[2], config int32[2]",
  ]
  assert saved_arrays.differences(saved, saved) == []


def test_a_digest_depends_on_paths_types_shapes_and_bytes():
  tree = {"a": np.arange(6, dtype=np.int32), "b": {"c": np.ones(2)}}
  same = {"b": {"c": np.ones(2)}, "a": tree["a"].copy()}
  digest = saved_arrays.digest(tree)
  assert saved_arrays.digest(same) == digest
  for other in (
    {**tree, "a": tree["a"].astype(np.uint32)},
    {**tree, "a": tree["a"].reshape(2, 3)},
    {**tree, "a": tree["a"][::-1]},
    {"a": tree["a"], "b": {"d": np.ones(2)}},
  ):
    assert saved_arrays.digest(other) != digest


@pytest.mark.parametrize(
  "sizes, parts",
  [
    ([1, 1], [[0, 1]]),
    ([2, 1], [[0], [1]]),  # exactly full, then one more
    ([1, 2], [[0], [1]]),
    ([3, 1, 1, 1], [[0], [1, 2], [3]]),
    ([1, 3, 1], [[0], [1], [2]]),
    ([2], [[0]]),
    ([], []),
  ],
)
def test_arrays_are_read_in_parts(monkeypatch, sizes, parts):
  """Parts of two arrays of 4 bytes at most, but for a larger array."""
  monkeypatch.setattr(saved_arrays, "PART_BYTES", 8)
  leaves = {str(n): array(size) for n, size in enumerate(sizes)}
  found = saved_arrays._parts(leaves)
  assert found == [[str(n) for n in part] for part in parts]


def test_steps_are_folders_whose_name_is_a_number(tmp_path):
  for name in ("3", "12", "0", "7.tmp", "x", "-1"):
    (tmp_path / name).mkdir()
  assert sorted(snapshot.steps(epath.Path(tmp_path))) == [0, 3, 12]
  assert snapshot.steps(epath.Path(tmp_path / "none")) == []


def test_the_latest_step_of_a_run_is_found_by_number(tmp_path):
  for step in (2, 9, 10):
    (tmp_path / "checkpoints" / str(step) / "params").mkdir(parents=True)
  steps = tmp_path / "checkpoints"
  for path in (tmp_path, steps, steps / "10"):
    assert snapshot.holds_one(path)
    assert str(snapshot.find(path)) == str(steps / "10")
  assert str(snapshot.find(steps / "2")) == str(steps / "2")
  assert not snapshot.holds_one(tmp_path.parent / "other")
  (tmp_path / "empty" / "3").mkdir(parents=True)
  assert not snapshot.holds_one(tmp_path / "empty")


def test_paths_and_trees():
  tree = {"a": {"b": 1, "c": 2}, "d": 3}
  leaves = {"a/b": 1, "a/c": 2, "d": 3}
  assert saved_arrays.by_path(tree) == leaves
  assert saved_arrays.nested(leaves) == tree


def test_each_process_has_a_file():
  assert saved_items.process_file() == "process_0-of-1.json"
