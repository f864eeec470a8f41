"""Which row comes when: shuffles, mixtures and rotation, without any reading.

BLIP concatenates its sets and shuffles them anew each epoch, and of LAION each
epoch sees another split. Here that is an endless sequence of (source, row),
open at any position, that depends on the seed alone.
"""

import fractions
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

# Weights become whole numbers of turns in a round of at most about this many.
_MAX_TURNS = 10_000


def epoch_lengths(
  sources: Sequence[Any], rotate: Sequence[Any] = ()
) -> list[int]:
  """Return rows per epoch, one number for each split that takes turns."""
  static = sum(len(source) for source in sources)
  return [static + len(split) for split in rotate] or [static]


def picks(
  sources: Sequence[Any],
  *,
  seed: int,
  weights: Sequence[float | int] = (),
  rotate: Sequence[Any] = (),
) -> grain.MapDataset:
  """Return the endless stream of (source, row), shuffled anew every epoch.

  Without weights an epoch is all of `sources` and one split of `rotate`, each
  row once: large sets dominate, as in BLIP. With weights, one per source and
  one more for all of `rotate` together, rows come in exactly that ratio and
  every source has epochs of its own. Sources are numbered in the order
  (*sources, *rotate).
  """
  rows = [
    grain.MapDataset.range(len(source)).map(functools.partial(_pick, number))
    for number, source in enumerate((*sources, *rotate))
  ]
  static, splits = rows[: len(sources)], rows[len(sources) :]
  # Adjacent seeds would not do: grain shuffles epoch e by seed + e, so one
  # run would repeat another's epochs, and one split another split's order.
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
  # Repeating reseeds each shuffle by how often its epoch has come round.
  return grain.MapDataset.concatenate(shuffled).repeat(None)


class _Turns(grain.transforms.DatasetSelectionMap):
  """Whose turn it is, in ratios that are exact after every round.

  (grain's own `mix` rounds weights to multiples of a hundredth of the smallest:
  of 0.7 and 0.3 it makes 233 and 100.)
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
    rounds, place = divmod(index, len(self._round))
    part, turn = self._round[place]
    return part, rounds * self._turns[part] + turn
