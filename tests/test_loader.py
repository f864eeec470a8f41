"""The input pipeline: the rows of each batch, resuming, unusable rows."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from blip_jax.data import examples, loader, rejects, sources, transforms


@dataclasses.dataclass(frozen=True)
class Rows:
  """A source of `num` rows.

  Rows of `bad` cannot become examples; those of `broken` cannot be read.
  """

  num: int
  name: str = "rows"
  bad: tuple[int, ...] = ()
  broken: tuple[int, ...] = ()

  def __len__(self):
    return self.num

  def __getitem__(self, row):
    id = f"{self.name}:{row}"
    if row in self.broken:
      raise sources.BadRow(id, "broken_row", "of the source")
    return {"image": row, "caption": "bad" if row in self.bad else "", "id": id}


class _Example(examples.Stacked):
  """The number of a row, a random number and an image."""

  def __call__(self, record, rng):
    if record["caption"]:
      raise transforms.BadSample("truncated", "of the example")
    row, number = np.int64(record["image"]), rng.integers(1 << 30)
    return {"row": row, "random": number, "image": IMAGE}

  def blank(self):
    return {"row": np.int64(0), "random": 0, "image": np.zeros_like(IMAGE)}


example = _Example()


# Large enough to be sent through shared memory.
IMAGE = np.full((64, 64, 3), 7, np.uint8)


def _loader(source, **kwargs):
  settings = {"batch_size": 4, "seed": 0, "num_threads": 2} | kwargs
  rows = source if isinstance(source, list) else [source]
  return loader.train_loader(rows, example, **settings)


def _tolerant():
  return rejects.BadSamples(max_fraction=0.9)


def _take(batches, count):
  return [
    (ids, arrays["random"].tolist())
    for arrays, ids in itertools.islice(batches, count)
  ]


def _run(count, source, **kwargs):
  batches = _loader(source, **kwargs)
  taken = _take(batches, count)
  batches.close()
  return taken


def test_a_batch_is_stacked_arrays_and_ids():
  batches = _loader(Rows(10))
  arrays, ids = next(batches)
  assert ids == [f"rows:{row}" for row in arrays["row"]]
  assert arrays["image"].shape == (4, 64, 64, 3)
  np.testing.assert_array_equal(arrays["image"], 7)
  assert arrays["valid"].tolist() == [True] * 4
  batches.close()


def test_batches_depend_on_the_seed_alone():
  source = Rows(10)
  runs = [_run(8, source, num_threads=n) for n in (0, 1, 4)]
  assert runs[0] == runs[1] == runs[2]
  assert runs[0] != _run(8, source, seed=1)


def test_each_visit_of_a_row_has_new_random_numbers():
  samples = {}
  for ids, numbers in _run(10, Rows(4)):
    for id, number in zip(ids, numbers, strict=True):
      samples.setdefault(id, set()).add(number)
  assert [len(samples[f"rows:{row}"]) for row in range(4)] == [10] * 4


def test_neither_worker_processes_nor_resuming_change_the_batches():
  source = [Rows(9, "a", bad=(1, 5), broken=(2,)), Rows(4, "b")]
  kwargs = {"rotate": [Rows(3, "c"), Rows(5, "d")]}
  expected = _run(12, source, bad_samples=_tolerant(), **kwargs)

  threads = _loader(source, bad_samples=_tolerant(), **kwargs)
  assert _take(threads, 3) == expected[:3]
  state = json.loads(json.dumps(threads.get_state()))
  workers = _loader(source, bad_samples=_tolerant(), num_workers=2, **kwargs)
  workers.set_state(state)
  assert _take(workers, 5) == expected[3:8]
  threads.set_state(workers.get_state())
  assert _take(threads, 4) == expected[8:]
  workers.close()
  threads.close()


def test_a_state_can_be_set_at_any_time():
  batches = _loader(Rows(9, bad=(2,)), bad_samples=_tolerant())
  first = _take(batches, 2)
  state = batches.get_state()
  expected = _take(batches, 4)
  batches.set_state(state)
  assert _take(batches, 4) == expected
  batches.set_state({**state, "next_index": 0})
  assert _take(batches, 2) == first
  batches.close()


def test_a_closed_iterator_says_so():
  batches = _loader(Rows(9))
  batches.close()
  batches.close()
  with pytest.raises(ValueError, match="closed"):
    next(batches)


def test_orbax_saves_and_restores_the_position(tmp_path):
  from orbax.checkpoint import v1 as ocp

  batches = _loader(Rows(9, bad=(3,)), bad_samples=_tolerant())
  _take(batches, 3)
  ocp.save_checkpointables(tmp_path / "0", {"data": batches})
  expected = _take(batches, 3)
  batches.close()
  restored = _loader(Rows(9, bad=(3,)), bad_samples=_tolerant())
  ocp.load_checkpointables(tmp_path / "0", {"data": restored})
  assert _take(restored, 3) == expected
  restored.close()


def _processes(source, count, **kwargs):
  """The loaders of all processes, with global batches of 12."""
  return [
    _loader(
      source,
      batch_size=12 // count,
      process_index=i,
      process_count=count,
      bad_samples=_tolerant(),
      **kwargs,
    )
    for i in range(count)
  ]


def _global_batches(processes, count):
  """Rows of global batches, in order, with their random numbers."""
  parts = [_take(one, count) for one in processes]
  return [
    [pair for part in parts for pair in zip(*part[step], strict=True)]
    for step in range(count)
  ]


def _go_on(processes, others):
  """Sets others to where the first are, which are closed."""
  states = [json.loads(json.dumps(one.get_state())) for one in processes]
  for one in processes:
    one.close()
  for other in others:
    other.set_state({"processes": states})
  return others


def test_processes_share_each_global_batch():
  source = [Rows(35)]  # that 2, 3 and 12 do not divide
  alone, *others = (
    _global_batches(_processes(source, count), 6) for count in (1, 2, 3)
  )
  assert others == [alone, alone]
  ids = [id for batch in alone for id, _ in batch]
  assert len(set(ids[:24])) == 24, "disjoint within an epoch"


@pytest.mark.parametrize("counts", [(2, 1, 4), (1, 4, 2), (4, 2, 3, 1)])
def test_another_number_of_processes_goes_on_with_the_same_batches(counts):
  source = [Rows(50)]
  alone = _global_batches(_processes(source, 1), 3 * len(counts))
  loaders = _processes(source, counts[0])
  found = _global_batches(loaders, 3)
  for count in counts[1:]:
    loaders = _go_on(loaders, _processes(source, count))
    found += _global_batches(loaders, 3)
  assert found == alone


@pytest.mark.parametrize("counts", [(4, 2, 3, 1, 6), (2, 4, 1), (3, 3, 2)])
def test_unusable_rows_neither_lose_nor_repeat_others(counts):
  """Most are of one process, so that it is far ahead of the others."""
  num_rows = 12 * 5 * len(counts)
  order = [id for batch, _ in _run(60, Rows(num_rows)) for id in batch]
  bad = {int(id.partition(":")[2]) for id in order[:20:2] + order[60:70]}
  source = Rows(num_rows, bad=bad)
  loaders, found = [], []
  for count in counts:
    others = _processes(source, count)
    loaders = _go_on(loaders, others) if loaders else others
    # Stopped and resumed as they are, they go on, too.
    found += _global_batches(loaders, 2)
    loaders = _go_on(loaders, _processes(source, count))
    found += _global_batches(loaders, 1)
  ids = [id for batch in found for id, _ in batch]
  assert len(set(ids)) == len(ids) == 36 * len(counts)
  # What is left comes next, and completes the epoch.
  (alone,) = _go_on(loaders, _processes(source, 1))
  left = num_rows - len(bad) - len(ids)
  ids += [id for batch, _ in _take(alone, -(-left // 12)) for id in batch]
  alone.close()
  expected = {f"rows:{row}" for row in range(num_rows)} - {
    f"rows:{row}" for row in bad
  }
  assert set(ids[: num_rows - len(bad)]) == expected


def test_another_batch_size_goes_on_with_the_next_row():
  alone = [
    id
    for batch in _global_batches(_processes([Rows(50)], 1), 5)
    for id, _ in batch
  ]
  loaders = _processes([Rows(50)], 2)
  _global_batches(loaders, 2)
  larger = _loader([Rows(50)], batch_size=18)
  (larger,) = _go_on(loaders, [larger])
  ((ids, _), *_) = _take(larger, 1)
  assert ids == alone[24:42]
  larger.close()


def test_positions_of_earlier_versions_are_understood():
  """Processes took single rows in turns, and all started at 0."""
  (batches,) = _processes([Rows(50)], 1)
  alone = [id for ids, _ in _take(batches, 4) for id in ids]
  old = {"next_index": 5, "process_count": 2, "num_rows": 50}
  batches.set_state({"processes": [old, {**old, "next_index": 6}]})
  ((ids, _), *_) = _take(batches, 1)
  assert ids == [alone[10], *alone[12:23]]
  batches.close()


def test_positions_of_all_processes_are_needed():
  loaders = _processes([Rows(50)], 2)
  with pytest.raises(ValueError, match="positions of 2 processes, found 1"):
    loaders[0].set_state(loaders[0].get_state())
  for one in loaders:
    one.close()


def test_weights_set_the_share_of_each_source():
  batches = _run(20, [Rows(3, "a"), Rows(50, "b")], weights=(1, 3))
  for ids, _ in batches:
    assert sum(id.startswith("a") for id in ids) == 1


def test_sources_without_rows_are_refused():
  with pytest.raises(ValueError, match="nothing to train on"):
    _loader([])


def test_bad_samples_are_skipped_counted_and_listed_once(tmp_path):
  path = tmp_path / "bad_samples.jsonl"
  source = Rows(10, bad=(2, 7), broken=(4,))
  for _ in range(2):  # the second run reads the list of the first
    bad = rejects.BadSamples(path, max_fraction=0.5)
    batches = _run(7, source, bad_samples=bad)
    seen = [id for ids, _ in batches for id in ids]
    assert not {"rows:2", "rows:7", "rows:4"} & set(seen)
    assert bad.seen == len(seen) + bad.reasons.total()
    epochs = bad.seen // 10
    assert epochs <= bad.reasons["broken_row"] <= epochs + 1
    assert 2 * epochs <= bad.reasons["truncated"] <= 2 * epochs + 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(rows, key=lambda row: row["id"]) == [
      {"id": "rows:2", "reason": "truncated", "detail": "of the example"},
      {"id": "rows:4", "reason": "broken_row", "detail": "of the source"},
      {"id": "rows:7", "reason": "truncated", "detail": "of the example"},
    ]


def test_too_many_bad_samples_end_the_run(tmp_path):
  path = tmp_path / "bad_samples.jsonl"
  bad = rejects.BadSamples(path, max_fraction=0.1, min_seen=30)
  batches = _loader(Rows(10, bad=(2, 7), broken=(4,)), bad_samples=bad)
  with pytest.raises(ValueError) as error:
    _take(batches, 100)
  batches.close()
  message = str(error.value)
  assert bad.seen == 30
  assert "9 of 30 rows" in message and "30.0%, allowed 10.0%" in message
  assert "truncated 6, broken_row 3" in message
  assert str(path) in message and "config.data.max_bad_fraction" in message


class Fails(_Example):
  """Raises what no one expected, for rows from `start` on."""

  def __init__(self, start):
    self.start = start

  def __call__(self, record, rng):
    if record["image"] >= self.start:
      raise KeyError("size")
    return super().__call__(record, rng)


def test_an_unexpected_error_costs_its_row(tmp_path):
  path = tmp_path / "bad_samples.jsonl"
  bad = rejects.BadSamples(path, max_fraction=0.2, min_seen=100)
  batches = loader.train_loader(
    [Rows(10)], Fails(9), batch_size=4, seed=0, bad_samples=bad
  )
  seen = [int(row) for _ in range(6) for row in next(batches)[0]["row"]]
  batches.close()
  assert set(seen) == set(range(9))
  (line,) = map(json.loads, path.read_text().splitlines())
  assert line["id"] == "rows:9" and line["reason"] == "error"
  assert line["detail"] == "KeyError: 'size'"


def test_an_error_of_every_row_ends_the_run():
  bad = rejects.BadSamples(None, max_fraction=0.2, min_seen=30)
  batches = loader.train_loader(
    [Rows(10)], Fails(0), batch_size=4, seed=0, bad_samples=bad
  )
  with pytest.raises(ValueError, match=r"30 of 30 rows.*error 30"):
    next(batches)
  batches.close()


def _evaluate(source, processes, batch_size, **kwargs):
  shards = [
    loader.eval_loader(
      source,
      example,
      batch_size,
      process_index=i,
      process_count=processes,
      **kwargs,
    )
    for i in range(processes)
  ]
  assert len({len(shard) for shard in shards}) == 1
  batches = [list(shard) for shard in shards]
  assert all(len(batch) == len(shards[0]) for batch in batches)
  # In order of global batches, each with a block from every process.
  return [pair for step in zip(*batches, strict=True) for pair in step]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("num", [1, 8, 11, 13])
def test_evaluation_sees_every_row_once_and_in_order(processes, num):
  batches = _evaluate(Rows(num), processes, batch_size=4)
  ids = [id for _, ids in batches for id in ids]
  valid = np.concatenate([arrays["valid"] for arrays, _ in batches])
  rows = np.concatenate([arrays["row"] for arrays, _ in batches])
  assert ids[:num] == [f"rows:{row}" for row in range(num)]
  assert set(ids[num:]) <= {""}
  assert valid.tolist() == [position < num for position in range(len(ids))]
  assert rows[:num].tolist() == list(range(num)) and not rows[num:].any()
  assert all(a["image"].shape == (4, 64, 64, 3) for a, _ in batches)


def test_random_numbers_in_evaluation_depend_on_the_row_alone():
  def numbers(processes, batch_size):
    batches = _evaluate(Rows(9), processes, batch_size)
    samples = np.concatenate([arrays["random"] for arrays, _ in batches])
    return samples[:9].tolist()

  assert numbers(1, 4) == numbers(2, 3) == numbers(1, 1)


def test_bad_rows_keep_their_position_in_evaluation(tmp_path):
  path = tmp_path / "bad_samples.jsonl"
  source = Rows(10, bad=(0, 7), broken=(4,))
  bad = rejects.BadSamples(path, max_fraction=0.5)
  batches = list(loader.eval_loader(source, example, 4, bad_samples=bad))
  ids = [id for _, ids in batches for id in ids]
  valid = np.concatenate([arrays["valid"] for arrays, _ in batches])
  assert ids == [f"rows:{row}" for row in range(10)] + ["", ""]
  assert np.flatnonzero(~valid).tolist() == [0, 4, 7, 10, 11]
  for arrays, _ in batches:
    assert not arrays["image"][~arrays["valid"]].any()
  assert bad.seen == 10
  assert dict(bad.reasons) == {"truncated": 2, "broken_row": 1}
  assert len(path.read_text().splitlines()) == 3


def test_too_few_good_rows_end_an_evaluation():
  batches = loader.eval_loader(Rows(10, bad=(0, 7)), example, 4)
  with pytest.raises(ValueError, match="2 of 10 rows"):
    list(batches)
  batches = loader.eval_loader(Rows(3, bad=(0, 1, 2)), example, 4)
  with pytest.raises(ValueError, match="3 of 3 rows"):
    list(batches)
