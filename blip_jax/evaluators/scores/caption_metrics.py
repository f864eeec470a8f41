"""All scores of captions against those that people wrote."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

from blip_jax.evaluators.scores import bleu, cider, java, ptb, rouge

ImageId = Hashable


@dataclasses.dataclass(frozen=True)
class Scores:
  """The official names and scales: CIDEr 1.333 is what papers call 133.3.

  `total` has the value of all images by metric, `per_image` the values of each
  image by metric. Those of BLEU and METEOR are no means of these.
  """

  total: dict[str, float]
  per_image: dict[ImageId, dict[str, float]]


def score(
  results: Mapping[ImageId, str],
  references: Mapping[ImageId, Sequence[str]],
  java_metrics: Sequence[str] = (),
) -> Scores:
  """Scores a caption of each image by `Bleu_1` .. `Bleu_4`, `ROUGE_L`, `CIDEr`.

  The values are those of the official pycocoevalcap, from raw captions on.
  Images without a result are left aside, and change no score: what is rare to
  CIDEr is decided by the references of the images that are scored.

  Args:
    results: a caption for each image.
    references: the right captions of each of these images, maybe of others.
    java_metrics: of `java.METRICS`, those to be had besides. They are slow, and
      need Java and the extra [coco].

  Raises:
    ValueError: if there are no results, if an image lacks references, or if
      Java or pycocoevalcap is missing that a metric needs.
  """
  _check(results, references)
  java.check(java_metrics)
  candidates = ptb.tokenize_lines(results.values())
  others = _tokenize([references[image_id] for image_id in results])

  bleu_total, bleu_each = bleu.bleu(candidates, others)
  values = {
    f"Bleu_{n}": (total, each)
    for n, (total, each) in enumerate(
      zip(bleu_total, bleu_each.T, strict=True), start=1
    )
  }
  values["ROUGE_L"] = rouge.rouge_l(candidates, others)
  values["CIDEr"] = cider.cider_d(candidates, others)
  for name in java_metrics:
    values[name] = java.METRICS[name](candidates, others)
  return Scores(
    total={name: float(total) for name, (total, _) in values.items()},
    per_image={
      image_id: {name: float(each[i]) for name, (_, each) in values.items()}
      for i, image_id in enumerate(results)
    },
  )


def _tokenize(references: list[Sequence[str]]) -> list[list[str]]:
  lines = iter(
    ptb.tokenize_lines(text for texts in references for text in texts)
  )
  return [[next(lines) for _ in texts] for texts in references]


def _check(
  results: Mapping[ImageId, str], references: Mapping[ImageId, Sequence[str]]
) -> None:
  if not results:
    raise ValueError("There are no results: expected a caption of an image.")
  lacking = [image_id for image_id in results if not references.get(image_id)]
  if lacking:
    raise ValueError(
      f"The references have no caption for {len(lacking)} of the"
      f" {len(results)} images in the results: {_some(lacking)}. The references"
      f" have {len(references)} images: {_some(list(references))}. Are both of"
      " the same split, and their ids of the same kind?"
    )
  for image_id in results:
    if isinstance(references[image_id], str):
      raise ValueError(
        f"References of image {image_id!r}: expected a list of captions, found"
        f" the text {references[image_id]!r:.80}; put it in a list."
      )


def _some(image_ids: list[ImageId]) -> str:
  shown = ", ".join(repr(image_id) for image_id in image_ids[:3])
  return shown + (", ..." if len(image_ids) > 3 else "")
