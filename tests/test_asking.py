"""Questions about scenes: true, and at chance for who sees only the text."""

import collections

import pytest

from blip_jax.data import datasets, scenes
from tests import helpers

NUM = 6000


@pytest.fixture(scope="module")
def asked():
  source = scenes.Scenes("train", 8, NUM, with_questions=True)
  return [
    (
      source.scene(n),
      scenes.ask(n, source.scene(n), source._rng(n, 4)),
    )
    for n in range(NUM)
  ]


def test_answers_are_true(asked):
  """Told from the objects, not by the code that asks."""
  words = {"one": 1, "two": 2, "three": 3}
  for scene, (kind, text, answer) in asked:
    objects = {(item.colour, item.shape): item for item in scene.objects}
    named = [
      item
      for item in scene.objects
      if item.shape in text.split("?")[0].split() or item.colour in text.split()
    ]
    if kind == "count":
      assert words[answer] == len(scene.objects)
    elif kind == "yes/no":
      colour, shape = text.removesuffix("?").split()[-2:]
      assert (answer == "yes") == ((colour, shape) in objects)
    elif kind == "position":
      colour, shape = text.removesuffix("?").split()[-2:]
      item = objects[colour, shape]
      (other,) = (x for x in scene.objects if x is not item)
      difference = {
        "left": other.x - item.x,
        "right": item.x - other.x,
        "top": other.y - item.y,
        "bottom": item.y - other.y,
      }[answer]
      assert difference > 0.3
    else:
      place = text.removesuffix("?").split()[-1]
      key = {"left": "x", "right": "x", "top": "y", "bottom": "y"}.get(place)
      if key:
        order = sorted(scene.objects, key=lambda item: getattr(item, key))
        named = [order[0 if place in ("left", "top") else -1]]
      assert [getattr(item, kind) for item in named] == [answer]


def test_all_kinds_and_all_answers_are_asked_for(asked):
  kinds = collections.Counter(kind for _, (kind, _, _) in asked)
  assert kinds == dict.fromkeys(scenes.QUESTION_KINDS, NUM // 5)
  assert {answer for _, (_, _, answer) in asked} == {*scenes.ANSWERS}


def test_the_text_alone_does_not_give_the_answer(asked):
  """A guess that knows the answers to all questions of the same pattern is no
  better than chance."""
  by_text = collections.defaultdict(collections.Counter)
  names = {*scenes.COLOURS, *scenes.SHAPES}
  for _, (kind, text, answer) in asked:
    words = text.removesuffix("?").split()
    pattern = " ".join("*" if word in names else word for word in words)
    by_text[kind, pattern][answer] += 1
  chance = {"count": 3, "colour": 10, "shape": 8, "position": 4, "yes/no": 2}
  for (kind, pattern), counts in by_text.items():
    total = counts.total()
    most = counts.most_common(1)[0][1] / total
    expected = 1 / chance[kind]
    noise = (expected * (1 - expected) / total) ** 0.5
    assert most < expected + 4 * noise, (kind, pattern, counts)


def test_records_of_questions():
  source = datasets.open_questions("scenes:val?num=10")
  record = source[4]
  assert record["question_type"] == "yes/no" and record["question_id"] == 4
  assert record["answers"] in (["yes"], ["no"])
  assert record["image"].shape == (32, 32, 3) and "caption" not in record
  captions = datasets.open_source("scenes:val?num=10")[4]
  assert "question" not in captions


def test_words_of_questions_are_in_the_vocabulary(asked):
  tokenizer = helpers.scenes_tokenizer()
  texts = {text for _, (_, text, _) in asked} | {*scenes.ANSWERS}
  ids, mask = tokenizer.encode(sorted(texts), 20)
  words = [tokenizer.pieces(row.tolist()) for row in ids]
  assert not any("##" in piece for row in words for piece in row)
  assert mask.sum(axis=1).max() <= 12
