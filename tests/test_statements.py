"""Statements about two images: the formats of their files, and mistakes."""

import csv
import json

import pytest

from blip_jax.data import datasets, sources, statements

SENTENCE = "The left image has two dogs."


def record(**row):
  return statements.record({"sentence": SENTENCE, **row}, "x:0", "x: row 0")


def test_rows_of_nlvr2_as_published(tmp_path):
  """JSON lines, whatever the name ends with; files are named by the row."""
  rows = [
    {
      "sentence": SENTENCE,
      "identifier": f"train-10171-{pair}-0",
      "label": label,
      "directory": 48,
      "left_url": "https://a.org/x.png",
    }
    for pair, label in enumerate(["True", "False"])
  ]
  rows.append({"sentence": SENTENCE, "identifier": "test1-0-1-0"})
  path = tmp_path / "train.json"
  path.write_text("\n".join(map(json.dumps, rows)) + "\n")
  source = datasets.open_statements(str(path), "images")
  assert len(source) == 3
  first, second, third = (source[n] for n in range(3))
  assert first == {
    "id": "train.json:0",
    "images": (
      "images/48/train-10171-0-img0.png",
      "images/48/train-10171-0-img1.png",
    ),
    "statement": SENTENCE,
    "label": True,
    "statement_id": "train-10171-0-0",
    "group": "train-10171-0",
  }
  assert second["label"] is False and second["group"] == first["group"]
  assert third["images"] == (
    "images/test1-0-1-img0.png",
    "images/test1-0-1-img1.png",
  )
  assert "label" not in third and third["group"] == "test1-0-0"


def test_two_statements_about_one_set_are_two_groups():
  groups = {
    record(identifier=f"dev-850-{pair}-{number}")["group"]
    for pair in range(4)
    for number in range(2)
  }
  assert len(groups) == 2
  assert record(identifier="mine")["group"] == SENTENCE
  assert record()["statement_id"] == "x:0"


def test_ids_are_single_lines_of_utf_8():
  """As a CSV file of predictions can have them."""
  assert record(identifier="\ud800")["statement_id"] == r"\xed\xa0\x80"
  assert record(identifier="")["statement_id"] == "x:0"
  assert record(identifier=7.0)["statement_id"] == "7"


def test_labels_of_pandas():
  """Which makes floats of a column in which some are missing."""
  assert record(label=1.0)["label"] is True
  assert record(label="0.0")["label"] is False


ROWS = [
  {"images": ["dev/a-0.png", "dev/a-1.png"], "sentence": "a", "label": "True"},
  {"images": ["dev/b-0.png", "dev/b-1.png"], "sentence": "b", "label": "False"},
]


def test_the_originals_list_and_tables_give_the_same_records(tmp_path):
  (tmp_path / "n.json").write_text(json.dumps(ROWS))
  pairs = [
    {
      "image_0": row["images"][0],
      "image_1": row["images"][1],
      "sentence": row["sentence"],
      "label": row["label"] == "True",
    }
    for row in ROWS
  ]
  (tmp_path / "n.jsonl").write_text("\n".join(map(json.dumps, pairs)))
  with open(tmp_path / "n.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, [*pairs[0]])
    writer.writeheader()
    writer.writerows(pairs)
  for name in ("n.json", "n.jsonl", "n.csv"):
    source = datasets.open_statements(str(tmp_path / name), "root")
    for n, letter in enumerate("ab"):
      assert source[n] == {
        "id": f"{name}:{n}",
        "images": (f"root/dev/{letter}-0.png", f"root/dev/{letter}-1.png"),
        "statement": letter,
        "label": letter == "a",
        "statement_id": f"{name}:{n}",
        "group": letter,
      }


@pytest.mark.parametrize("label", [True, 1, "1", "true", "True", " TRUE "])
def test_what_is_true(label):
  assert record(label=label)["label"] is True


@pytest.mark.parametrize("label", [False, 0, "0", "false", "False"])
def test_what_is_false(label):
  assert record(label=label)["label"] is False


@pytest.mark.parametrize("label", [None, ""])
def test_a_row_may_have_no_label(label):
  assert "label" not in record(label=label)


@pytest.mark.parametrize(
  "row, message",
  [
    (dict(sentence=" "), "expected a statement, found ' '"),
    (dict(sentence=None), "expected a statement, found None"),
    (dict(label="maybe"), "'label': expected true or false, found 'maybe'"),
    (dict(label=2), "'label': expected true or false, found 2"),
    (dict(images=["a.png"]), "'images': expected 2 images, found 1"),
    (dict(images=["a.png", ""]), r"nothing under 'images\[1\]'"),
    (dict(images=None), "nothing under 'image_0'"),
    (dict(images=["a.png", 3]), r"'images\[1\]': expected a path, found 3"),
  ],
)
def test_a_row_with_a_mistake_costs_itself(tmp_path, row, message):
  path = tmp_path / "n.json"
  path.write_text(json.dumps([ROWS[0], {**ROWS[1], **row}]))
  source = datasets.open_statements(str(path))
  assert source[0]["statement"] == "a"
  with pytest.raises(sources.BadRow, match=message):
    source[1]


@pytest.mark.parametrize(
  "header, message",
  [
    ("image_0,image_1,caption", "expected text under 'sentence'"),
    ("image_0,sentence", "expected two images, under 'image_0' and 'image_1'"),
  ],
)
def test_a_table_that_lacks_columns_is_refused(tmp_path, header, message):
  path = tmp_path / "n.csv"
  path.write_text(f"{header}\n" + ",".join("abc"[: header.count(",") + 1]))
  with pytest.raises(ValueError, match=message):
    datasets.open_statements(str(path))


@pytest.mark.parametrize("name", ["n.tar", "n.parquet", "nothing"])
def test_sources_without_statements_are_refused(tmp_path, name):
  with pytest.raises(ValueError, match=r"expected statements in a \.json"):
    datasets.open_statements(str(tmp_path / name))


def test_left_and_right_are_exchanged_as_words():
  text = "the left image has leftover bread left of a bright right wall"
  assert statements.mirrored(text) == (
    "the right image has leftover bread right of a bright left wall"
  )
  assert statements.mirrored("two dogs") == "two dogs"
