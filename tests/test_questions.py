"""Questions and answers of rows: formats, weights, and lists of answers."""

import csv
import json

import pytest

from blip_jax.data import datasets, questions, sources


def record(**row):
  return questions.record({"question": "what is it?", **row}, "x:0", "x: row 0")


def test_answers_weigh_as_many_annotators_gave_them():
  answers = [{"answer": text} for text in ("red", "red", "blue", "red")]
  assert questions.weighted(record(answers=answers)) == {
    "red": 0.75,
    "blue": 0.25,
  }
  assert questions.weighted(record(answer="red")) == {"red": 1.0}
  assert questions.weighted(record(direct_answers=["a", "b"])) == {
    "a": 0.5,
    "b": 0.5,
  }


def test_an_answer_of_visual_genome_weighs_a_fifth():
  assert questions.weighted(record(answer="red", dataset="vg")) == {"red": 0.2}
  assert questions.weighted(record(answer=["red"], dataset="vqa")) == {
    "red": 1.0
  }


def test_weights_of_rows_and_of_answers():
  assert questions.weighted(record(answer="red", weight="0.3")) == {"red": 0.3}
  row = record(answers=["red", "blue"], weight=[0.9, 0.4])
  assert questions.weighted(row) == {"red": 0.9, "blue": 0.4}


def test_ids_types_and_rows_without_answers():
  row = record(question_id=7, answer_type="number", answers=[])
  assert row["question_id"] == 7 and row["answer_type"] == "number"
  assert "answers" not in row and questions.weighted(row) == {}
  assert record()["question_id"] == "x:0"
  assert record(question_id="")["question_id"] == "x:0"
  assert record(question_id="", questionId="7")["question_id"] == "7"
  assert record(answer=3)["answers"] == ["3"]


def test_types_are_single_lines_of_utf_8():
  """They are the names of metrics."""
  row = record(answer_type="a\nb", question_type="\ud800")
  assert row["answer_type"] == r"a\x0ab"
  assert row["question_type"] == r"\xed\xa0\x80"
  assert "answer_type" not in record(answer_type=["number"])


@pytest.mark.parametrize(
  "row, message",
  [
    (dict(question=" "), "x: row 0: expected a question"),
    (dict(question=None), "expected a question, found None"),
    (dict(question="\ud800?"), r"expected a question, found '\\ud800\?'"),
    (dict(answer=[["red"]]), r"'answer': expected texts, found \['red'\]"),
    (dict(answer="red", weight="much"), "'weight': expected 0 to 1000000"),
    (dict(answer="red", weight=-1), "'weight': expected 0 to 1000000"),
    (dict(answer="red", weight=1e300), "'weight': expected 0 to 1000000"),
    (dict(answer="red", weight=10**400), "'weight': expected 0 to 1000000"),
    (dict(answer="red", weight=[1, 2]), "a weight for each of 1 answers"),
    (dict(answers=["red", "\ud800"]), r"'answers': .* found '\\ud800'"),
  ],
)
def test_a_row_with_a_mistake_costs_itself(row, message):
  with pytest.raises(sources.BadRow, match=message):
    record(**row)


def test_a_repeated_answer_counts_once_and_is_reported(caplog):
  listed = questions.answer_list(["yes", "no", "yes"], "answers")
  assert listed == ["yes", "no"]
  assert "1 of 3 answers are repeated, such as 'yes'" in caplog.text


@pytest.mark.parametrize(
  "listed", [[], ["yes", " "], ["yes", 3], ["\ud800"], "yes"]
)
def test_what_is_no_list_of_answers(listed):
  with pytest.raises(ValueError, match=r"answers: .*expected a"):
    questions.answer_list(listed, "answers")


def test_files_of_answers(tmp_path):
  json_file, text = tmp_path / "a.json", tmp_path / "a.txt"
  json_file.write_text('["yes", "no"]')
  text.write_text("yes\n\n no\r\n")
  for path in (json_file, text):
    assert questions.read_answer_list(path) == ["yes", "no"]
  json_file.write_text("[")
  with pytest.raises(ValueError, match=r"a\.json: expected a JSON list"):
    questions.read_answer_list(json_file)
  with pytest.raises(ValueError, match=r"list such as .* found .*b\.txt"):
    questions.read_answer_list(tmp_path / "b.txt")


ROWS = [
  {"image": "a.png", "question": "is it red?", "answer": "yes"},
  {"image": "b.png", "question": "how many?", "answer": ["two", "3"]},
]


