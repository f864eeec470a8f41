"""How VQA's official evaluation normalises answers."""

import json

import pytest

from blip_jax.evaluators.scores import vqa_text

# Answers of annotators, and what the official program makes of them.
EXAMPLES = [
  ("Yes", "yes"),
  ("a dog.", "dog"),
  ("The Red, white", "red white"),
  ("none", "0"),
  ("Ten people", "10 people"),
  ("1,000", "1000"),
  ("a,b,c,d", "b c d"),  # the first letter becomes an article
  ("2.5", "2.5"),
  ("10.", "10"),
  ("dont", "don't"),
  ("couldnt've", "couldn't've"),
  ("couldn'tve", "couldn't've"),
  ("somebody'd", "somebodyd"),
  ("left/right", "left right"),
  ("left / right", "left right"),
  ("yes!", "yes"),
]


@pytest.mark.parametrize("answer, expected", EXAMPLES)
def test_examples(answer, expected):
  assert vqa_text.normalised(answer) == expected


def test_the_official_program_gives_the_same(shared_dir):
  pairs = json.loads(
    (shared_dir / "data/vqa_eval/normalisation_pairs.json").read_text()
  )
  assert len(pairs) == 599
  differ = [
    (answer, expected)
    for answer, expected in pairs
    if vqa_text.normalised(answer) != expected
  ]
  assert not differ


def test_white_space():
  assert vqa_text.stripped(" on\tthe\nleft ") == "on the left"
