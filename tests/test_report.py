"""The report of a job, as files in its folder."""

import csv
import json
import re

import pytest

from blip_jax import defaults
from blip_jax.capfilt import report
from tests import jobs

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def listed(tmp_path):
  return jobs.write_listed_capfilt_job(tmp_path)


def test_a_report_shows_what_the_rules_keep(listed, tmp_path):
  config = defaults.capfilt().lock()
  config.update(source=listed.source, image_root=listed.image_root)
  config.out = str(tmp_path / "other")
  texts = jobs.IMAGE_TEXTS
  labels = [[("web", 0.9, HOSTILE)], texts, texts[1:2], (), texts[:2]]
  job = jobs.write_capfilt_job(config.out, config, {"web.json-00000": labels})
  (job.folder / "log").mkdir()
  line = {"work_unit": "web.json-00000", "images": 5, "seconds": 2.0}
  (job.folder / "log" / "here-1.jsonl").write_text(
    json.dumps(line) + "\n" + '{"work_unit": "web.js'  # being written
  )
  assert report.report(config, config.out) == {
    "web/in": 6,
    "web/kept": 3,
    "web/below_threshold": 3,
    "synthetic/in": 2,
    "synthetic/kept": 1,
    "synthetic/near_duplicate": 1,
  }
  content = json.loads((job.folder / "report.json").read_text())
  assert content["images"] == {"in": 5, "kept": 3, "dropped": 2, "bad": 0}
  assert content["texts_per_image"] == {"0": 2, "1": 2, "2": 1}
  counts = content["histogram"]["web"]["counts"]
  assert sum(counts) == 6
  assert counts[0] == counts[-1] == 3  # 0.2 and 0.9
  assert content["words"]["before"]["texts"] == 6
  assert content["words"]["after"]["texts"] == 4
  assert ["a red circle", 2] in content["frequent"]
  assert content["rules"]["threshold"] == 0.5
  assert content["job"]["source"] == list(listed.source)
  assert content["throughput"] == {
    "here-1": {"images": 5, "seconds": 2.0, "images_per_second": 2.5}
  }
  page = (job.folder / "report.html").read_text()
  assert HOSTILE not in page
  assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
  # The images that have texts are near the threshold or far from it.
  assert page.count("<small>") == page.count("<figure>")
  near, far = set(), set()
  for section in page.split("<section>"):
    keys = re.findall("<small>(.*?)</small>", section)
    (near if "near the threshold</h2>" in section else far).update(keys)
  assert near | far == {f"web.json:{n}" for n in (0, 1, 2, 4)}
  assert near and far and not near & far
  assert page.count('src="data:image/jpeg;base64,') == page.count("src=")
  with (job.folder / "report.csv").open(newline="") as file:
    table = [*csv.DictReader(file)]
  assert [line["text"] for line in table if line["kept"] == "True"] == [
    HOSTILE,
    "A red circle.",
    "a red circle left of a blue star",
    "A red circle.",
  ]
  assert len(table) == 8


def test_only_work_units_that_are_done_are_shown(listed, tmp_path):
  (tmp_path / "out" / "web.json-00001.done.json").unlink()
  results = report.report(listed, listed.out)
  assert results["web/in"] == 3
  content = json.loads((tmp_path / "out" / "report.json").read_text())
  assert content["images"]["in"] == 3
  assert content["throughput"] == {}


def test_a_report_without_work_units_is_refused(listed, tmp_path):
  for path in (tmp_path / "out").glob("*.done.json"):
    path.unlink()
  with pytest.raises(ValueError, match="no work unit is done"):
    report.report(listed, listed.out)


def test_the_speed_of_each_process(tmp_path):
  lines = [{"images": 30, "seconds": 1.26}, {"images": 10, "seconds": 0.74}]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (tmp_path / "a-1.jsonl").write_text(text + '{"images": 7')
  (tmp_path / "b-2.jsonl").write_text('{"images": 3, "seconds": 0.0}\n')
  (tmp_path / "notes.txt").write_text("mine")
  assert report._throughput(tmp_path) == {
    "a-1": {"images": 40, "seconds": 2.0, "images_per_second": 20.0},
    "b-2": {"images": 3, "seconds": 0.0, "images_per_second": 3000.0},
  }


def test_rows_with_a_flipped_bit_are_left_out_and_listed(listed, tmp_path):
  jobs.flip(tmp_path / "out" / "web.json-00001.parquet")
  results = report.report(listed, listed.out)
  assert results["damaged"] == 1 and results["web/in"] == 3
  damaged = json.loads((tmp_path / "out/report.json").read_text())["damaged"]
  assert "web.json-00001.parquet" in damaged["web.json-00001"]


@pytest.mark.parametrize("kind", [*jobs.NO_FILES, "file"])
@pytest.mark.parametrize("name", ["log", "log/x.jsonl"])
def test_a_log_that_is_none_is_left_out(listed, tmp_path, caplog, kind, name):
  (tmp_path / "out" / "log").mkdir()
  jobs.replace_by(tmp_path / "out" / name, kind)
  report.report(listed, listed.out)
  content = json.loads((tmp_path / "out" / "report.json").read_text())
  assert {x["images"] for x in content["throughput"].values()} <= {0}
  is_log = kind == ("folder" if name == "log" else "file")
  assert is_log or str(tmp_path / "out" / name) in caplog.text


@pytest.mark.parametrize(
  "line",
  [
    '{"images": 1e999, "seconds": 1}',
    '{"images": 1' + 400 * "0" + ', "seconds": 1}',
    '{"images": "9", "seconds": 1}',
    '{"images": -1, "seconds": 1}',
    '{"images": 1, "seconds": NaN}',
    '{"images": 1, "seconds": 1e999}',
    '{"images": 1}',
    "[]",
  ],
)
def test_of_a_line_that_cannot_be_nothing_counts(tmp_path, line):
  good = '{"images": 30, "seconds": 2}'
  (tmp_path / "a-1.jsonl").write_text(f"{good}\n{line}\n{good}\n")
  assert report._throughput(tmp_path) == {
    "a-1": {"images": 60, "seconds": 4.0, "images_per_second": 15.0}
  }


@pytest.mark.parametrize("ending", ["html", "csv", "json"])
def test_a_folder_in_the_place_of_a_report_is_refused(listed, tmp_path, ending):
  (tmp_path / "out" / f"report.{ending}").mkdir()
  with pytest.raises(ValueError, match=f"report.{ending}: expected a file"):
    report.report(listed, listed.out)
