"""Dialogs about images: rows of JSON, and mistakes."""

import json

import pytest

from blip_jax.data import datasets, dialogs, sources

ROUNDS = [
  {"question": "is it red?", "answer": "yes", "answer_options": ["no", "yes"]},
  {"question": "where is it?", "answer": "left"},
  {
    "question": "how many?",
    "answer_options": ["one", "two", "three"],
    "gt_index": 2,
    "relevance": [0, 0.5, 1],
  },
]
ROW = {"image": "a.png", "caption": "a heart", "dialog": ROUNDS}


def record(**row):
  return dialogs.record({**ROW, **row}, "x:0", "x: row 0")


def of_round(**fields):
  return record(dialog=[{**ROUNDS[0], **fields}])


def test_lists_and_lines_give_the_same_records(tmp_path):
  (tmp_path / "d.json").write_text(json.dumps([ROW, ROW | {"image_id": 7}]))
  lines = [json.dumps(row) for row in (ROW, ROW | {"image_id": 7})]
  (tmp_path / "d.jsonl").write_text("\n".join(lines))
  for name in ("d.json", "d.jsonl"):
    source = datasets.open_dialogs(str(tmp_path / name), "root")
    assert source[0] == {
      "id": f"{name}:0",
      "image": "root/a.png",
      "context": "a heart",
      "dialog": (
        dialogs.Round("is it red?", "yes", ("no", "yes"), 1),
        dialogs.Round("where is it?", "left"),
        dialogs.Round(
          "how many?", "three", ("one", "two", "three"), 2, (0.0, 0.5, 1.0)
        ),
      ),
      "dialog_id": f"{name}:0",
    }
    assert source[1]["dialog_id"] == source[1]["image_id"] == 7


def test_what_a_dialog_may_lack():
  """The caption, and of a round the answer: it may be secret."""
  row = record(caption=None, dialog=[{**ROUNDS[0], "answer": None}])
  assert row["context"] == ""
  assert row["dialog"][0] == dialogs.Round("is it red?", "", ("no", "yes"))


def test_the_number_of_the_right_candidate_wins():
  (one,) = of_round(gt_index=0)["dialog"]
  assert (one.right, one.answer) == (0, "yes")


def test_a_dialog_has_the_first_id_that_its_row_has():
  assert record(dialog_id="b", image_id=3)["dialog_id"] == "b"
  assert record(dialog_id="", image_id=3)["dialog_id"] == 3
  assert record()["dialog_id"] == "x:0"


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(question=" "), "round 1: expected a question, found ' '"),
    (dict(question=3), "round 1: expected a question, found 3"),
    (dict(answer=["yes"]), r"'answer': expected text, found \['yes'\]"),
    (dict(answer="maybe"), "the answer 'maybe' among the 2 'answer_options'"),
    (dict(answer_options="yes"), "'answer_options': expected a list of texts"),
    (dict(answer_options=["yes", 3]), "expected a list of texts"),
    (dict(gt_index=2), "'gt_index': expected the number of one of 2"),
    (dict(gt_index=-1), "'gt_index': expected the number of one of 2"),
    (dict(gt_index=True), "'gt_index': expected the number of one of 2"),
    (dict(relevance=[1]), "'relevance': expected a number from 0 to 1 "),
    (dict(relevance=[1, "a"]), "'relevance': expected a number from 0 "),
    (dict(relevance=[1, float("nan")]), "from 0 to 1 for each of 2 cand"),
    (dict(relevance=[-1, 1]), "from 0 to 1 for each of 2 candidates"),
    (dict(relevance=[1, 10**400]), "from 0 to 1 for each of 2 candidates"),
    (dict(answer_options=None), "expected 'answer_options' in a round"),
  ],
)
def test_mistakes_of_a_round(fields, message):
  with pytest.raises(sources.BadRow, match=message):
    of_round(**fields)


@pytest.mark.parametrize(
  "row, message",
  [
    (dict(caption=3), "'caption': expected text, found 3"),
    (dict(dialog=[]), r"'dialog': expected a list of rounds, found \[\]"),
    (dict(dialog="is it?"), "'dialog': expected a list of rounds"),
    (dict(dialog=["is it?"]), "round 1: expected an object, found 'is it"),
    (dict(image=None), "nothing under 'image'"),
  ],
)
def test_a_row_with_a_mistake_costs_itself(tmp_path, row, message):
  path = tmp_path / "d.json"
  path.write_text(json.dumps([ROW, {**ROW, **row}]))
  source = datasets.open_dialogs(str(path))
  assert source[0]["context"] == "a heart"
  with pytest.raises(sources.BadRow, match=message):
    source[1]


def test_a_file_without_dialogs_is_refused(tmp_path):
  path = tmp_path / "d.json"
  path.write_text(json.dumps([{"image": "a.png", "caption": "a"}]))
  with pytest.raises(ValueError, match="a list of rounds under 'dialog'"):
    datasets.open_dialogs(str(path))


@pytest.mark.parametrize("name", ["d.csv", "d.tar", "nothing"])
def test_other_sources_are_refused(tmp_path, name):
  (tmp_path / "d.csv").write_text("image,dialog\na,b\n")
  with pytest.raises(ValueError, match=r"dialogs in a \.json, \.jsonl, in a f"):
    datasets.open_dialogs(str(tmp_path / name))
