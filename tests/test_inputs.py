"""From a config to the training loader and the list of bad samples."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from blip_jax import defaults
from blip_jax.data import examples, inputs, randaugment, transforms
from tests import helpers


def _config(**data):
  config = defaults.training("caption")
  config.batch_size = 4
  config.model.image_size = 16
  config.data.update({"train": ("scenes:train?num=12",), **data})
  return config


def _example(image):
  return examples.PairExample(helpers.scenes_tokenizer(), image)


def _first_batch(config, workdir, *process):
  loader = inputs.train_loader(config, _example, str(workdir), *process)
  try:
    return next(loader)
  finally:
    loader.close()


@pytest.mark.parametrize(
  "augment, expected",
  [
    (True, transforms.TrainImage(16, 0.5, randaugment.RandAugment())),
    (False, transforms.EvalImage(16)),
  ],
)
def test_the_config_chooses_the_image_transform(tmp_path, augment, expected):
  transform = []

  def make_example(image):
    transform.append(image)
    return _example(image)

  config = _config(augment=augment, min_scale=0.5)
  inputs.train_loader(config, make_example, str(tmp_path)).close()
  assert transform == [expected]


def test_processes_share_the_global_batch(tmp_path):
  arrays, ids = _first_batch(_config(), tmp_path)
  assert arrays["image"].shape == (4, 16, 16, 3)
  parts = [_first_batch(_config(), tmp_path, i, 2) for i in range(2)]
  assert [part["image"].shape[0] for part, _ in parts] == [2, 2]
  assert sorted(parts[0][1] + parts[1][1]) == sorted(ids)


def test_sources_weights_and_rotation_come_from_the_config(tmp_path):
  for number in range(2):
    row = {"image": "a.png", "caption": "a red circle"}
    path = tmp_path / f"split_{number}.json"
    path.write_text(json.dumps([row]))
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
  config = _config(
    train=("", "scenes:train?num=12"),  # an empty source is left out
    rotate=f"{tmp_path}/split_*.json",
    image_root=str(tmp_path),
    weights=(1, 1),
  )
  _, ids = _first_batch(config, tmp_path)
  assert sorted(id for id in ids if "split" in id) == [
    "split_0.json:0",
    "split_1.json:0",
  ]
  assert sum(id.startswith("scenes/train:") for id in ids) == 2


@pytest.mark.parametrize("batch_size, warned", [(12, False), (13, True)])
def test_a_batch_larger_than_the_data_is_warned_of(
  tmp_path, caplog, batch_size, warned
):
  config = _config()
  config.batch_size = batch_size
  _, ids = _first_batch(config, tmp_path)
  assert len(ids) == batch_size and len(set(ids)) == 12
  expected = ["config.batch_size: there are only 12 rows"] if warned else []
  found = [record.getMessage() for record in caplog.records]
  assert [message[:41] for message in found] == expected
  assert all("--config.batch_size=12 or less" in message for message in found)


def test_a_rotating_split_smaller_than_a_batch_is_warned_of(tmp_path, caplog):
  for number, num_rows in enumerate((40, 3)):
    rows = [{"image": "a.png", "caption": "a red circle"}] * num_rows
    (tmp_path / f"split_{number}.json").write_text(json.dumps(rows))
  config = _config(train=(), rotate=f"{tmp_path}/split_*.json")
  inputs.train_loader(config, _example, str(tmp_path)).close()
  assert "only 3 rows" in caplog.text


def test_the_log_says_how_many_rows_each_source_has(tmp_path, caplog):
  row = {"image": "a.png", "caption": ["a red circle", "a disc"]}
  for number in range(2):
    path = tmp_path / f"split_{number}.json"
    path.write_text(json.dumps([row] * (5 + number)))
  rotate = f"{tmp_path}/split_*.json"
  config = _config(
    train=("scenes:train?num=1200", "", "scenes:train?num=3"), rotate=rotate
  )
  with caplog.at_level("INFO", "blip_jax"):
    inputs.train_loader(config, _example, str(tmp_path)).close()
  assert [record.getMessage() for record in caplog.records] == [
    "Training data: 1,200 rows of scenes:train?num=1200",
    "Training data: 3 rows of scenes:train?num=3",
    f"Training data, in turn: 5 | 6 rows of {rotate}",
  ]


def test_each_process_has_its_own_list_of_bad_samples(tmp_path):
  config = _config()
  paths = [
    pathlib.Path(inputs.bad_samples(config, str(tmp_path), i).path)
    for i in range(3)
  ]
  assert [path.name for path in paths] == [
    "bad_samples.jsonl",
    "bad_samples_process1.jsonl",
    "bad_samples_process2.jsonl",
  ]
  assert {path.parent for path in paths} == {tmp_path}


def test_bad_samples_are_listed_in_the_workdir(tmp_path):
  rows = [{"image": "missing.png", "caption": "a red circle"}]
  (tmp_path / "rows.json").write_text(json.dumps(rows))
  config = _config(
    train=("scenes:train?num=4", f"{tmp_path}/rows.json"),
    max_bad_fraction=0.5,
  )
  config.batch_size = 8  # more than an epoch has
  _first_batch(config, tmp_path)
  (line,) = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
  assert json.loads(line)["reason"] == "missing"


def _image_ids(tmp_path, rows_of_source, specs):
  """The number of each image, by the id of its row."""
  for name, rows in rows_of_source.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(rows))
  for name in ("0.png", "9.png"):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
  config = _config(
    train=tuple(str(tmp_path / spec) for spec in specs),
    image_root=str(tmp_path),
  )
  config.batch_size = sum(len(rows_of_source[spec]) for spec in specs)
  make = lambda image: examples.PairExample(
    helpers.scenes_tokenizer(), image, with_image_id=True
  )
  loader = inputs.train_loader(config, make, str(tmp_path))
  try:
    arrays, ids = next(loader)
  finally:
    loader.close()
  return [
    number
    for _, number in sorted(zip(ids, arrays["image_id"].tolist(), strict=True))
  ]


def test_ids_of_images_are_those_of_their_source(tmp_path):
  """Files of one name have the same ids of different images."""
  rows = {
    f"{folder}/m.json": [{"image": image, "image_id": 1, "caption": "x"}]
    for folder, image in (("a", "0.png"), ("b", "9.png"))
  }
  first, second = _image_ids(tmp_path, rows, [*rows])
  assert first != second
  # A source that is listed twice is one.
  first, second = _image_ids(tmp_path, rows, ["a/m.json"] * 2)
  assert first == second


def test_rows_of_one_path_are_one_image_if_only_some_have_an_id(tmp_path):
  rows = [{"image": "0.png", "caption": "x", "image_id": n} for n in (1, None)]
  other = {"image": "9.png", "caption": "x", "image_id": 2}
  one, same, another = _image_ids(
    tmp_path, {"m.json": [*rows, other]}, ["m.json"]
  )
  assert one == same != another


def test_an_empty_caption_costs_only_itself_and_is_listed_once(tmp_path):
  row = {"image": "0.png", "caption": ["a red circle", None, ""]}
  (tmp_path / "m.json").write_text(json.dumps([row]))
  Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
  config = _config(train=(str(tmp_path / "m.json"),), image_root=str(tmp_path))
  _, ids = _first_batch(config, tmp_path)
  assert ids == ["m.json:0"] * 4
  lines = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
  assert [json.loads(line)["id"] for line in lines] == [
    "m.json:0#1",
    "m.json:0#2",
  ]
