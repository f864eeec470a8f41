"""All caption metrics: published scores, official scores, and properties."""

import ast
import json
import math
import pathlib
import re
import subprocess
import sys
import time

import pytest

from blip_jax.evaluators import references as human_captions
from blip_jax.evaluators.scores import (
  bleu,
  caption_files,
  caption_metrics,
  cider,
  image_names,
  rouge,
)

METRICS = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]

RESULTS = {7: "a dog runs on wet sand", 3: "two cats"}
REFERENCES = {
  3: ["Two cats sleep.", "There are two cats on a bed."],
  5: ["A red bus that nobody wrote about."],
  7: ["A dog runs over wet sand!", "The dog, on sand."],
}

# Where the oracle's captions are, from the folder of its data.
CASES = {
  "vinvl_val2017": "vinvl_base_val2017_results.json",
  "fakecap_in_val2017": "fakecap_in_val2017_results.json",
  "ruizewang_fakecap_val2017": (
    "ruizewang_captions_val2017_fakecap_results.json"
  ),
  "human_leave_one_out_val2017": None,
  "abstract50s_candsB": "cider_abstract50s/abstract_candsB.json",
  "nlg_eval_example": "nlg_eval_example/hyp.txt",
}


@pytest.fixture(scope="module")
def folder(shared_dir):
  return shared_dir / "data" / "coco_eval"


def read(path):
  return json.loads(path.read_text())


def by_id(path):
  """Reference captions by the ids of their images."""
  read = human_captions.read(str(path))
  ids = [image_names.from_id(image.image_id) for image in read.images]
  return dict(zip(ids, read.captions, strict=True))


def raw(folder, case):
  """Results and references of a case, as they were before any tokenizer."""
  if case == "nlg_eval_example":
    names = ("hyp", "ref1", "ref2")
    texts = [
      (folder / case / f"{name}.txt").read_text().splitlines() for name in names
    ]
    results = dict(enumerate(texts[0]))
    return results, dict(enumerate(zip(*texts[1:], strict=True)))
  if case == "abstract50s_candsB":
    results = {}
    for row in read(folder / CASES[case]):
      # Of two candidates the oracle took the first.
      results.setdefault(row["image_id"], row["caption"])
    path = folder / "cider_abstract50s/abstract48S.json"
    return results, by_id(path)
  references = by_id(folder / "captions_val2017.json")
  if case == "human_leave_one_out_val2017":
    return (
      {image_id: texts[0] for image_id, texts in references.items()},
      {image_id: texts[1:] for image_id, texts in references.items()},
    )
  results = caption_files.read_results(folder / CASES[case])
  return {image.image_id: text for image, text in results.items()}, references


def tokenized(folder, case):
  """Candidates and references in the order of the oracle's scores."""
  ids = read(folder / f"expected_{case}_per_image.json")["ids"]
  words = read(folder / f"tokenized_{case}.json")
  return (
    [words["hyps"][str(image_id)][0] for image_id in ids],
    [words["refs"][str(image_id)] for image_id in ids],
  )


# Other captions of the same images.
SLOW = ("fakecap_in_val2017", "ruizewang_fakecap_val2017")


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, marks=pytest.mark.slow if case in SLOW else ())
    for case in CASES
  ],
)
def test_scores_of_raw_captions_equal_the_official_ones(folder, case):
  results, references = raw(folder, case)
  start = time.process_time()
  scores = caption_metrics.score(results, references)
  assert time.process_time() - start < 20
  oracle = read(folder / f"expected_{case}.json")
  assert len(scores.per_image) == oracle["n_images"]
  del oracle["expected"]["METEOR"]
  assert scores.total == pytest.approx(oracle["expected"], abs=1e-9)
  oracle = read(folder / f"expected_{case}_per_image.json")
  for metric in METRICS:
    each = [scores.per_image[image_id][metric] for image_id in oracle["ids"]]
    assert each == pytest.approx(oracle["per_image"][metric], abs=1e-9)


@pytest.mark.parametrize(
  "case",
  [
    "vinvl_val2017",
    "fakecap_in_val2017",
    "abstract50s_candsB",
    "nlg_eval_example",
  ],
)
def test_scores_of_tokenised_captions_equal_the_official_ones(folder, case):
  pairs = tokenized(folder, case)
  expected = read(folder / f"expected_{case}.json")["expected"]
  per_image = read(folder / f"expected_{case}_per_image.json")["per_image"]
  total, each = bleu.bleu(*pairs)
  for n in range(4):
    metric = f"Bleu_{n + 1}"
    assert total[n] == pytest.approx(expected[metric], abs=1e-9)
    assert each[:, n] == pytest.approx(per_image[metric], abs=1e-9)
  for metric, scorer in {
    "ROUGE_L": rouge.rouge_l,
    "CIDEr": cider.cider_d,
  }.items():
    total, each = scorer(*pairs)
    assert total == pytest.approx(expected[metric], abs=1e-9)
    assert each == pytest.approx(per_image[metric], abs=1e-9)


