"""Dialogs about scenes: true, and at chance for who does not read them all."""

import collections

import numpy as np
import pytest

from blip_jax.data import datasets, scenes
from tests import helpers

NUM = 300
SPLIT = f"scenes:train?num={NUM}&size=16"


@pytest.fixture(scope="module")
def talks():
  """(scene, record) of each item."""
  source = datasets.open_dialogs(SPLIT)
  plain = scenes.Scenes("train", 16, NUM, counts=(0.0, 1.0, 0.0))
  return [(plain.scene(n), source[n]) for n in range(NUM)]


def mentioned(scene, caption):
  """The number of the object that a caption names: told from the words."""
  words = set(caption.split())
  (number,) = (
    n for n, x in enumerate(scene.objects) if {x.colour, x.shape} & words
  )
  return number


def answers(scene, record):
  """The answer to each question: told from the words."""
  place = {"row": ("left", "right"), "column": ("top", "bottom")}
  current = mentioned(scene, record["context"])
  for each in record["dialog"]:
    words = each.question.rstrip("?").split()
    if "other" in words:
      current = 1 - current
    item = scene.objects[current]
    if words[0] == "where":
      yield place[scene.layout][current]
    elif words[0] == "is":
      yield "yes" if words[-1] == item.colour else "no"
    else:
      yield {"colour": item.colour, "shape": item.shape}[words[1]]


def test_answers_are_true(talks):
  for scene, record in talks:
    found = [each.answer for each in record["dialog"]]
    assert found == [*answers(scene, record)], record


def test_candidates_have_the_right_answer_once(talks):
  for _, record in talks:
    assert len(record["dialog"]) == 4
    for each in record["dialog"]:
      assert len(set(each.candidates)) == len(each.candidates) == 10
      assert each.candidates[each.right] == each.answer
      assert each.relevance == tuple(float(n == each.right) for n in range(10))


def test_positions_and_numbers_of_candidates_say_nothing(talks):
  """Every answer to a kind of question is a candidate whenever it is asked."""
  right = collections.Counter(
    each.right for _, record in talks for each in record["dialog"]
  )
  assert max(right.values()) < 1.5 * min(right.values())
  for _, record in talks:
    for each in record["dialog"]:
      if each.question.startswith("what colour"):
        assert {*each.candidates} == {*scenes.COLOURS}


def test_it_is_ambiguous_without_the_history(talks):
  """The last two questions are about the object that was not named."""
  same = [
    next(answers(scene, {**record, "dialog": record["dialog"][3:]}))
    == record["dialog"][3].answer
    for scene, record in talks
    if not record["dialog"][3].question.startswith("is")
  ]
  assert np.mean(same) < 0.1


def test_records_do_not_depend_on_the_number_of_items(talks):
  again = datasets.open_dialogs("scenes:train?num=5&size=16")[4]
  assert again["dialog"] == talks[4][1]["dialog"]
  np.testing.assert_array_equal(again["image"], talks[4][1]["image"])
  assert again["dialog_id"] == 4 and again["id"] == "scenes/train:4"


def test_words_are_in_the_vocabulary(talks):
  tokenizer = helpers.scenes_tokenizer()
  texts = {
    text
    for _, record in talks
    for each in record["dialog"]
    for text in (record["context"], each.question, *each.candidates)
  }
  ids, _ = tokenizer.encode(sorted(texts), 16)
  assert not any(
    "##" in piece for row in ids for piece in tokenizer.pieces(row.tolist())
  )


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
    datasets.open_dialogs(spec)
