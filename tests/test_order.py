"""The order of rows: epochs, mixtures, rotation."""

import collections

import pytest

from blip_jax.data import order


def _take(count, *args, start=0, **kwargs):
  stream = order.picks(*args, **kwargs)
  return [stream[i] for i in range(start, start + count)]


def _all_rows(*numbered):
  return sorted((n, row) for n, length in numbered for row in range(length))


def test_an_epoch_has_every_row_once_and_the_order_changes():
  sources = [range(7), range(5)]
  rows = _take(36, sources, seed=0)
  epochs = [rows[i : i + 12] for i in range(0, 36, 12)]
  for epoch in epochs:
    assert sorted(epoch) == _all_rows((0, 7), (1, 5))
  assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_on_the_seed_alone():
  sources = [range(50)]
  assert _take(200, sources, seed=3) == _take(200, sources, seed=3)
  runs = {seed: _take(200, sources, seed=seed) for seed in range(4)}
  # No run repeats an epoch of the run with the next seed.
  epochs = [
    tuple(run[i : i + 50]) for run in runs.values() for i in range(0, 200, 50)
  ]
  assert len(set(epochs)) == len(epochs)


def test_any_position_can_be_read_directly():
  sources, kwargs = [range(9)], {"seed": 0, "rotate": [range(4), range(6)]}
  assert (
    _take(50, sources, start=31, **kwargs) == _take(81, sources, **kwargs)[31:]
  )


def test_each_epoch_takes_the_next_split():
  static, splits = [range(3)], [range(4), range(2), range(4)]
  lengths = order.epoch_lengths(static, splits)
  assert lengths == [7, 5, 7]
  rows = iter(_take(2 * sum(lengths), static, seed=1, rotate=splits))
  epochs = [[next(rows) for _ in range(n)] for n in lengths * 2]
  for number, epoch in enumerate(epochs):
    split = number % 3
    expected = _all_rows((0, 3), (1 + split, len(splits[split])))
    assert sorted(epoch) == expected
  # Neither two splits of the same length nor two epochs of one split have the
  # same order.
  split_rows = [
    [(i, row) for i, (n, row) in enumerate(epoch) if n > 0] for epoch in epochs
  ]
  assert split_rows[0] != split_rows[2]
  assert epochs[0] != epochs[3]


def test_splits_rotate_without_other_sources():
  rows = _take(5, [], seed=0, rotate=[range(2), range(3)])
  assert sorted(rows[:2]) == _all_rows((0, 2))
  assert sorted(rows[2:]) == _all_rows((1, 3))


@pytest.mark.parametrize(
  "weights, turns",
  [
    ((1, 3), (1, 3)),
    ((0.7, 0.3), (7, 3)),
    ((0.5, 0.25, 0.25), (2, 1, 1)),
    ((2, 5, 11), (2, 5, 11)),
  ],
)
def test_weights_are_exact_after_every_round(weights, turns):
  sources = [range(11) for _ in weights]
  period = sum(turns)
  rows = _take(20 * period, sources, seed=0, weights=weights)
  for start in range(0, len(rows), period):
    counts = collections.Counter(n for n, _ in rows[start : start + period])
    assert tuple(counts[n] for n in range(len(turns))) == turns
  # Within a round, no source is far from its share either.
  for end in range(1, period + 1):
    counts = collections.Counter(n for n, _ in rows[:end])
    for number, share in enumerate(turns):
      assert abs(counts[number] - share * end / period) <= len(turns)


def test_every_weighted_source_has_its_own_epochs():
  rows = _take(400, [range(10), range(100)], seed=0, weights=(1, 1))
  first = [row for n, row in rows if n == 0]
  for start in range(0, 200, 10):
    assert sorted(first[start : start + 10]) == list(range(10))
  assert sorted(row for n, row in rows if n == 1) == sorted([*range(100)] * 2)


def test_rotating_splits_share_one_weight():
  rows = _take(
    60, [range(5)], seed=0, weights=(1, 2), rotate=[range(4), range(6)]
  )
  turns = [(n, row) for n, row in rows if n > 0]
  assert len(turns) == 40
  for start in range(0, 40, 10):
    assert sorted(turns[start : start + 4]) == _all_rows((1, 4))
    assert sorted(turns[start + 4 : start + 10]) == _all_rows((2, 6))


def test_wrong_weights_are_refused():
  with pytest.raises(ValueError, match=r"expected 3 .* found 2"):
    order.picks([range(2)] * 2, seed=0, weights=(1, 1), rotate=[range(2)])
  with pytest.raises(ValueError, match="positive"):
    order.picks([range(2)] * 2, seed=0, weights=(1, 0))


@pytest.mark.parametrize(
  "weights, turns",
  [
    # Turn k of n is due at (k + 1/2) / n of a round; the first source is first
    # among equals.
    ((1, 1), [0, 1]),
    ((1, 2), [1, 0, 1]),
    ((1, 3), [1, 0, 1, 1]),
    ((2, 1), [0, 1, 0]),
    ((3, 2), [0, 1, 0, 1, 0]),
    ((0.5, 0.25, 0.25), [0, 1, 2, 0]),
  ],
)
def test_the_turns_of_a_round_are_evenly_spread(weights, turns):
  rows = _take(
    2 * len(turns), [range(9) for _ in weights], seed=0, weights=weights
  )
  assert [n for n, _ in rows] == turns * 2


def test_a_tiny_weight_still_gets_a_turn():
  turns = order._Turns((1.0, 1e6))
  assert turns._turns[0] == 1
  assert len(turns._round) <= 10_001
  # Every part's own turns are numbered without a gap.
  rows = [
    row for part, row in map(turns.__getitem__, range(20_002)) if part == 1
  ]
  assert rows == list(range(len(rows)))


def test_rounds_are_no_longer_than_ten_thousand_turns():
  turns = order._Turns((2.0**0.5, 1.0, 3.0**0.5))._turns
  assert 5_000 < sum(turns) <= 10_002
  total = sum(turns)
  for turn, weight in zip(turns, (2**0.5, 1.0, 3**0.5), strict=True):
    share = weight / (2**0.5 + 1 + 3**0.5)
    assert abs(turn / total - share) < 2e-4


def test_lengths_of_epochs():
  assert order.epoch_lengths([range(3), range(4)]) == [7]
  assert order.epoch_lengths([range(3)], [range(1), range(0)]) == [4, 3]
  assert order.epoch_lengths([], [range(2)]) == [2]
