"""Recall@k of image-text retrieval."""

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

  Text retrieval R@k is the share of images with one of their own texts among
  the first k; image retrieval R@k is the share of texts with their image among
  the first k. The names are BLIP's: `txt_r1`, `txt_r5`, `txt_r10` (image to
  text), `img_*` (text to image), their means `txt_r_mean` and `img_r_mean`, and
  `r_mean`, the mean of the two.

  Ties score their expected value under random tie-breaking, so that a model
  with constant scores gets exactly chance. The original breaks ties by argsort,
  where the position of the right answer decides. Without ties the results are
  the same.

  Args:
    sim_i2t: scores of all texts for each image, higher is better.
    sim_t2i: scores of all images for each text; not the transpose after
      re-ranking, which scores each direction's short list separately.
    text_to_image: for each text, the row of its image.

  Raises:
    ValueError: a score is NaN, or an image has no text.
  """
  for name, sim in (("sim_i2t", sim_i2t), ("sim_t2i", sim_t2i)):
    # Comparisons with NaN are false, also those that would rank it low.
    bad = np.asarray(np.isnan(sim).any(axis=1))
    if bad.any():
      raise ValueError(
        f"{name} has NaN in {bad.sum()} of {len(bad)} rows,"
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
    hits = [_hits(row, own) for row, own in zip(sim, right, strict=True)]
    percent = 100 * np.mean(hits, axis=0)
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
  """Returns recall of text-video retrieval, each value under two names.

  `t2v_r1` is the text-to-video recall that papers report, and the original's
  `vid_r1`; `v2t_r1` is video to text, the original's `txt_r1`. `t2v_mdR`
  (`vid_mdR`) is the median rank of a text's video.
  """
  scores = {}
  for name, value in recall(sim_v2t, sim_t2v, text_to_video).items():
    direction, _, metric = name.partition("_")
    original, paper = {"txt": ("txt", "v2t"), "img": ("vid", "t2v")}.get(
      direction, (direction, direction)
    )
    scores |= {f"{original}_{metric}": value, f"{paper}_{metric}": value}
  own = np.take_along_axis(sim_t2v, text_to_video[:, None], axis=1)
  above, tied = (sim_t2v > own).sum(axis=1), (sim_t2v == own).sum(axis=1)
  # Among ties, the expected rank under random tie-breaking.
  median = float(np.median(above + (tied + 1) / 2))
  return {**scores, "vid_mdR": median, "t2v_mdR": median}


def _hits(
  scores: Float[np.ndarray, "K"], right: list[int]
) -> tuple[float, ...]:
  """Probability that a right candidate is among the first k, per k in `KS`."""
  own = scores[right]
  best = own.max()
  above = np.count_nonzero(scores > best)
  tied = np.count_nonzero(scores == best)
  tied_wrong = tied - np.count_nonzero(own == best)
  chances = []
  for k in KS:
    places = min(max(k - above, 0), tied)  # among the first k, for tied ones
    missed = math.comb(tied_wrong, places) / math.comb(tied, places)
    chances.append(1 - missed)
  return tuple(chances)
