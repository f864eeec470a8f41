"""Statements about two scenes: true where they say so, at chance for who sees
only the text."""

import collections
import re

import numpy as np
import pytest

from blip_jax.data import datasets, scenes
from tests import helpers

NUM = 600
NUMBERS = {"three": 3, "four": 4, "five": 5}


@pytest.fixture(scope="module")
def stated():
  """(kind, text, left, right, label) of each item."""
  source = scenes.Statements("train", 8, NUM)
  found = []
  for n in range(NUM):
    statement, (left, right) = source.statement(n), source.scenes(n)
    found.append((statement.kind, statement.text, left, right, n % 2 == 0))
  return found


def has(scene, words):
  """Whether a scene has what "a red shape", "a heart" or "a red heart" says."""
  *colour, shape = words.split()[1:]
  return any(
    shape in ("shape", item.shape) and set(colour) <= {item.colour}
    for item in scene.objects
  )


def is_true(kind, text, left, right):
  """Told from the words, not by the code that makes the statement."""
  sides = {"left": left, "right": right}
  count = {side: len(scene.objects) for side, scene in sides.items()}
  if kind == "more":
    first, second = re.findall("left|right", text)
    sign = -1 if "fewer" in text else 1
    return sign * (count[first] - count[second]) > 0
  if kind == "total":
    (number,) = (n for word, n in NUMBERS.items() if word in text)
    return sum(count.values()) == number
  (what,) = re.findall(r"\ban? [a-z ]+?(?= in |$)", text)
  found = {side: has(scene, what) for side, scene in sides.items()}
  if kind == "which":
    (side,) = re.findall("left|right", text)
    return found[side]
  return all(found.values()) if kind == "both" else sum(found.values()) == 1


def test_labels_are_true(stated):
  for kind, text, left, right, label in stated:
    assert is_true(kind, text, left, right) == label, text


def test_all_kinds_take_turns(stated):
  kinds = collections.Counter(kind for kind, *_ in stated)
  assert kinds == dict.fromkeys(scenes.STATEMENT_KINDS, NUM // 5)


def test_the_text_alone_says_nothing(stated):
  """Every text is there as often with the one label as with the other."""
  labels = collections.defaultdict(list)
  for _, text, _, _, label in stated:
    labels[text].append(label)
  assert all(2 * sum(each) == len(each) for each in labels.values())


def test_a_false_statement_often_has_one_of_two_images_right(stated):
  """Or the first image would be enough to see that "both" is false."""
  left_has = [
    has(left, text.split(" ", 3)[3] if text[0] == "b" else text[9:-14])
    for kind, text, left, _, label in stated
    if kind == "both" and not label
  ]
  assert 0.3 < np.mean(left_has) < 0.7


def test_records_of_statements():
  source = datasets.open_statements("scenes:val?num=10&size=16")
  one, two = source[4], source[5]
  assert len(source) == 10 and one["statement"] == two["statement"]
  assert one["label"] is True and two["label"] is False
  assert one["group"] == two["group"] != source[6]["group"]
  assert [image.shape for image in one["images"]] == [(16, 16, 3)] * 2
  again = datasets.open_statements("scenes:val?num=6&size=16")[4]
  for image, same in zip(one["images"], again["images"], strict=True):
    np.testing.assert_array_equal(image, same)


def test_splits_share_no_scene():
  contents = {
    split: {
      (scene.layout, *((item.colour, item.shape) for item in scene.objects))
      for n in range(300)
      for scene in scenes.Statements(split, 8, 300).scenes(n)
    }
    for split in scenes.SPLITS
  }
  assert not contents["train"] & contents["val"]
  assert not contents["train"] & contents["test"]


def test_words_of_statements_are_in_the_vocabulary(stated):
  tokenizer = helpers.scenes_tokenizer()
  ids, mask = tokenizer.encode(sorted({text for _, text, *_ in stated}), 20)
  words = [tokenizer.pieces(row.tolist()) for row in ids]
  assert not any("##" in piece for row in words for piece in row)
  assert mask.sum(axis=1).max() <= 16


@pytest.mark.parametrize(
  "spec, message",
  [
    ("scenes:dev", "expected one of the splits"),
    ("scenes:val?num=0", "expected at least 1"),
    ("scenes:val?noise=0.3", "no option 'noise'"),
  ],
)
def test_mistakes(spec, message):
  with pytest.raises(ValueError, match=message):
    datasets.open_statements(spec)
