"""The job `answer`: its lines, bad images, and resuming."""

import json

import numpy as np
import pytest

from blip_jax import defaults
from blip_jax.inference import answer_images, answering, line_job, loading
from blip_jax.runtime import sharding
from tests import helpers, short_runs


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("model") / "vqa"
  return helpers.write_golden("blip_vqa", folder)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  mesh = sharding.one_device()
  monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)


@pytest.fixture
def table(tmp_path):
  """Five questions, one about a file that is no image and one about none."""
  helpers.write_images(tmp_path / "images")
  rows = [
    {"image": f"{n}.png", "question": f"how many dogs? {n}", "question_id": n}
    for n in (0, 1, 2)
  ]
  rows.insert(1, {"image": "2b.jpg", "question": "what is it?"})
  rows.append({"image": "nothing.png", "question": "what is it?"})
  path = tmp_path / "questions.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def make(answerer, images, **changes):
  config = defaults.answer_images()
  config.update(dict(images=str(images), model=answerer, batch_size=2))
  config.image_root = str(images.parent / "images")
  config.update(changes)
  return config.lock()


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_question_has_a_line(answerer, table, tmp_path):
  (tmp_path / "list.txt").write_text("yes\nno\ntwo\n")
  config = make(
    answerer, table, answer_list=str(tmp_path / "list.txt"), num_answers=2
  )
  results = answer_images.answer_images(config, str(tmp_path))
  assert results == {"images": 5, "unreadable": 2}
  lines = lines_of(tmp_path / "answers.jsonl")
  assert [line["row"] for line in lines] == [*range(5)]
  assert ["error" in line for line in lines] == [
    False,
    True,
    False,
    False,
    True,
  ]
  first = lines[0]
  assert first["question"] == "how many dogs? 0" and first["question_id"] == 0
  assert first["answer"] in ("yes", "no", "two") and 0 < first["prob"] <= 1
  assert len(first["others"]) == 1 and "stamp" not in first
  # The same command leaves a complete file as it is.
  before = (tmp_path / "answers.jsonl").read_bytes()
  assert answer_images.answer_images(config, str(tmp_path)) == {"images": 5}
  assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_a_stopped_job_resumes(answerer, table, tmp_path, monkeypatch):
  config = make(answerer, table)
  answer_images.answer_images(config, str(tmp_path / "whole"))
  out = tmp_path / "answers.jsonl"
  numbered = line_job._numbered

  def stopping(rows):
    for number, batch in enumerate(numbered(rows)):
      if number == 1:
        raise KeyboardInterrupt
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(line_job, "_numbered", stopping)
    with pytest.raises(KeyboardInterrupt):
      answer_images.answer_images(config, str(tmp_path))
  assert len(lines_of(tmp_path / "answers.jsonl.part0")) == 2
  with pytest.raises(ValueError, match="num_answers: 1 there, 2 now"):
    answer_images.answer_images(
      make(answerer, table, num_answers=2), str(tmp_path)
    )
  answer_images.answer_images(config, str(tmp_path))
  assert out.read_bytes() == (tmp_path / "whole/answers.jsonl").read_bytes()


def test_a_question_that_has_changed_is_answered_again(
  answerer, table, tmp_path
):
  config = make(answerer, table)
  out = tmp_path / "answers.jsonl"
  answer_images.answer_images(config, str(tmp_path))
  changed = lines_of(out)
  for line in changed:
    line["stamp"] = None
  part = tmp_path / "answers.jsonl.part0"
  part.write_text("".join(json.dumps(line) + "\n" for line in changed[:1]))
  settings = json.loads((tmp_path / "answers.jsonl.job.json").read_text())
  del settings["sha256"]
  (tmp_path / "answers.jsonl.job.json").write_text(json.dumps(settings))
  out.unlink()
  text = table.read_text().replace("how many dogs? 0", "where is it?")
  table.write_text(text)
  answer_images.answer_images(config, str(tmp_path))
  assert lines_of(out)[0]["question"] == "where is it?"


