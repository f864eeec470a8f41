"""Score captions by BLEU, ROUGE-L and CIDEr, as COCO's official scorer does.

  python tools/score_captions.py --results R.json --references SOURCE \
    [--out S.json] [--per-image P.json] [--java METEOR SPICE]

R.json is a list of {"image_id": ..., "caption": ...}, as a run writes it, or
the .jsonl of the job `caption`. SOURCE has COCO's annotations, or is any source
of images with captions (docs/data.md), such as the split that was captioned.
Without an "image_id" in both, the paths of the images say what belongs
together. Images without a result are not scored; their number is shown.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from blip_jax.evaluators import references as human_captions
from blip_jax.evaluators.scores import (
  caption_files,
  caption_metrics,
  image_names,
  java,
)
from blip_jax.runtime import command, files


def table(scores: caption_metrics.Scores) -> Iterator[str]:
  """Yields a line per metric: its name and the score of the corpus."""
  yield f"{'metric':<10}{'score':>10}"
  for name, value in scores.total.items():
    yield f"{name:<10}{value:>10.4f}"


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--results", required=True, metavar="R.json", type=command.local_path
  )
  parser.add_argument("--references", required=True, metavar="SOURCE")
  parser.add_argument(
    "--out",
    metavar="S.json",
    type=command.local_path,
    help="write the scores as JSON",
  )
  parser.add_argument(
    "--per-image",
    metavar="P.json",
    type=command.local_path,
    help="write the scores of each image as JSON",
  )
  parser.add_argument(
    "--by",
    choices=("image_id", "path"),
    help="what says which images are the same, where ids and paths disagree",
  )
  parser.add_argument(
    "--java",
    nargs="+",
    default=(),
    choices=sorted(java.METRICS),
    help="more metrics, which need Java and `pip install blip_jax[coco]`",
  )
  args = parser.parse_args(argv)
  results = caption_files.read_results(args.results)
  human = human_captions.read(args.references)
  found = human.of([*results], args.by)
  names = image_names.of_images([*results])
  scores = caption_metrics.score(
    dict(zip(names, results.values(), strict=True)),
    {names[n]: captions for n, captions in found.items()},
    args.java,
  )
  print("\n".join(table(scores)))
  print(f"{len(results)} images were scored.")
  if missing := len(human.images) - len(found):
    print(
      f"{missing} of the {len(human.images)} images with references have no"
      " result: they were not scored and do not lower the scores."
    )
  if human.bad:
    first = human.bad[0]
    print(
      f"{len(human.bad)} rows or captions of the references cannot be used and"
      f" were left out, such as {first.id}: {first.reason}: {first.detail}"
    )
  if args.out:
    _write(args.out, scores.total)
  if args.per_image:
    rows = scores.per_image.items()
    _write(args.per_image, [{"image_id": id} | values for id, values in rows])
  return 0


def _write(path: str, content: Any) -> None:
  files.write_text(path, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
  sys.exit(main())
