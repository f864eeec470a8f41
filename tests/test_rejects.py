"""Rows that cannot be used: counted, listed and limited."""

import json

import pytest

from blip_jax.data import rejects


def _bad(number, reason="truncated"):
  return rejects.Bad(f"rows:{number}", reason, "why")


def _line(number):
  row = {"id": f"rows:{number}", "reason": "truncated", "detail": "why"}
  return json.dumps(row)


def test_bad_rows_are_counted_and_listed_once(tmp_path):
  path = tmp_path / "bad_samples.jsonl"
  for _ in range(2):  # the second run finds the list of the first
    bad = rejects.BadSamples(path, max_fraction=0.9)
    assert not bad.count({"image": "good"})
    for row in (_bad(2), _bad(7), _bad(2), _bad(2, "empty_caption")):
      assert bad.count(row)
    assert bad.seen == 5
    assert bad.reasons == {"truncated": 3, "empty_caption": 1}
  lines = path.read_text().splitlines()
  assert lines[:2] == [_line(2), _line(7)]
  assert [json.loads(line)["reason"] for line in lines[2:]] == ["empty_caption"]


def test_a_list_cut_in_the_middle_of_a_line_is_continued(tmp_path):
  path = tmp_path / "bad_samples.jsonl"
  path.write_text(_line(2) + "\n" + _line(7)[:15])
  bad = rejects.BadSamples(path, max_fraction=0.5)
  bad.note(_bad(2))
  bad.note(_bad(7))
  assert path.read_text().splitlines() == [_line(2), _line(7)]


def test_damaged_lines_of_the_list_are_left_out(tmp_path):
  path = tmp_path / "bad_samples.jsonl"
  damaged = '{"id": \n[3]\n{"id": 3, "reason": []}\n{}\n'
  path.write_text(_line(2) + "\n" + damaged + _line(7) + "\n")
  bad = rejects.BadSamples(path, max_fraction=0.5)
  for number in (2, 7, 8):
    bad.note(_bad(number))
  assert path.read_text().splitlines()[-1] == _line(8)
  assert path.read_text().count(_line(7)) == 1


def test_the_memory_of_the_list_is_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(rejects, "_MAX_LISTED", 2)
  path = tmp_path / "bad_samples.jsonl"
  bad = rejects.BadSamples(path)
  for number in range(5):
    bad.count(_bad(number))
  assert bad.reasons["truncated"] == 5
  assert path.read_text().splitlines() == [_line(0), _line(1)]


def test_too_many_bad_rows_are_an_error_once_enough_are_read():
  bad = rejects.BadSamples(max_fraction=0.25, min_seen=4)
  for row in (_bad(0), _bad(1), "good"):
    bad.count(row)
  with pytest.raises(ValueError, match=r"2 of 4 rows .*50\.0%, allowed 25\.0%"):
    bad.count("good")
  for _ in range(4):
    bad.seen += 1
  bad.check()  # 2 of 8: exactly the fraction allowed


def test_a_bad_fraction_of_one_is_refused():
  with pytest.raises(ValueError, match=r"max_bad_fraction.*found 1\.0"):
    rejects.BadSamples(max_fraction=1.0)


def test_reasons_are_stored_by_id_without_a_limit():
  bad = rejects.Reasons()
  for number in range(2000):
    bad.count(_bad(number))
  assert len(bad.by_id) == 2000
  assert bad.by_id["rows:3"] == "truncated: why"


def test_by_default_a_twentieth_of_a_thousand_rows_may_be_bad():
  bad = rejects.BadSamples()
  for number in range(50):
    bad.count(_bad(number))
  for _ in range(949):
    bad.count("good")
  bad.count("good")
  with pytest.raises(ValueError, match="51 of 1001 rows"):
    bad.count(_bad(50))


def test_a_few_bad_rows_at_the_beginning_are_no_error():
  bad = rejects.BadSamples(max_fraction=0.0)
  for number in range(999):
    assert bad.count(_bad(number))
  with pytest.raises(ValueError, match="1000 of 1000"):
    bad.count(_bad(999))


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_the_fraction_is_from_zero_to_below_one(fraction):
  rejects.BadSamples(max_fraction=0.0)
  rejects.BadSamples(max_fraction=0.999)
  with pytest.raises(ValueError, match="max_bad_fraction"):
    rejects.BadSamples(max_fraction=fraction)
