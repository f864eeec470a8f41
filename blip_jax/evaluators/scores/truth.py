"""Scores of statements that are predicted to be true or false, as NLVR2's."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Scores(NamedTuple):
  """Scores of predictions.

  Attributes:
    loss: mean cross-entropy.
    accuracy: share of right predictions, in percent.
    consistency: share of groups without a wrong prediction, in percent.
  """

  loss: float
  accuracy: float
  consistency: float


def score(
  logits: Float[np.ndarray, "n 2"],
  labels: Bool[np.ndarray, "n"],
  groups: Sequence[Hashable],
) -> Scores:
  """Scores predictions.

  Args:
    logits: of (false, true); equal ones predict false.
    labels: whether each statement is true.
    groups: what each prediction has in common with those about the same
      statement.
  """
  false, true = logits.astype(np.float64).T
  # How much the other answer's logit is above that of the label.
  margin = np.where(labels, false - true, true - false)
  right = (true > false) == labels
  is_consistent: dict[Hashable, bool] = {}
  for group, is_right in zip(groups, right.tolist(), strict=True):
    is_consistent[group] = is_consistent.get(group, True) and is_right
  return Scores(
    float(np.logaddexp(0, margin).mean()),
    100 * float(right.mean()),
    100 * float(np.mean([*is_consistent.values()])),
  )
