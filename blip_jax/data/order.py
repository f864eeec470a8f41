"""The order of rows: shuffling, mixing and rotating sources; reads no data.

BLIP concatenates its data sets and reshuffles them every epoch; of LAION, each
epoch uses the next split. Here this is an endless sequence of (source, row)
with random access, which depends only on the seed.
"""

import fractions
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

# Weights become integer numbers of turns in a round of about this length at
# most.
_MAX_TURNS = 10_000


def epoch_lengths(
  sources: Sequence[Any], rotate: Sequence[Any] = ()
) -> list[int]:
  """Returns rows per epoch, one number for each of the rotating splits."""
  static = sum(len(source) for source in sources)
  return [static + len(split) for split in rotate] or [static]


def picks(
  sources: Sequence[Any],
  *,
  seed: int,
  weights: Sequence[float | int] = (),
  rotate: Sequence[Any] = (),
) -> grain.MapDataset:
  """Returns the endless stream of (source, row), reshuffled every epoch.

  Without weights, an epoch has every row of all `sources` and of one split of
  `rotate` once, so large sources dominate, as in BLIP. With weights, rows come
  in exactly that ratio and every source has its own epochs.

  Args:
    sources: only their lengths matter here.
    seed: of all shuffles.
    weights: one per source, and one more for all of `rotate` together.
    rotate: splits of which each epoch uses the next one (paper, section 4.1).

  Returns:
    Pairs (source, row); sources are numbered in the order (*sources, *rotate).

  Raises:
    ValueError: the number of weights is wrong, or one is not positive.
  """
  rows = [
    grain.MapDataset.range(len(source)).map(functools.partial(_pick, number))
    for number, source in enumerate((*sources, *rotate))
  ]
  static, splits = rows[: len(sources)], rows[len(sources) :]
  # Adjacent seeds would not be independent: grain shuffles epoch e by
  # seed + e, so a run would repeat the epochs of the run with the next seed,
  # and a split the order of another split.
  seeds = np.random.SeedSequence(seed).generate_state(len(rows)).tolist()
  if not weights:
    epochs = [[*static, split] for split in splits] or [static]
    return _endless(epochs, seeds)
  parts = [
    _endless([[part]], [s]) for part, s in zip(static, seeds, strict=False)
  ]
  if splits:
    parts.append(_endless([[split] for split in splits], seeds[len(static) :]))
  if len(weights) != len(parts):
    raise ValueError(
      f"config.data.weights: expected {len(parts)} (one per source, and one "
      f"for the rotating splits if any), found {len(weights)}."
    )
  return grain.MapDataset.select_from_datasets(parts, _Turns(weights))


def _pick(source: int, row: int) -> tuple[int, int]:
  return source, row


def _endless(
  epochs: Sequence[Sequence[grain.MapDataset]], seeds: Sequence[int]
) -> grain.MapDataset:
  shuffled = [
    grain.MapDataset.concatenate(parts).shuffle(seed=seed)
    for parts, seed in zip(epochs, seeds, strict=False)
  ]
  # `repeat` reseeds each shuffle with the number of repetitions so far.
  return grain.MapDataset.concatenate(shuffled).repeat(None)


class _Turns(grain.transforms.DatasetSelectionMap):
  """Interleaves sources in ratios that are exact after every round.

  (grain's `mix` rounds weights to multiples of a hundredth of the smallest
  one: 0.7 and 0.3 become 233 and 100.)
  """

  def __init__(self, weights: Sequence[float | int]):
    if not all(weight > 0 for weight in weights):
      raise ValueError(
        f"config.data.weights: expected positive numbers, found {weights}."
      )
    total = sum(weights)
    shares = [
      fractions.Fraction(weight / total).limit_denominator(_MAX_TURNS)
      for weight in weights
    ]
    common = math.lcm(*(share.denominator for share in shares))
    common = min(common, _MAX_TURNS)
    self._turns = [max(1, round(share * common)) for share in shares]
    # Turn k of n is due at (k + 1/2) / n of a round.
    due = [
      ((turn + 0.5) / turns, part, turn)
      for part, turns in enumerate(self._turns)
      for turn in range(turns)
    ]
    self._round = [(part, turn) for _, part, turn in sorted(due)]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[int, int]:
    rounds, position = divmod(index, len(self._round))
    part, turn = self._round[position]
    return part, rounds * self._turns[part] + turn
