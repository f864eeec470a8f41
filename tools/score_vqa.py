"""Score answers to questions, as VQA's official evaluation does.

  python tools/score_vqa.py --results R.json --annotations A.json \
    [--protocol official|lenient] [--out S.json]

R.json is what a run writes and the servers of VQA, A-OKVQA, GQA and VizWiz
read, such as a list of {"question_id": ..., "answer": ...}, or the .jsonl of
the job `answer`. A.json has the annotators' answers, as it is published.

`official` normalises answers only where the annotators differ; `lenient` always
does, as newer programs do. Both are printed; --protocol says which is written.
Questions without an answer are not scored; their number is shown.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence

from blip_jax.evaluators.scores import vqa_accuracy, vqa_files
from blip_jax.runtime import command, files


def table(scores: Mapping[str, vqa_accuracy.Accuracy]) -> Iterator[str]:
  """Yields a line per accuracy: its name and the percentage by protocol."""
  yield f"{'accuracy':<32}" + "".join(f"{name:>10}" for name in scores)
  rows = [
    {"overall": score.overall, **score.per_answer_type}
    | {f"  {name}": x for name, x in score.per_question_type.items()}
    for score in scores.values()
  ]
  for name in rows[0]:
    yield f"{name:<32}" + "".join(f"{row[name]:>10.2f}" for row in rows)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name in ("results", "annotations"):
    parser.add_argument(
      f"--{name}",
      required=True,
      metavar=f"{name[0].upper()}.json",
      type=command.local_path,
    )
  parser.add_argument(
    "--protocol", choices=vqa_accuracy.PROTOCOLS, default="official"
  )
  parser.add_argument(
    "--out",
    metavar="S.json",
    type=command.local_path,
    help="write the accuracies as JSON",
  )
  args = parser.parse_args(argv)
  answers = vqa_files.read_results(args.results)
  questions, split, num_bad = vqa_files.read_annotations(args.annotations)
  scores = {
    name: vqa_accuracy.score(answers, questions, name)
    for name in vqa_accuracy.PROTOCOLS
  }
  print("\n".join(table(scores)))
  num_scored = len(answers.keys() & questions.keys())
  print(f"{num_scored} answers were scored.")
  if missing := len(questions) - num_scored:
    print(
      f"{missing} of the {len(questions)} questions have no answer: they were "
      "not scored and do not lower the accuracy."
    )
  if unknown := len(answers) - num_scored:
    print(f"{unknown} answers are of no question in {args.annotations}.")
  if num_bad:
    print(f"{num_bad} rows of {args.annotations} have no answers.")
  if split in vqa_files.TRAINED_ON:
    print(
      f"The questions are of {split}, which BLIP's recipe for VQA v2 trains "
      "on, and so do the released models: these numbers are too high for "
      "them (about 83 on val2014, where the test server says 78)."
    )
  if args.out:
    chosen = scores[args.protocol].as_json() | {"protocol": args.protocol}
    files.write_text(args.out, json.dumps(chosen, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
