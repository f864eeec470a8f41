"""Files of evaluators that cannot be written: told, or an error."""

import pytest

from blip_jax.evaluators import result_file
from blip_jax.runtime import files


@pytest.fixture
def impossible(tmp_path):
  """A path where no file can be."""
  path = tmp_path / "val_answers.json"
  path.mkdir()
  return path


def test_a_training_goes_on(impossible, caplog):
  with result_file.ResultFile(impossible, required=False).writing() as path:
    files.write_json(path, [])
  (record,) = caplog.records
  assert record.levelname == "WARNING"
  assert f"{impossible} is not written: " in record.message


def test_an_evaluation_fails(impossible):
  file = result_file.ResultFile(impossible)
  with pytest.raises(IsADirectoryError), file.writing() as path:
    files.write_json(path, [])


def test_other_errors_are_raised(tmp_path):
  file = result_file.ResultFile(tmp_path / "a.json", required=False)
  with pytest.raises(TypeError), file.writing() as path:
    files.write_json(path, object())
