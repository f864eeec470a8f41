"""Videos: decoding of frames, and the recipe for video retrieval."""

import importlib
import json
import pathlib
import sys

import numpy as np
import pytest

from blip_jax import evaluate
from blip_jax.data import examples, transforms, video
from tests import helpers, short_runs


@pytest.fixture(autouse=True)
def quick_to_compile(monkeypatch):
  short_runs.make_quick(monkeypatch)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  return short_runs.write_pretrained(tmp_path_factory.mktemp("pretrained"))


def clip(num_frames, height=32, width=48):
  """Returns frames of which frame i has the grey value i everywhere."""
  grey = np.arange(num_frames, dtype=np.uint8)
  return np.broadcast_to(
    grey[:, None, None, None], (num_frames, height, width, 3)
  ).copy()


def test_frames_are_those_of_the_original():
  """floor(arange(0, n, n / 8)), calculated by hand."""
  numbers = lambda n: transforms.frame_numbers(n, 8, "").tolist()
  assert numbers(8) == [0, 1, 2, 3, 4, 5, 6, 7]
  assert numbers(20) == [0, 2, 5, 7, 10, 12, 15, 17]
  assert numbers(301) == [0, 37, 75, 112, 150, 188, 225, 263]


@pytest.mark.parametrize("total", [8, 20, 101])
def test_the_right_frames_are_decoded(tmp_path, total):
  helpers.write_video(tmp_path / "a.mkv", clip(total))
  frames = video.read(tmp_path / "a.mkv", 8, (16, 24))
  assert frames.shape == (8, 16, 24, 3) and frames.dtype == np.uint8
  expected = transforms.frame_numbers(total, 8, "")
  np.testing.assert_array_equal(frames[:, 0, 0, 0], expected)
  assert (frames == frames[:, :1, :1]).all()


def test_a_name_without_an_extension_is_an_mp4(tmp_path):
  helpers.write_video(tmp_path / "video7010.mp4", clip(9))
  example = examples.ImageExample(transforms.EvalImage(16), num_frames=4)
  record = {"image": str(tmp_path / "video7010"), "id": "a"}
  frames = example(record, np.random.default_rng(0))["image"]
  np.testing.assert_array_equal(frames[:, 0, 0, 0], [0, 2, 4, 6])


def test_unusable_videos_give_a_reason(tmp_path):
  helpers.write_video(tmp_path / "short.mkv", clip(7))
  (tmp_path / "text.mp4").write_text("no video at all")
  content = (tmp_path / "short.mkv").read_bytes()
  (tmp_path / "empty.avi").touch()
  (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 4])
  for name, reason in (
    ("short.mkv", "too_few_frames.*expected 8 frames or more, found 7"),
    ("text.mp4", "broken_video"),
    ("empty.avi", "broken_video"),
    ("cut.mkv", "too_few_frames|broken_video"),
    ("nowhere", r"missing.*nowhere\.mp4"),
  ):
    with pytest.raises(transforms.BadSample, match=reason):
      video.read(tmp_path / name, 8, (16, 16))


def msrvtt_config(tmp_path, rows, root, weights):
  """MSR-VTT's recipe on other clips, shrunk."""
  (tmp_path / "clips.json").write_text(json.dumps(rows))
  config = short_runs.shrunk_config("retrieval_msrvtt")
  config.init.weights = str(weights)
  config.evals.test.source = f"{tmp_path}/clips.json"
  config.evals.test.image_root = str(root)
  config.evals.test.num_frames = 4
  return config