def test_scores_equal_published_ones():
  # Of nlg-eval's example. To these metrics it only matters which words are the
  # same; here others stand in their places.
  scores = caption_metrics.score(
    {
      "a": "We saw one horse graze barns near old brown gates.",
      "b": "We saw ponies near his long graze on her horse.",
    },
    {
      "a": [
        "We saw five white geese under barns.",
        "We saw five more white geese under barns.",
      ],
      "b": [
        "We saw some white geese under ponies near tall graze on her horse.",
        "We saw one last white geese under ponies.",
      ],
    },
  )
  assert scores.total == pytest.approx(
    {
      "Bleu_1": 0.55,
      "Bleu_2": 0.428174,
      "Bleu_3": 0.284043,
      "Bleu_4": 0.201143,
      "ROUGE_L": 0.522104,
      "CIDEr": 1.242192,
    },
    abs=1e-6,
  )


def test_metrics_have_the_official_names_and_order():
  scores = caption_metrics.score(RESULTS, REFERENCES)
  assert list(scores.total) == METRICS
  assert list(scores.per_image) == [7, 3]
  for values in (scores.total, *scores.per_image.values()):
    assert list(values) == METRICS
    assert all(type(value) is float for value in values.values())


def test_total_is_the_mean_except_for_bleu():
  scores = caption_metrics.score(RESULTS, REFERENCES)
  for metric in ("ROUGE_L", "CIDEr"):
    each = [values[metric] for values in scores.per_image.values()]
    assert scores.total[metric] == pytest.approx(sum(each) / 2)


def test_reference_captions_score_highest():
  results = {3: "There are two cats on a bed", 7: "A dog runs over wet sand"}
  references = {3: REFERENCES[3][1:], 7: REFERENCES[7][:1]}
  scores = caption_metrics.score(results, references)
  # "a" is with both images, where CIDEr leaves it out on both sides.
  assert scores.total == pytest.approx(
    dict.fromkeys(METRICS, 1) | {"CIDEr": 10}
  )


def test_order_of_images_and_references_does_not_matter():
  scores = caption_metrics.score(RESULTS, REFERENCES)
  again = caption_metrics.score(
    dict(reversed(RESULTS.items())),
    {image_id: texts[::-1] for image_id, texts in REFERENCES.items()},
  )
  assert again.total == pytest.approx(scores.total)
  for image_id, values in scores.per_image.items():
    assert again.per_image[image_id] == pytest.approx(values)


def test_images_without_a_result_are_ignored():
  scores = caption_metrics.score(RESULTS, REFERENCES)
  fewer = {image_id: REFERENCES[image_id] for image_id in RESULTS}
  assert caption_metrics.score(RESULTS, fewer) == scores


@pytest.mark.parametrize("empty", ["", " ", "...", "\n", "😀"])
def test_an_empty_caption_scores_nothing(empty):
  scores = caption_metrics.score(RESULTS | {5: empty}, REFERENCES)
  assert scores.per_image[5] == pytest.approx(
    dict.fromkeys(METRICS, 0), abs=1e-5
  )
  assert all(map(math.isfinite, scores.total.values()))


def test_the_next_caption_affects_tokens_as_officially():
  # `ptb.tokenize_lines` says why. Here the references are read as one text.
  references = {1: ["It reads K."], 2: ["A bus"]}
  results = {1: "it reads k", 2: "a bus"}
  scores = caption_metrics.score(results, references)
  assert scores.per_image[1]["Bleu_1"] == pytest.approx(1)
  references[2] = ["Buses"]
  scores = caption_metrics.score(results, references)
  assert scores.per_image[1]["Bleu_1"] == pytest.approx(2 / 3)


def test_no_results_are_refused():
  with pytest.raises(ValueError, match="no results"):
    caption_metrics.score({}, REFERENCES)


@pytest.mark.parametrize("references", [{}, {3: ["two cats"], 7: []}])
def test_image_without_references_is_refused(references):
  with pytest.raises(ValueError) as error:
    caption_metrics.score(RESULTS, references)
  assert (
    f"of the 2 images in the results: {'7' if references else '7, 3'}."
    in (str(error.value))
  )
  assert "same split" in str(error.value)


def test_a_string_in_place_of_a_list_is_refused():
  with pytest.raises(ValueError, match=r"image 7: expected a list .* 'a dog'"):
    caption_metrics.score(RESULTS, REFERENCES | {7: "a dog"})


def test_scores_import_neither_jax_nor_models():
  folder = pathlib.Path(caption_metrics.__file__).parent
  for file in folder.glob("*.py"):
    for node in ast.walk(ast.parse(file.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module]
      for name in names:
        root = name.split(".")[0]
        assert root not in {"jax", "flax", "torch"}, file
        if root == "blip_jax":
          # These need neither.
          allowed = {
            "blip_jax.data": {"questions", "sources"},
            "blip_jax.evaluators.scores": None,
            "blip_jax.evaluators.scores.image_names": None,
            "blip_jax.runtime": {"files"},
          }
          assert name in allowed, file
          imported = {alias.name for alias in node.names}
          assert not allowed[name] or imported <= allowed[name], file
  code = (
    "import sys\n"
    "from blip_jax.data import questions, sources\n"
    "from blip_jax.runtime import files\n"
    "print(sorted({'jax', 'flax', 'torch'} & sys.modules.keys()))\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout == "[]\n"


@pytest.mark.parametrize(
  "number, shown",
  [(1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2, ...")],
)
def test_three_images_without_references_are_named(number, shown):
  results = {n: "a dog" for n in range(number)} | {"x": "a cat"}
  references = {"x": ["a cat"]}
  message = rf"for {number} of the {number + 1} .*: {re.escape(shown)}\. The"
  with pytest.raises(ValueError, match=message):
    caption_metrics.score(results, references)