def test_questions_about_one_image_are_asked_together(
  answerer, tmp_path, monkeypatch
):
  """Their lines are in the order of the rows, and as if each were alone."""
  helpers.write_images(tmp_path / "images")
  images = ["0.png", "1.png", "0.png", "2b.jpg", "1.png", "0.png", "1.png"]
  rows = [
    {"image": image, "question": f"how many dogs? {n}", "question_id": n}
    for n, image in enumerate([*images, "0.png"])
  ]
  rows[4]["question"] = "..."
  path = tmp_path / "questions.json"
  path.write_text(json.dumps(rows))
  config = make(answerer, path, batch_size=4)
  shapes = []
  answer = answering.Answerer.__call__

  def noted(self, pixels, ids, mask):
    shapes.append((len(pixels), len(ids)))
    return answer(self, pixels, ids, mask)

  with monkeypatch.context() as patch:
    patch.setattr(answering.Answerer, "__call__", noted)
    results = answer_images.answer_images(config, str(tmp_path))
  assert results == {"images": 8, "unreadable": 2}
  # 0.png has four questions, 1.png two, 2b.jpg one, and "..." is alone.
  assert shapes == [(2, 4)] * 3
  lines = lines_of(tmp_path / "answers.jsonl")
  assert [line["row"] for line in lines] == [*range(8)]
  assert [line["question"] for line in lines] == [r["question"] for r in rows]
  assert lines[3]["error"].startswith("not_an_image")
  assert "empty_caption" in lines[4]["error"]
  model = loading.load(answerer, mesh=sharding.make_mesh(None))
  for row, line in zip(rows, lines, strict=True):
    assert line["id"] == f"questions.json:{row['question_id']}"
    if "error" not in line:
      image = tmp_path / "images" / row["image"]
      (alone,) = model.answer(image, row["question"], num_answers=1)
      assert line["answer"] == alone.text
      assert line["log_prob"] == pytest.approx(alone.log_prob, abs=1e-3)


def test_questions_about_videos(answerer, tmp_path):
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 255, (6, 16, 16, 3), np.uint8)
  (tmp_path / "images").mkdir()
  helpers.write_video(tmp_path / "images/a.mkv", frames)
  path = tmp_path / "q.csv"
  path.write_text(
    "video,question\na.mkv,how many dogs?\nb.mkv,who?\na.mkv,why?"
  )
  config = make(answerer, path, num_frames=3)
  results = answer_images.answer_images(config, str(tmp_path))
  assert results == {"images": 3, "unreadable": 1}
  first, missing, last = lines_of(tmp_path / "answers.jsonl")
  assert missing["error"].startswith("missing")
  model = loading.load(answerer, mesh=sharding.make_mesh(None))
  asked = ["how many dogs?", "why?"]
  expected = model.answer(
    tmp_path / "images/a.mkv", asked, num_frames=3, num_answers=1
  )
  assert [first["answer"], last["answer"]] == [one.text for one in expected]
  config = make(
    answerer, tmp_path / "images", question="who?", num_frames=3, image_root=""
  )
  answer_images.answer_images(config, str(tmp_path / "folder"))
  (line,) = lines_of(tmp_path / "folder/answers.jsonl")
  assert line["id"] == "a.mkv" and "answer" in line


def test_one_question_about_a_folder(answerer, tmp_path):
  folder = helpers.write_images(tmp_path / "images")
  config = make(answerer, folder, question="how many dogs?", image_root="")
  results = answer_images.answer_images(config, str(tmp_path))
  assert results == {"images": 7, "unreadable": 1}
  lines = lines_of(tmp_path / "answers.jsonl")
  assert {line["question"] for line in lines} == {"how many dogs?"}


def test_mistakes(answerer, tmp_path):
  def run(**changes):
    config = make(answerer, tmp_path / "x.csv", **changes)
    answer_images.answer_images(config, str(tmp_path))

  with pytest.raises(ValueError, match=r"config\.images: no questions"):
    answer_images.answer_images(defaults.answer_images(), str(tmp_path))
  with pytest.raises(ValueError, match=r"config\.question: .*empty"):
    run(question="...")
  with pytest.raises(ValueError, match=r"x\.csv: no such annotation file"):
    run()
  with pytest.raises(ValueError, match=r"config\.num_answers: expected at le"):
    run(num_answers=0)


def test_the_command_of_the_recipe(answerer, tmp_path, monkeypatch):
  helpers.write_pairs(tmp_path)
  monkeypatch.chdir(tmp_path)
  path = short_runs.ROOT / "configs" / "answer_images.py"
  words, *_ = short_runs.docstring_commands(path)
  keys = dict(word.removeprefix("--config.").split("=") for word in words[2:])
  config = make(answerer, tmp_path / keys.pop("images"), **keys)
  assert answer_images.answer_images(config, ".")["images"] == 16
  assert (tmp_path / "answers.jsonl").exists()
