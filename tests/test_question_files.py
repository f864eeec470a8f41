"""The official files of VQA, OK-VQA and GQA, and those of the presets."""

import json

import pytest

from blip_jax.data import datasets, questions, sources
from tests import short_runs

QUESTIONS = [
  {"image_id": 9, "question": "what is it?", "question_id": 9000},
  {"image_id": 9, "question": "is it red?", "question_id": 9001},
  {"image_id": 30, "question": "how many?", "question_id": 30000},
]
ANNOTATIONS = [
  {
    "question_id": id,
    "image_id": id // 1000,
    "answer_type": "other",
    "question_type": "what",
    "answers": [
      {"answer": answer, "answer_confidence": "yes", "answer_id": n}
      for n, answer in enumerate(answers)
    ],
  }
  for id, answers in ((30000, ["2", "2", "two"]), (9000, ["dog"] * 3))
]


@pytest.fixture
def vqa(tmp_path):
  """Paths of a file of questions and one of annotations."""

  def write(questions=QUESTIONS, annotations=ANNOTATIONS, subtype="val2014"):
    paths = tmp_path / "questions.json", tmp_path / "annotations.json"
    head = {"info": {"year": 2017}, "data_subtype": subtype}
    paths[0].write_text(json.dumps({**head, "questions": questions}))
    paths[1].write_text(json.dumps({**head, "annotations": annotations}))
    return paths

  return write


def test_questions_are_joined_with_their_annotations(vqa):
  paths = vqa()
  source = datasets.open_questions(
    f"{paths[0]}?annotations={paths[1]}", "images"
  )
  first, second, third = (source[n] for n in range(3))
  assert first["image"] == "images/val2014/COCO_val2014_000000000009.jpg"
  assert first["question_id"] == 9000 and first["answers"] == ["dog"] * 3
  assert first["answer_type"] == "other" and first["question_type"] == "what"
  assert "answers" not in second
  weights = questions.weighted(third)
  assert weights == {"2": pytest.approx(2 / 3), "two": pytest.approx(1 / 3)}


def test_annotations_of_the_official_name_are_found(vqa, tmp_path):
  questions_file, annotations = vqa()
  name = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
  questions_file.rename(name)
  assert "answers" not in datasets.open_questions(str(name))[0]
  annotations.rename(tmp_path / "v2_mscoco_val2014_annotations.json")
  assert datasets.open_questions(str(name))[0]["answers"] == ["dog"] * 3


def test_test_splits_share_the_images_of_one(vqa):
  for subtype in ("test2015", "test-dev2015"):
    questions_file, _ = vqa(subtype=subtype)
    record = datasets.open_questions(str(questions_file))[0]
    assert record["image"] == "test2015/COCO_test2015_000000000009.jpg"
    assert "answers" not in record


def test_files_that_do_not_belong_together(vqa):
  others = [{**row, "question_id": -1} for row in ANNOTATIONS]
  paths = vqa(annotations=others)
  with pytest.raises(ValueError, match=r"none of its 2 .* 3 questions"):
    datasets.open_questions(f"{paths[0]}?annotations={paths[1]}")


def test_what_only_one_of_the_files_has_is_reported(vqa, monkeypatch):
  said = []
  monkeypatch.setattr(sources, "warn_once", said.append)
  others = [*ANNOTATIONS, {**ANNOTATIONS[0], "question_id": -1}]
  paths = vqa(annotations=others)
  datasets.open_questions(f"{paths[0]}?annotations={paths[1]}")
  assert "1 of 3 questions have no annotation" in said[0]
  assert "1 of 3 annotations are of no question" in said[0]


def test_a_broken_question_costs_itself(vqa):
  paths = vqa(questions=[{"question_id": 9000}, "nothing", *QUESTIONS])
  source = datasets.open_questions(f"{paths[0]}?annotations={paths[1]}")
  for row in range(2):
    with pytest.raises(sources.BadRow):
      source[row]
  assert source[2]["answers"] == ["dog"] * 3


def test_other_objects_are_refused(vqa, tmp_path):
  questions_file, annotations = vqa()
  with pytest.raises(ValueError, match="a list 'annotations'"):
    datasets.open_questions(f"{questions_file}?annotations={questions_file}")
  with pytest.raises(ValueError, match="annotations; name the file of the q"):
    datasets.open_questions(str(annotations))
  bare = tmp_path / "bare.json"
  bare.write_text(json.dumps({"questions": QUESTIONS}))
  with pytest.raises(ValueError, match=r"'data_subtype'.*\?image_file="):
    datasets.open_questions(str(bare))


def write_official(folder):
  """One question in each of the files that the presets name."""
  answers = [{"answer": "yes", "answer_confidence": "yes"}] * 10
  vqa = {"image_id": 9, "question": "is it red?", "question_id": 90}
  contents = {
    "vg_qa.json": [
      {"image": "vg/1.jpg", "question": "q?", "answer": "a", "dataset": "vg"}
    ]
  }
  for prefix in ("", "v2_"):
    for split in ("train2014", "val2014", "test2015"):
      name = f"mscoco_{split}"
      contents[f"{prefix}OpenEnded_{name}_questions.json"] = {
        "data_subtype": split,
        "questions": [vqa],
      }
      if split != "test2015":
        contents[f"{prefix}{name}_annotations.json"] = {
          "annotations": [{"question_id": 90, "answers": answers}]
        }
  for split in ("train", "val", "test"):
    row = {"image_id": 9, "question": "q?", "question_id": "a9"}
    if split != "test":
      row["direct_answers"] = ["yes"] * 10
    contents[f"aokvqa_v1p0_{split}.json"] = [row]
    row = {"image": f"VizWiz_{split}_00000000.jpg", "question": "q?"}
    if split != "test":
      row["answers"] = answers
    contents[f"vizwiz/{split}.json"] = [row]
  for split in ("train", "val", "testdev"):
    contents[f"gqa/{split}_balanced_questions.json"] = {
      "02930152": {
        "semantic": [{"operation": "select", "dependencies": []}],
        "question": "q?",
        "imageId": "2354786",
        "answer": "yes",
      }
    }
  for name, content in contents.items():
    path = folder / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


IMAGES = {
  "vqa_v2": [
    "data/images/train2014/COCO_train2014_000000000009.jpg",
    "data/images/val2014/COCO_val2014_000000000009.jpg",
    "data/images/vg/1.jpg",
  ],
  "okvqa": ["data/images/train2014/COCO_train2014_000000000009.jpg"],
  "aokvqa": ["data/images/train2017/000000000009.jpg"],
  "gqa": ["data/gqa/images/2354786.jpg"],
  "vizwiz": ["data/vizwiz/images/VizWiz_train_00000000.jpg"],
}


@pytest.mark.parametrize("name", IMAGES)
def test_presets_read_the_files_as_they_are_published(
  tmp_path, monkeypatch, name
):
  write_official(tmp_path)
  monkeypatch.chdir(tmp_path)
  config = short_runs.load_config(name)
  records = [
    datasets.open_questions(spec, config.data.image_root)[0]
    for spec in config.data.train
  ]
  assert [record["image"] for record in records] == IMAGES[name]
  weights = [1.0, 1.0, 0.2] if name == "vqa_v2" else [1.0]
  totals = [sum(questions.weighted(record).values()) for record in records]
  assert totals == pytest.approx(weights)
  for split in (config.evals.val, config.evals.test):
    if split.source:
      record = datasets.open_questions(split.source, split.image_root)[0]
      is_secret = split is config.evals.test and name != "gqa"
      assert ("answers" in record) != is_secret
      if name == "gqa":
        assert record["question_id"] == "02930152"
