"""Status and verification of a job."""

import json
import pathlib
import shlex

import pytest

from blip_jax import defaults
from blip_jax.capfilt import audit, job, ledger, merge, report, rows
from blip_jax.capfilt.engines import handout
from tests import jobs


@pytest.fixture
def config(tmp_path):
  """A finished job over three shards of five images."""
  shards = jobs.write_scene_shards(tmp_path / "shards")
  config = defaults.capfilt().lock()
  config.update(source=(str(shards / "*.tar"),), out=str(tmp_path / "out"))
  texts = {f"{n:05d}": [jobs.IMAGE_TEXTS] * 5 for n in range(3)}
  # The second image of the second shard cannot be read.
  texts["00001"] = [
    jobs.IMAGE_TEXTS[:1],
    (),
    *[jobs.IMAGE_TEXTS[:2]] * 3,
  ]
  jobs.write_capfilt_job(config.out, config, texts)
  return config


def change_done_file(folder, **changes):
  path = folder / "00000.done.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_intact_job_is_counted(config):
  assert audit.verify(config, config.out) == {"work_units": 3, "images": 14}


def test_damaged_rows_are_found(config, tmp_path):
  jobs.flip(tmp_path / "out" / "00002.parquet")
  with pytest.raises(ValueError, match=r"00002.parquet: damaged: .*SHA-256"):
    audit.verify(config, config.out)
  assert audit.status(config, config.out)["damaged"] == 1


def test_a_changed_input_is_found(config, tmp_path):
  shard = tmp_path / "shards" / "00002.tar"
  shard.write_bytes(shard.read_bytes() + b"\0" * 512)
  with pytest.raises(
    ValueError, match="1 problems:\n  00002: not done, or its"
  ):
    audit.verify(config, config.out)


def test_counts_that_do_not_match_the_rows_are_found(config, tmp_path):
  texts = json.loads((tmp_path / "out" / "00000.done.json").read_text())[
    "texts"
  ]
  texts["web"]["in"] = 11
  change_done_file(tmp_path / "out", texts=texts)
  with pytest.raises(ValueError) as error:
    audit.verify(config, config.out)
  assert "00000: web: counts do not add up" in str(error.value)
  assert "web: 11 texts were counted, but 10 rows are there" in str(error.value)


def redo(config, error):
  """Does what an error of `verify` says: deletes, and starts the job again.

  Returns the names of the work units that the job does.
  """
  for line in str(error).splitlines():
    if line.startswith("  rm "):
      for path in shlex.split(line)[1:]:
        pathlib.Path(path).unlink()
  book = ledger.Ledger(config.out)
  book.begin(book.settings, force=False)
  work_units = job.find_work_units(book.settings)
  done = []
  for work_unit, _ in (share := handout.Share(work_units, book)).claims():
    counts = rows.Counts([])
    report = {"work_unit": work_unit.name, "input": work_unit.fingerprint()}
    book.finish(work_unit, rows.to_parquet([]), report | counts.as_json())
    share.end(work_unit)
    done.append(work_unit.name)
  return done


def test_the_advice_for_what_the_job_notices_itself(config, tmp_path):
  """Nothing is to be deleted."""
  out = tmp_path / "out"
  (out / "00000.done.json").unlink()
  (out / "00001.parquet").write_bytes(b"shorter")
  with pytest.raises(ValueError, match="2 problems") as error:
    audit.verify(config, config.out)
  assert "rm " not in str(error.value)
  assert redo(config, error.value) == ["00000", "00001"]
  assert audit.verify(config, config.out)["work_units"] == 3


