"""Scores captions by BLEU, ROUGE-L and CIDEr, as COCO's official scorer does.

  python tools/score_captions.py --results R.json --references ANN.json \
    [--out S.json] [--per-image P.json] [--java METEOR SPICE]

R.json is a list of {"image_id": ..., "caption": ...}.  ANN.json holds COCO's
annotations, or a list of {"image": ..., "caption": [...]} as in Karpathy's
split, where the id is "image_id" or the number at the end of the file's name.
Images of ANN.json that R.json lacks are left aside, and counted.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

from blip_jax.evaluators.scores import caption_files, caption_metrics, java


def table(scores: caption_metrics.Scores) -> Iterator[str]:
  """Yields a line per metric: its name, and the score of all images."""
  yield f"{'metric':<10}{'score':>10}"
  for name, value in scores.total.items():
    yield f"{name:<10}{value:>10.4f}"


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--results", required=True, metavar="R.json")
  parser.add_argument("--references", required=True, metavar="ANN.json")
  parser.add_argument("--out", metavar="S.json", help="the scores, as JSON")
  parser.add_argument(
    "--per-image", metavar="P.json", help="the scores of each image, as JSON"
  )
  parser.add_argument(
    "--java",
    nargs="+",
    default=(),
    choices=sorted(java.METRICS),
    help="also these, which need Java and `pip install blip_jax[coco]`",
  )
  args = parser.parse_args(argv)
  try:
    results = caption_files.read_results(args.results)
    references = caption_files.read_references(args.references)
    scores = caption_metrics.score(results, references, args.java)
  except ValueError as error:
    print(f"score_captions: {error}", file=sys.stderr)
    return 1
  print("\n".join(table(scores)))
  print(f"{len(results)} images were scored.")
  if left := len(references.keys() - results.keys()):
    print(
      f"{left} of the {len(references)} images with references have no result:"
      " they were not scored, and lower nothing."
    )
  if args.out:
    _write(args.out, scores.total)
  if args.per_image:
    rows = scores.per_image.items()
    _write(args.per_image, [{"image_id": id} | values for id, values in rows])
  return 0


def _write(path: str, content) -> None:
  pathlib.Path(path).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
  sys.exit(main())
