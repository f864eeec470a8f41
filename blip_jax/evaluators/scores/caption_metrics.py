"""All metrics of captions, compared with reference captions."""

import dataclasses
from collections.abc import Mapping, Sequence

from blip_jax.evaluators.scores import (
  bleu,
  cider,
  image_names,
  java,
  ptb,
  rouge,
)

ImageId = image_names.ImageId


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores by the official names and scales: CIDEr 1.333 is 133.3 in papers.

  Attributes:
    total: metric -> score of the corpus; for BLEU and METEOR, this is not the
      mean over images.
    per_image: image id -> metric -> score.
  """

  total: dict[str, float]
  per_image: dict[ImageId, dict[str, float]]


def score(
  results: Mapping[ImageId, str],
  references: Mapping[ImageId, Sequence[str]],
  java_metrics: Sequence[str] = (),
) -> Scores:
  """Scores captions by `Bleu_1` .. `Bleu_4`, `ROUGE_L` and `CIDEr`.

  The scores equal those of the official pycocoevalcap, for raw captions.
  References of images without a result are ignored: n-gram rarity in CIDEr is
  computed from the images that are scored.

  Args:
    results: a caption for each image.
    references: reference captions of at least these images.
    java_metrics: names in `java.METRICS` to compute too. They are slow, and
      need Java and the extra [coco].

  Raises:
    ValueError: there are no results, an image has no references, or a metric
      needs Java or pycocoevalcap, which is not installed.
  """
  _check(results, references)
  java.check(java_metrics)
  candidates = ptb.tokenize_lines(results.values())
  truths = _tokenize([references[image_id] for image_id in results])

  bleu_total, bleu_each = bleu.bleu(candidates, truths)
  values = {
    f"Bleu_{n}": (total, each)
    for n, (total, each) in enumerate(
      zip(bleu_total, bleu_each.T, strict=True), start=1
    )
  }
  values["ROUGE_L"] = rouge.rouge_l(candidates, truths)
  values["CIDEr"] = cider.cider_d(candidates, truths)
  for name in java_metrics:
    values[name] = java.METRICS[name](candidates, truths)
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
    raise ValueError("There are no results: expected at least one caption.")
  missing = [image_id for image_id in results if not references.get(image_id)]
  if missing:
    raise ValueError(
      f"The references have no caption for {len(missing)} of the"
      f" {len(results)} images in the results: {_some(missing)}. The references"
      f" have {len(references)} images: {_some(list(references))}. Are both of"
      " the same split, and their ids of the same kind?"
    )
  for image_id in results:
    if isinstance(references[image_id], str):
      raise ValueError(
        f"References of image {image_id!r}: expected a list of captions, found"
        f" the string {references[image_id]!r:.80}; put it in a list."
      )


def _some(image_ids: list[ImageId]) -> str:
  shown = ", ".join(repr(image_id) for image_id in image_ids[:3])
  return shown + (", ..." if len(image_ids) > 3 else "")