def test_the_advice_for_what_the_job_trusts(config, tmp_path):
  """A file that the disk has damaged has its old times: without deletion, the
  job would do nothing."""
  shard = tmp_path / "shards" / "00001.tar"
  content = bytearray(shard.read_bytes())
  content[-1] ^= 1
  shard.write_bytes(content)
  done_path = tmp_path / "out" / "00001.done.json"
  done = json.loads(done_path.read_text())
  stat = shard.stat()
  times = {"modified_ns": stat.st_mtime_ns, "changed_ns": stat.st_ctime_ns}
  done_path.write_text(json.dumps(done | {"input": done["input"] | times}))
  (tmp_path / "out" / "00000.done.json").unlink()
  with pytest.raises(ValueError, match="2 problems") as error:
    audit.verify(config, config.out)
  assert "00001: its input has changed" in str(error.value)
  assert redo(config, error.value) == ["00000", "00001"]
  assert audit.verify(config, config.out)["work_units"] == 3


def test_verify_reads_a_file_again_whatever_was_read_before(config, tmp_path):
  audit.verify(config, config.out)
  for name in ("shards/00001.tar", "out/00002.parquet"):
    jobs.flip(tmp_path / name)
    with pytest.raises(ValueError, match=f"  {pathlib.Path(name).stem}: "):
      audit.verify(config, config.out)
    jobs.flip(tmp_path / name)
  audit.verify(config, config.out)


def test_an_image_in_two_work_units_is_found(config, tmp_path):
  change_done_file(tmp_path / "out", bad={"00002.tar:0010": "broken"})
  with pytest.raises(ValueError, match="1 images are in two work") as error:
    audit.verify(config, config.out)
  assert "rm " not in str(error.value)
  assert "into another config.out" in str(error.value)


def test_status_says_which_process_works_on_what(config, tmp_path, caplog):
  (tmp_path / "out" / "00001.done.json").unlink()
  owner = {"host": "elsewhere", "pid": 17, "id": "x"}
  (tmp_path / "out" / ".00001.lease").write_text(json.dumps(owner))
  with caplog.at_level("INFO", logger="blip_jax"):
    results = audit.status(config, config.out)
  assert (results["work_units"], results["work_units_done"]) == (3, 2)
  assert results["images/in"] == 10
  assert results["web/kept"] == 10
  assert "00001: leased to process 17 on elsewhere" in caplog.text
  assert "take it over" not in caplog.text


def test_status_of_no_job_is_refused(tmp_path):
  config = defaults.capfilt().lock()
  with pytest.raises(ValueError, match="no job was started there"):
    audit.status(config, str(tmp_path))


@pytest.mark.parametrize("kind", jobs.NO_FILES)
@pytest.mark.parametrize("name", ["00001.done.json", "00001.parquet"])
def test_every_job_lists_what_is_no_file(config, tmp_path, kind, name):
  jobs.replace_by(tmp_path / "out" / name, kind)
  results = audit.status(config, config.out)
  assert (results["work_units_done"], results["damaged"]) == (2, 1)
  assert report.report(config, config.out)["web/in"] == 20
  for do in (audit.verify, merge.merge):
    with pytest.raises(ValueError, match=f"{name}: damaged: "):
      do(config, config.out)


@pytest.mark.parametrize("kind", [*jobs.NO_FILES])
def test_settings_that_are_no_file_are_refused_by_name(config, tmp_path, kind):
  jobs.replace_by(tmp_path / "out" / "job.json", kind)
  for do in (audit.status, audit.verify, report.report, merge.merge):
    with pytest.raises(ValueError, match=r"job\.json"):
      do(config, config.out)


@pytest.mark.parametrize(
  "changes",
  [
    {"work_unit_rows": 0},
    {"work_unit_rows": -1},
    {"work_unit_rows": "x"},
    {"source": "*.tar"},
    {"source": [None]},
    {"source": 5},
    {"image_root": 5},
    {"web_texts": None},
  ],
)
def test_settings_that_cannot_be_are_refused_by_name(config, tmp_path, changes):
  path = tmp_path / "out" / "job.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  for do in (audit.status, audit.verify, report.report, merge.merge):
    with pytest.raises(ValueError, match=rf"job\.json.* {next(iter(changes))}"):
      do(config, config.out)
