"""Questions about one image together: which, and in what order they return."""

import json

import numpy as np
import pytest

from blip_jax.data import datasets, question_groups, sources


def make_source(tmp_path, images, questions=None):
  rows = [
    {"image": image, "question": f"what is it {n}?"}
    for n, image in enumerate(images)
  ]
  for number, question in (questions or {}).items():
    rows[number]["question"] = question
  path = tmp_path / "q.json"
  path.write_text(json.dumps(rows))
  return datasets.open_questions(str(path), "images")


def make(source, num_frames=0, at_most=8):
  return question_groups.Groups(source, 50, num_frames, at_most)


@pytest.mark.parametrize(
  "counts, image_cost, at_most, expected",
  [
    ({1: 100}, 1, 8, 1),
    ({3: 100}, 1, 8, 3),
    # 1 + 4 are less than 2 * (1 + 2), and these less than 2 * (1 + 3).
    ({4: 100}, 1, 8, 4),
    ({4: 100}, 1, 3, 2),
    # Places that are rarely filled cost more than they save.
    ({1: 90, 8: 10}, 1, 8, 1),
    # Unless images are dear, as videos are.
    ({1: 90, 8: 10}, 48, 8, 8),
    ({}, 1, 8, 1),
  ],
)
def test_the_size_of_groups(counts, image_cost, at_most, expected):
  size = question_groups.group_size(counts, image_cost, at_most)
  assert size == expected


def test_questions_about_an_image_are_together_wherever_they_are(tmp_path):
  source = make_source(tmp_path, ["a", "b", "a", "b", "a", "b", "b"])
  groups = make(source)
  assert groups.size == 4 and len(groups) == 2
  assert groups.rows.tolist() == [[0, 2, 4, -1], [1, 3, 5, 6]]
  record = groups[0]
  assert record["image"] == "images/a" and record["id"] == "q.json:0"
  asked = [each["question"] for each in record["asked"]]
  assert asked == ["what is it 0?", "what is it 2?", "what is it 4?"]


def test_values_return_in_the_order_of_the_rows(tmp_path):
  groups = make(make_source(tmp_path, ["a", "b", "a", "b", "b"]), at_most=2)
  assert groups.rows.tolist() == [[0, 2], [1, 3], [4, -1]]
  values = np.where(groups.rows < 0, 99, 10 * groups.rows)
  assert groups.by_row(values).tolist() == [0, 10, 20, 30, 40]
  vectors = np.stack([values, -values], axis=-1)
  assert groups.by_row(vectors)[3].tolist() == [30, -30]


def test_a_question_that_cannot_be_used_is_alone(tmp_path):
  source = make_source(tmp_path, ["a"] * 5, {1: "...", 3: None})
  groups = make(source, num_frames=8)
  assert sorted(row for row in groups.rows.flat if row >= 0) == [*range(5)]
  of_row = {row: n for n, rows in enumerate(groups.rows) for row in rows}
  assert of_row[0] == of_row[2] == of_row[4]
  assert (groups.rows[of_row[1]] >= 0).sum() == 1
  with pytest.raises(sources.BadRow, match="missing_question"):
    groups[of_row[3]]


def test_images_that_are_no_files_are_alone():
  source = datasets.open_questions("scenes:val?num=5")
  assert make(source).rows.tolist() == [[0], [1], [2], [3], [4]]


def test_there_may_be_no_rows(tmp_path):
  source = sources.Rows(make_source(tmp_path, ["a"]), np.arange(0))
  assert len(make(source)) == 0
