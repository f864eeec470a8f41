"""Answers of a split: the file for the server, accuracy, calibration."""

import json

import numpy as np
import pytest

from blip_jax import defaults
from blip_jax.data import datasets, rejects, transforms
from blip_jax.evaluators import answering, base
from blip_jax.runtime import sharding, train_state
from blip_jax.tasks import vqa
from tests import helpers


@pytest.fixture(scope="module")
def model():
  return helpers.make_model("vqa")


def make_context(model, source, tmp_path, **changes):
  config = vqa.defaults()
  config.evals.batch_size = 4
  config.data.max_length = 12
  config.vqa.answer_list = "scenes"
  config.update_from_flattened_dict(changes)
  settings = defaults.question_split(source)
  example = vqa.example(
    config, helpers.scenes_tokenizer(), transforms.EvalImage(16)
  )
  return base.Context(
    "val",
    settings,
    config,
    vqa.Vqa(model.module),
    example,
    sharding.one_device(),
    rejects.BadSamples(max_fraction=0.9),
    str(tmp_path),
  )


def run(model, context):
  state = train_state.TrainState(0, model.params, None, None)
  return {
    name: value
    for evaluator in answering.build(context)
    for name, value in evaluator.run(state)
  }


def test_a_split_is_answered_as_the_door_answers(model, tmp_path):
  """Ten questions in batches of four; padding is no answer."""
  context = make_context(model, "scenes:val?num=10", tmp_path)
  results = run(model, context)
  written = json.loads((tmp_path / "val_answers.json").read_text())
  source = datasets.open_questions("scenes:val?num=10")
  records = [source[n] for n in range(10)]
  found = model.answer(
    [record["image"] for record in records],
    [record["question"] for record in records],
    "scenes",
  )
  assert written == [
    {"question_id": n, "answer": one.text} for n, one in enumerate(found)
  ]
  right = [
    one.text == record["answers"][0]
    for one, record in zip(found, records, strict=True)
  ]
  assert results["accuracy"] == pytest.approx(100 * np.mean(right))
  assert "loss" in results and 0 <= results["calibration_error"] <= 100
  assert {name for name in results if name.startswith("accuracy/")} == {
    f"accuracy/{kind}"
    for kind in ("count", "colour", "shape", "position", "yes/no")
  }


def test_rows_that_cannot_be_read_and_repeated_ids(model, tmp_path, caplog):
  """Are left out of the file; and questions without answers of the score."""
  helpers.write_images(tmp_path / "images")
  rows = [
    {"image": "0.png", "question": "is it red?", "question_id": 5},
    {"image": "0.png", "question": "is it red?", "question_id": 5},
    {"image": "2b.jpg", "question": "is it red?", "question_id": 6},
    {"image": "1.png", "question": "is it blue?", "question_id": 7},
  ]
  path = tmp_path / "q.json"
  path.write_text(json.dumps(rows))
  context = make_context(
    model, str(path), tmp_path, **{"vqa.inference": "generate"}
  )
  context.settings.image_root = str(tmp_path / "images")
  assert run(model, context) == {}
  written = json.loads((tmp_path / "val_answers.json").read_text())
  assert [row["question_id"] for row in written] == [5, 7]
  assert "1 rows repeat the id of a question" in caplog.text


def test_questions_about_videos(model, tmp_path):
  """As MSRVTT-QA has them; a video is read once for all of its questions."""
  rng = np.random.default_rng(0)
  videos = {n: rng.integers(0, 255, (6, 16, 16, 3), np.uint8) for n in (7, 8)}
  for number, frames in videos.items():
    helpers.write_video(tmp_path / f"video{number}.mp4", frames)
  (tmp_path / "video9.mp4").write_text("no video")
  asked = [(7, "what is it?"), (9, "who is it?"), (8, "what is red?")]
  asked += [(7, "who is it?"), (7, "is it red?"), (8, "how many are there?")]
  rows = [
    {"video_id": id, "question": question, "answer": "no", "id": n}
    for n, (id, question) in enumerate(asked)
  ]
  path = tmp_path / "test_qa.json"
  path.write_text(json.dumps(rows))
  source = f"{path}?image_file=video{{video_id}}.mp4"
  context = make_context(model, source, tmp_path)
  context.settings.image_root = str(tmp_path)
  context.settings.num_frames = 4
  evaluator, *others = answering.build(context)
  assert not others  # no loss
  assert evaluator._grouped.source.rows.tolist() == [
    [0, 3, 4],
    [1, -1, -1],
    [2, 5, -1],
  ]
  results = run(model, context)
  used = [row for row in rows if row["video_id"] != 9]
  found = model.answer(
    [videos[row["video_id"]][[0, 1, 3, 4]] for row in used],
    [row["question"] for row in used],
    "scenes",
    num_frames=4,
  )
  written = json.loads((tmp_path / "val_answers.json").read_text())
  assert written == [
    {"question_id": f"test_qa.json:{row['id']}", "answer": one.text}
    for row, one in zip(used, found, strict=True)
  ]
  right = {
    row["question"]: 100.0 * (one.text == "no")
    for row, one in zip(used, found, strict=True)
  }
  assert results["accuracy"] == pytest.approx(np.mean([*right.values()]))
  assert results["accuracy/who"] == right["who is it?"]
  assert {name for name in results if name.startswith("accuracy/")} == {
    f"accuracy/{word}" for word in ("what", "who", "how")
  }
  assert context.bad_samples.reasons == {"broken_video": 1}


def test_training_questions_are_reported(model, tmp_path, caplog):
  changes = {"data.train": ("scenes:train?num=4",)}
  context = make_context(model, "scenes:train?num=4", tmp_path, **changes)
  answering.build(context)
  assert "the model is trained on these questions" in caplog.text


def test_an_unknown_format_is_refused(model, tmp_path):
  context = make_context(model, "scenes:val?num=4", tmp_path)
  context.settings.format = "coco"
  with pytest.raises(ValueError, match=r"config\.evals\.val\.format: .*'coco'"):
    answering.build(context)