def test_tables_and_lists_give_the_same_records(tmp_path):
  (tmp_path / "q.json").write_text(json.dumps(ROWS))
  (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
  with open(tmp_path / "q.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, [*ROWS[0]])
    writer.writeheader()
    for row in ROWS:
      answer = row["answer"]
      answer = answer if isinstance(answer, str) else json.dumps(answer)
      writer.writerow({**row, "answer": answer})
  for name in ("q.json", "q.jsonl", "q.csv"):
    source = datasets.open_questions(str(tmp_path / name), "images")
    assert [source[n]["image"] for n in range(2)] == [
      "images/a.png",
      "images/b.png",
    ]
    assert [source[n]["answers"] for n in range(2)] == [["yes"], ["two", "3"]]
    assert source[0]["question_id"] == f"{name}:0"


def test_images_by_their_ids(tmp_path):
  """As A-OKVQA names those of COCO."""
  path = tmp_path / "aokvqa.json"
  rows = [
    {"image_id": 9, "question": "what?", "question_id": "x9"},
    {"image_id": "../x", "question": "what?"},
    {"question": "what?"},
  ]
  path.write_text(json.dumps(rows))
  source = datasets.open_questions(
    f"{path}?image_file=val2017/{{image_id:012}}.jpg", "coco"
  )
  assert source[0]["image"] == "coco/val2017/000000000009.jpg"
  assert source[0]["question_id"] == "x9"
  for row in (1, 2):
    with pytest.raises(sources.BadRow, match="expected the id of an image"):
      source[row]
  with pytest.raises(ValueError, match=r"image_file: .*\{image_id\}"):
    datasets.open_questions(f"{path}?image_file=val2017/9.jpg")


def test_videos_by_any_column(tmp_path):
  """As MSRVTT-QA names those of MSR-VTT, and as a table names them."""
  path = tmp_path / "test_qa.json"
  row = {"answer": "couch", "category_id": 14, "id": 158581, "video_id": 6513}
  rows = [
    {**row, "question": "what are three people sitting on?"},
    {**row, "question": "who is it?", "video_id": None},
  ]
  path.write_text(json.dumps(rows))
  named = f"{path}?image_file=video{{video_id}}.mp4"
  source = datasets.open_questions(named, "videos")
  assert source[0]["image"] == "videos/video6513.mp4"
  assert source[0]["answers"] == ["couch"]
  assert "image_id" not in source[0]
  with pytest.raises(sources.BadRow, match="expected the id of an image"):
    source[1]
  with pytest.raises(ValueError, match="name of an image under 'clip', for"):
    datasets.open_questions(f"{path}?image_file={{clip}}.mp4")
  with pytest.raises(ValueError, match="image_file: expected a path with"):
    datasets.open_questions(f"{path}?image_file={{video_id}}/{{id}}.mp4")
  # MSVD-QA has names for the names.
  mapping = tmp_path / "youtube_mapping.txt"
  mapping.write_text("-4wsuPCjDBc_5_15 vid6513\n_a_b vid1\n")
  named = f"{path}?image_file=vid{{video_id}}.avi&names={mapping}"
  source = datasets.open_questions(named, "clips")
  assert source[0]["image"] == "clips/-4wsuPCjDBc_5_15.avi"
  mapping.write_text("_a_b vid1\n")
  with pytest.raises(sources.BadRow, match=r"'vid6513' is not in .*\.txt"):
    datasets.open_questions(named)[0]
  mapping.write_text("one two three\n")
  with pytest.raises(ValueError, match=r"expected lines of two names, .*three"):
    datasets.open_questions(named)
  table = tmp_path / "q.csv"
  table.write_text("video,question,answer\na.mp4,who is it?,man\n")
  assert datasets.open_questions(str(table), "v")[0]["image"] == "v/a.mp4"


def test_questions_have_types():
  kind = questions.question_type
  assert kind({"question": "Who is it?", "question_type": "person"}) == "person"
  assert kind({"question": "Who is it?"}) == "who"
  assert kind({"question": "is it red?"}) == ""


@pytest.mark.parametrize("name", ["q.tar", "q.parquet", "nothing"])
def test_sources_without_questions_are_refused(tmp_path, name):
  with pytest.raises(ValueError, match=r"expected questions in a \.json"):
    datasets.open_questions(str(tmp_path / name))


def test_a_table_without_questions_is_refused(tmp_path):
  path = tmp_path / "q.csv"
  path.write_text("image,caption\na.png,a dog\n")
  with pytest.raises(ValueError, match="expected text under 'question'"):
    datasets.open_questions(str(path))