def test_the_recipe_ranks_clips_and_skips_a_broken_one(
  tmp_path,
  pretrained,
):
  rng = np.random.default_rng(0)
  rows = []
  for number in range(5):
    frames = rng.integers(0, 255, (6, 16, 16, 3)).astype(np.uint8)
    helpers.write_video(tmp_path / f"{number}.mkv", frames)
    caption = f"{number} noisy images"
    rows.append({"video": f"{number}.mkv", "caption": caption})
  (tmp_path / "bad.mkv").write_text("no video")
  rows.insert(2, {"video": "bad.mkv", "caption": "nothing"})
  config = msrvtt_config(tmp_path, rows, tmp_path, pretrained)
  config.data.max_bad_fraction = 0.5
  results = evaluate.evaluate(config, str(tmp_path / "out"))
  names = {"t2v_r1", "v2t_r1", "vid_r1", "txt_r1", "vid_mdR", "r_mean"}
  names |= {f"itc_{name}" for name in names}
  assert {f"test/{name}" for name in names} <= results.keys()
  assert results["test/t2v_r10"] == 100 and results["test/t2v_mdR"] <= 5
  (line,) = (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()
  assert json.loads(line)["reason"] == "broken_video"


def test_the_recipe_for_questions(tmp_path, pretrained):
  """MSRVTT-QA's files, and the list that the recipe names."""
  config = short_runs.shrunk_config("videoqa_zero_shot")
  recipe = short_runs.load_config("videoqa_zero_shot")
  split = config.evals.test
  split.source = str(tmp_path / recipe.evals.test.source)
  split.image_root = str(tmp_path / recipe.evals.test.image_root)
  assert split.num_frames == 16 and recipe.evals.batch_size == 32
  config.vqa.answer_list = str(tmp_path / recipe.vqa.answer_list)
  videos, questions = map(
    pathlib.Path, (split.image_root, config.vqa.answer_list)
  )
  videos.mkdir(parents=True)
  questions.parent.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for number in range(3):
    frames = rng.integers(0, 255, (18, 16, 16, 3), np.uint8)
    helpers.write_video(videos / f"video{number}.mp4", frames)
  helpers.write_video(videos / "video3.mp4", frames[:9])
  words = ("what", "who", "how", "when", "where")
  rows = [
    {
      "answer": "red",
      "category_id": 14,
      "id": 10 * number + n,
      "question": f"{word} is in the image?",
      "video_id": number,
    }
    for number in range(4)
    for n, word in enumerate(words)
  ]
  (questions.parent / "test_qa.json").write_text(json.dumps(rows))
  questions.write_text("red\nblue\n")
  config.init.weights = str(pretrained)
  config.data.max_bad_fraction = 0.5
  results = evaluate.evaluate(config, str(tmp_path / "out"))
  assert {f"test/accuracy/{word}" for word in words} <= results.keys()
  answers = json.loads((tmp_path / "out/test_answers.json").read_text())
  assert [row["question_id"] for row in answers] == [
    f"test_qa.json:{n}" for n in range(15)
  ]
  right = np.mean([row["answer"] == "red" for row in answers])
  assert results["test/accuracy"] == pytest.approx(100 * right)
  (line,) = (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()
  assert json.loads(line)["reason"] == "too_few_frames"


def test_the_recipe_runs_on_real_clips(
  tmp_path,
  shared_dir,
  pretrained,
):
  root = shared_dir / "data" / "videos_small"
  rows = json.loads((root / "captions.json").read_text())
  results = evaluate.evaluate(
    msrvtt_config(tmp_path, rows, root, pretrained), str(tmp_path / "out")
  )
  assert results["test/t2v_r10"] == results["test/v2t_r10"] == 100
  assert not (tmp_path / "out/bad_samples.jsonl").exists()


def test_the_error_without_pyav_names_the_extra_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "av", None)
  monkeypatch.delitem(sys.modules, "blip_jax.data.video")
  with pytest.raises(ValueError, match=r"pip install 'blip_jax\[video\]'"):
    importlib.import_module("blip_jax.data.video")


def test_any_error_of_the_reader_costs_its_video(tmp_path, monkeypatch):
  helpers.write_video(tmp_path / "a.mkv", np.zeros((6, 16, 16, 3), np.uint8))

  def fail(*_):
    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a title in latin-1")

  monkeypatch.setattr(video.av, "open", fail)
  with pytest.raises(transforms.BadSample, match=r"broken_video.*latin-1"):
    video.read(tmp_path / "a.mkv", 2, 16)


@pytest.mark.parametrize("limit, is_refused", [(48 * 32, False), (1535, True)])
def test_frames_may_have_as_many_pixels_as_images(
  tmp_path, monkeypatch, limit, is_refused
):
  helpers.write_video(tmp_path / "a.mkv", clip(3))
  monkeypatch.setattr(transforms, "MAX_PIXELS", limit)
  if is_refused:
    with pytest.raises(transforms.BadSample, match=r"too_large.* 48 x 32"):
      video.read(tmp_path / "a.mkv", 2, 8)
  else:
    assert video.read(tmp_path / "a.mkv", 2, 8).shape == (2, 8, 8, 3)


def test_a_video_may_have_just_enough_frames(tmp_path):
  helpers.write_video(tmp_path / "a.mkv", clip(8))
  assert len(video.read(tmp_path / "a.mkv", 8, 16)) == 8
  with pytest.raises(transforms.BadSample, match="expected 9 frames"):
    video.read(tmp_path / "a.mkv", 9, 16)
