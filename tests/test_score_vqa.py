"""The command that scores answers, and the files that it reads."""

import json

import pytest

from blip_jax.evaluators.scores import vqa_accuracy, vqa_files
from tools import score_vqa


def annotation(id, *answers, **more):
  answers = [{"answer": answer, "answer_id": n} for n, answer in
             enumerate(answers)]  # fmt: skip
  return {"question_id": id, "answers": answers, **more}


@pytest.fixture
def write(tmp_path):
  def write(name, content):
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return str(path)

  return write


def test_both_protocols_are_printed_and_one_is_written(write, tmp_path, capsys):
  annotations = {
    "data_subtype": "val2014",
    "annotations": [
      annotation(1, *["yes"] * 10, answer_type="yes/no", question_type="is it"),
      annotation(2, *["none"] * 10, answer_type="number"),
      annotation(3, "red"),
      {"question_id": 4, "answers": []},
    ],
  }
  results = [
    {"question_id": 1, "answer": "yes"},
    {"question_id": 2, "answer": "0"},
    {"question_id": 9, "answer": "0"},
  ]
  out = tmp_path / "scores.json"
  code = score_vqa.main(
    [
      f"--results={write('r.json', results)}",
      f"--annotations={write('a.json', annotations)}",
      "--protocol=lenient",
      f"--out={out}",
    ]
  )
  lines = capsys.readouterr().out.splitlines()
  assert code == 0
  assert lines[0].split() == ["accuracy", "official", "lenient"]
  assert lines[1].split() == ["overall", "50.00", "100.00"]
  assert "2 answers were scored." in lines
  text = "\n".join(lines)
  assert "1 of the 3 questions have no answer" in text
  assert "1 answers are of no question" in text
  assert "1 rows of" in text
  assert "val2014" in text and "trains on" in text
  scores = json.loads(out.read_text())
  assert scores["overall"] == 100 and scores["protocol"] == "lenient"
  assert scores["perAnswerType"] == {"yes/no": 100, "number": 100}
  assert scores["perQuestionType"] == {"is it": 100}


RECORDS = [
  ({"question_id": 7, "image": "images/VizWiz_val_00000007.jpg"}, "yes"),
  ({"question_id": "8a", "image": "images/VizWiz_val_00000008.jpg"}, "no"),
]


@pytest.mark.parametrize("format", vqa_files.FORMATS)
def test_answers_are_read_as_they_are_written(write, format):
  path = write("r.json", vqa_files.formatted(RECORDS, format))
  read = vqa_files.read_results(path)
  assert [*read.values()] == ["yes", "no"]
  ids = {
    "vqa": [7, "8a"],
    "vizwiz": ["VizWiz_val_00000007.jpg", "VizWiz_val_00000008.jpg"],
  }
  assert [*read] == ids.get(format, ["7", "8a"])


def test_formats_are_those_of_the_servers():
  write = lambda format: vqa_files.formatted(RECORDS[:1], format)
  assert write("vqa") == [{"question_id": 7, "answer": "yes"}]
  assert write("gqa") == [{"questionId": "7", "prediction": "yes"}]
  assert write("vizwiz") == [
    {"image": "VizWiz_val_00000007.jpg", "answer": "yes"}
  ]
  assert write("aokvqa") == {"7": {"direct_answer": "yes"}}


def test_annotations_of_other_data_sets(write):
  gqa = {"5": {"question": "q", "answer": "yes"}, "6": {"answer": "no"}}
  found, split, bad = vqa_files.read_annotations(write("g.json", gqa))
  assert [found[id].answers for id in ("5", "6")] == [["yes"], ["no"]]
  assert not split and not bad
  aokvqa = [{"question_id": "x", "direct_answers": ["a", "b"]}]
  found, *_ = vqa_files.read_annotations(write("a.json", aokvqa))
  assert found["x"].answers == ["a", "b"]


def test_a_mistake_in_an_annotation_costs_itself(write):
  answers = {"answers": ["a"]}
  rows = [
    {"question_id": 1, "question_type": "\ud800", "answer_type": 3, **answers},
    {"question_id": 2, "answers": ["\ud800"]},
    {"question_id": "", **answers},
  ]
  found, _, bad = vqa_files.read_annotations(write("a.json", rows))
  assert found == {1: vqa_accuracy.Question(["a"], "", r"\xed\xa0\x80")}
  assert bad == 2


@pytest.mark.parametrize(
  "content, message",
  [
    ([], "at least one answer"),
    ([{"question_id": 1}], r"row 0: expected a 'question_id' and an 'answer'"),
    ([{"question_id": 1, "answer": "a"}] * 2, "row 1 is a second answer to"),
    (["yes"], "expected a list of objects"),
  ],
)
def test_results_that_cannot_be_read(write, content, message):
  with pytest.raises(ValueError, match=message):
    vqa_files.read_results(write("r.json", content))


def test_the_tool_equals_the_official_program(shared_dir, capsys):
  folder = shared_dir / "data/vqa_eval"
  score_vqa.main(
    [
      f"--results={folder / 'results_perturbed.json'}",
      f"--annotations={folder / 'annotations_400.json'}",
    ]
  )
  overall = capsys.readouterr().out.splitlines()[1].split()
  assert overall[:2] == ["overall", "66.75"]
