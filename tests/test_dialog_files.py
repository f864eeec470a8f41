"""VisDial's official files: texts by number, images, dense annotations."""

import json
import pickle

import pytest

from blip_jax.data import datasets, dialogs, sources

QUESTIONS = ["is it red?", 'a "b", [c]?', "where?"]
ANSWERS = ["yes", "no", "left, {right}", "two"]


def make_row(image_id, **last):
  return {
    "image_id": image_id,
    "caption": "a heart",
    "dialog": [
      {"question": 0, "answer": 1, "answer_options": [0, 1], "gt_index": 1},
      {"question": 2, **last},
    ],
  }


ROWS = [
  make_row(9, answer=2, answer_options=[3, 2], gt_index=1),
  make_row(12, answer=0, answer_options=[0, 3], gt_index=0),
]


def write(folder, split="val2018", rows=ROWS, name="visdial_1.0_val.json"):
  data = {"questions": QUESTIONS, "answers": ANSWERS, "dialogs": rows}
  whole = {"version": "1.0", "split": split, "data": data}
  (folder / name).write_text(json.dumps(whole))
  return str(folder / name)


def test_dialogs_of_the_validation_split(tmp_path):
  source = datasets.open_dialogs(write(tmp_path), "images")
  assert len(source) == 2
  assert source[0] == {
    "id": "visdial_1.0_val.json:0",
    "image": (
      "images/VisualDialog_val2018/VisualDialog_val2018_000000000009.jpg"
    ),
    "image_id": 9,
    "dialog_id": 9,
    "context": "a heart",
    "dialog": (
      dialogs.Round("is it red?", "no", ("yes", "no"), 1),
      dialogs.Round("where?", "left, {right}", ("two", "left, {right}"), 1),
    ),
  }
  assert source[1]["dialog"][1].candidates == ("yes", "two")


def test_dense_annotations_next_to_the_file_or_of_another_name(tmp_path):
  path = write(tmp_path)
  dense = [{"image_id": 12, "round_id": 2, "gt_relevance": [0.5, 0]}]
  official = tmp_path / "visdial_1.0_val_dense_annotations.json"
  official.write_text(json.dumps(dense))
  source = datasets.open_dialogs(path)
  assert source[1]["dialog"][1].relevance == (0.5, 0.0)
  assert source[1]["dialog"][0].relevance == source[0]["dialog"][1].relevance
  assert source[0]["dialog"][1].relevance == ()
  # As in the file for training.
  dense = [{"image_id": 9, "round_id": 1, "relevance": [0, 1]}]
  (tmp_path / "mine.json").write_text(json.dumps(dense))
  source = datasets.open_dialogs(f"{path}?dense={tmp_path}/mine.json")
  assert source[0]["dialog"][0].relevance == (0.0, 1.0)
  assert source[1]["dialog"][1].relevance == ()


def test_in_the_test_split_the_last_answer_is_secret(tmp_path):
  row = make_row(3, answer_options=[0, 1, 3])
  row["dialog"][0] = {"question": 1, "answer": 3}
  source = datasets.open_dialogs(write(tmp_path, "test2018", [row]))
  assert source[0]["image"].endswith("_test2018_000000000003.jpg")
  assert source[0]["dialog"] == (
    dialogs.Round('a "b", [c]?', "two"),
    dialogs.Round("where?", "", ("yes", "no", "two")),
  )


def test_images_of_training_are_in_one_of_two_folders_of_coco(tmp_path):
  names = [
    "train2014/COCO_train2014_000000000012.jpg",
    "val2014/COCO_val2014_000000000009.jpg",
  ]
  for name in names:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).touch()
  source = datasets.open_dialogs(write(tmp_path, "train"), str(tmp_path))
  assert source[1]["image"] == str(tmp_path / names[0])
  assert source[0]["image"] == str(tmp_path / names[1])
  path = write(tmp_path, "train")
  source = datasets.open_dialogs(f"{path}?image_file=all/{{image_id:05}}.png")
  assert source[0]["image"] == "all/00009.png"


def test_a_pickled_source_leaves_the_texts_in_the_file(tmp_path):
  path = write(tmp_path)
  source = datasets.open_dialogs(path)
  assert source[0]["dialog"]
  raw = pickle.dumps(source)
  assert b"is it red" not in raw and b"left" not in raw
  assert pickle.loads(raw)[0] == source[0]


@pytest.mark.parametrize(
  "last, message",
  [
    (dict(answer=4), "dialog 1: expected the number of one of 4 texts, f"),
    (dict(answer="no"), "expected the number of one of 4 texts, found 'no'"),
    (dict(question=-1), "expected the number of one of 3 texts, found -1"),
    (dict(answer_options=[0, 9]), "expected the number of one of 4 texts"),
    (dict(answer_options=7), "'answer_options': expected a list of texts"),
    (dict(gt_index=5), "'gt_index': expected the number of one of 2"),
  ],
)
def test_a_dialog_with_a_mistake_costs_itself(tmp_path, last, message):
  good = ROWS[0]["dialog"][1]
  path = write(tmp_path, rows=[ROWS[0], make_row(12, **{**good, **last})])
  source = datasets.open_dialogs(path)
  assert source[0]["dialog_id"] == 9
  with pytest.raises(sources.BadRow, match=message):
    source[1]


def test_files_that_are_something_else(tmp_path):
  path = tmp_path / "visdial_1.0_val.json"
  path.write_text(json.dumps({"data": {"questions": [], "dialogs": [1]}}))
  with pytest.raises(ValueError, match=r"found no \['answers'\]"):
    datasets.open_dialogs(str(path))
  write(tmp_path, rows=[])
  with pytest.raises(ValueError, match="expected dialogs, found none"):
    datasets.open_dialogs(str(path))
  write(tmp_path)
  path.write_text(path.read_text().replace('"split"', '"part"'))
  with pytest.raises(ValueError, match="no 'split', by which image files"):
    datasets.open_dialogs(str(path))
  write(tmp_path)
  path.write_text(path.read_text()[:-20])
  with pytest.raises(ValueError, match="truncated"):
    datasets.open_dialogs(str(path))


@pytest.mark.parametrize(
  "dense, message",
  [
    ([{"image_id": 12, "round_id": 1}], "expected a list of objects with"),
    ([3], "expected a list of objects with"),
    (
      [{"image_id": 1, "round_id": 1, "relevance": [1, 0]}],
      "do not belong together",
    ),
  ],
)
def test_dense_annotations_of_something_else(tmp_path, dense, message):
  (tmp_path / "mine.json").write_text(json.dumps(dense))
  with pytest.raises(ValueError, match=message):
    datasets.open_dialogs(f"{write(tmp_path)}?dense={tmp_path}/mine.json")
