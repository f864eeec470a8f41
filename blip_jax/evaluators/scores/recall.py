"""Recall at k of image-text retrieval."""

import math

import numpy as np
from jaxtyping import Float, Int

KS = (1, 5, 10)


def recall(
  sim_i2t: Float[np.ndarray, "N M"],
  sim_t2i: Float[np.ndarray, "M N"],
  text_to_image: Int[np.ndarray, "M"],
) -> dict[str, float]:
  """Returns R@1, R@5 and R@10 in both directions, in percent.

  An image counts as found within k if the best ranked of its own texts is
  among the first k, a text if its image is. The keys are BLIP's: `txt_r1`,
  `txt_r5`, `txt_r10` (image to text), `img_*` (text to image), their means
  `txt_r_mean`, `img_r_mean`, and `r_mean`, the mean of the two.

  Ties count what an ordering of the tied candidates by lot would give on
  average, so a model that scores everything alike gets exactly chance. The
  original breaks ties by argsort, where the place of the right answer in the
  list decides. Without ties the figures are the same.

  Args:
    sim_i2t: scores of all texts for each image, higher is better.
    sim_t2i: scores of all images for each text. Not always the transpose:
      re-ranking scores each direction's shortlist by itself.
    text_to_image: row of the image that each text belongs to.

  Raises:
    ValueError: if a score is NaN or an image has no text.
  """
  for name, sim in (("sim_i2t", sim_i2t), ("sim_t2i", sim_t2i)):
    # A NaN loses every comparison, also those that would rank it low.
    if (bad := np.isnan(sim).any(axis=1)).any():
      raise ValueError(
        f"{name} holds NaN in {bad.sum()} of {len(bad)} rows,"
        f" first in row {bad.argmax()}."
      )
  image_of = text_to_image.tolist()
  texts_of = [[] for _ in sim_i2t]
  for text, image in enumerate(image_of):
    texts_of[image].append(text)
  if not all(texts_of):
    raise ValueError(
      f"Image {texts_of.index([])} has no text among the {len(image_of)},"
      " so its rank is undefined."
    )
  scores = {}
  for direction, sim, right in (
    ("txt", sim_i2t, texts_of),
    ("img", sim_t2i, [[image] for image in image_of]),
  ):
    found = [_found(row, own) for row, own in zip(sim, right, strict=True)]
    percent = 100 * np.mean(found, axis=0)
    for k, value in zip(KS, percent, strict=True):
      scores[f"{direction}_r{k}"] = float(value)
    scores[f"{direction}_r_mean"] = float(percent.mean())
  scores["r_mean"] = (scores["txt_r_mean"] + scores["img_r_mean"]) / 2
  return scores


def video_recall(
  sim_v2t: Float[np.ndarray, "N M"],
  sim_t2v: Float[np.ndarray, "M N"],
  text_to_video: Int[np.ndarray, "M"],
) -> dict[str, float]:
  """Recall of videos, under two names each, and the median rank of a text's.

  `t2v_r1` is what papers report: text to video. The original calls it `vid_r1`,
  and `txt_r1` what is `v2t_r1` here: video to text. `vid_mdR` is `t2v_mdR`.
  """
  scores = {}
  for name, value in recall(sim_v2t, sim_t2v, text_to_video).items():
    direction, _, metric = name.partition("_")
    theirs, ours = {"txt": ("txt", "v2t"), "img": ("vid", "t2v")}.get(
      direction, (direction, direction)
    )
    scores |= {f"{theirs}_{metric}": value, f"{ours}_{metric}": value}
  own = np.take_along_axis(sim_t2v, text_to_video[:, None], axis=1)
  above, tied = (sim_t2v > own).sum(axis=1), (sim_t2v == own).sum(axis=1)
  # Among equals, the place that a lot would give on average.
  median = float(np.median(above + (tied + 1) / 2))
  return {**scores, "vid_mdR": median, "t2v_mdR": median}


def _found(
  scores: Float[np.ndarray, "K"], right: list[int]
) -> tuple[float, ...]:
  """Chance that a right candidate is among the first k, for each of `KS`."""
  own = scores[right]
  best = own.max()
  above = np.count_nonzero(scores > best)
  tied = np.count_nonzero(scores == best)
  tied_wrong = tied - np.count_nonzero(own == best)
  chances = []
  for k in KS:
    places = min(max(k - above, 0), tied)  # of the first k, left to the tied
    missed = math.comb(tied_wrong, places) / math.comb(tied, places)
    chances.append(1 - missed)
  return tuple(chances)
