"""Which columns of a row make its record, and what a bad value costs."""

import pickle

import numpy as np
import pytest

from blip_jax.data import cells, kept_columns, schema, sources

NAN = float("nan")


def test_the_id_of_a_row_is_no_image_id():
  rows = [{"image": "a.jpg", "text": "t", "id": row} for row in (0, 1)]
  first, second = (schema.Columns().record(row, "x", "x") for row in rows)
  assert "image_id" not in first
  assert sources.image_keys(first) == sources.image_keys(second)


def test_kept_columns_join_the_record_unchanged():
  columns = schema.Columns(keep=("answers", "size", "url"))
  row = {"url": "http://a.org/b.jpg", "text": "c", "answers": [{"yes": 3}]}
  row |= {"size": 0, "licence": "CC"}
  assert columns.record(row, "x:0", "x: row 0") == {
    "image": "a.org/b.jpg",
    "caption": "c",
    "id": "x:0",
    "answers": [{"yes": 3}],
    "size": 0,
    "url": "http://a.org/b.jpg",
  }
  assert columns == pickle.loads(pickle.dumps(columns))


@pytest.mark.parametrize("row", [{}, {"question": None}, {"question": NAN}])
def test_a_row_without_a_value_to_keep_is_bad(row):
  columns = schema.Columns(with_captions=False, keep=("question",))
  with pytest.raises(sources.BadRow, match=r"x: row 0: .*'question'") as bad:
    columns.record({"image": "a.jpg"} | row, "x:0", "x: row 0")
  assert (bad.value.id, bad.value.reason) == ("x:0", "missing_column")


@pytest.mark.parametrize("value", ["", False, 0, [], {"no": 0.5}, [None]])
def test_any_other_value_can_be_kept(value):
  columns = schema.Columns(with_captions=False, keep=("question",))
  record = columns.record({"image": "a", "question": value}, "x:0", "x")
  assert record["question"] == value


@pytest.mark.parametrize("name", ["image", "caption", "id", "image_id"])
def test_keys_that_records_have_anyway_cannot_be_kept(name):
  with pytest.raises(ValueError, match=rf"keep=.*\['{name}'\] cannot be kept"):
    schema.Columns(keep=("question", name))


def test_the_columns_to_keep_are_names_not_letters():
  assert kept_columns.names(["b", "a", "b"]) == ("b", "a")
  with pytest.raises(ValueError, match=r"keep: .* names, found 'question'"):
    kept_columns.names("question")


@pytest.mark.parametrize("image", [None, NAN, np.float32("nan"), "", " \n"])
def test_an_empty_cell_is_a_missing_image(image):
  with pytest.raises(sources.BadRow, match="x: row 0: nothing under 'image'"):
    schema.Columns().record({"image": image, "text": "t"}, "x:0", "x: row 0")


@pytest.mark.parametrize(
  "row, reason, detail",
  [
    ({"text": "t"}, "missing_image", r"no 'image' \(or 'url', .*\['text'\]"),
    ({"image": "a"}, "missing_caption", r"no 'caption' \(or .*\['image'\]"),
    (
      {"image": 3, "text": "t"},
      "broken_row",
      "'image': expected a path.* 3",
    ),
    ({"image": True, "text": "t"}, "broken_row", "expected a path, found True"),
    ({"image": ["a"], "text": "t"}, "broken_row", "expected a path"),
    ({"image": {"path": "a"}, "text": "t"}, "broken_row", "expected a path"),
    ({"image": "http://[", "text": "t"}, "broken_row", "IPv6"),
    ({"image": "a", "text": None}, "empty_caption", "'text': .* found None"),
    ({"image": "a", "text": NAN}, "empty_caption", "found nan"),
    ({"image": "a", "text": []}, "empty_caption", r"found \[\]"),
    ({"image": "a", "text": 2023}, "broken_row", "expected text, found 2023"),
    ({"image": "a", "text": False}, "broken_row", "expected text, found False"),
    ({"image": "a", "text": {"en": "t"}}, "broken_row", "expected text"),
    ({"image": "a", "text": ["t", 5]}, "broken_row", "found 5"),
    ({"image": "a", "text": [["t"]]}, "broken_row", r"found \['t'\]"),
    ({"image": "a", "text": [{"raw": None}]}, "broken_row", "found None"),
  ],
)
def test_a_value_that_is_absent_or_of_another_type_costs_its_row(
  row, reason, detail
):
  with pytest.raises(sources.BadRow, match=rf"x: row 0: .*{detail}") as bad:
    schema.Columns().record(row, "x:0", "x: row 0")
  assert (bad.value.id, bad.value.reason) == ("x:0", reason)


@pytest.mark.parametrize(
  "caption, expected",
  [
    ("one", "one"),
    (b"one", b"one"),
    (["one", "two"], ["one", "two"]),
    (np.array([b"one"], object), [b"one"]),
    ([{"raw": "One.", "tokens": ["one"]}, {"raw": "Two."}], ["One.", "Two."]),
    ([{"caption": "one"}, {"text": "two"}, "three"], ["one", "two", "three"]),
    ({"raw": "one", "sentid": 3}, "one"),
    # What is empty costs only itself.
    (["one", None, "two", NAN, ""], ["one", "", "two", "", ""]),
    ([{"raw": None}, {"raw": "two"}], ["", "two"]),
  ],
)
def test_a_caption_is_text_or_texts(caption, expected):
  assert cells.caption(caption, "x:0", "x: row 0") == expected


@pytest.mark.parametrize(
  "value, expected",
  [
    (7, 7),
    (7.0, 7),
    (np.int64(7), 7),
    (np.float64(7), 7),
    ("007", "007"),
    (b"a", "a"),
    (b"a\xff", r"a\xff"),
    ("a\ud800\n", r"a\xed\xa0\x80\x0a"),
    (0, 0),
    (-1, -1),
    (None, None),
    (NAN, None),
    (np.float32("nan"), None),
    ("", None),
    (" ", None),
  ],
)
def test_an_image_id_is_a_number_or_text(value, expected):
  found = cells.image_id(value, "x:0", "x: row 0")
  assert (found, type(found)) == (expected, type(expected))
  row = {"image": "a", "text": "t", "image_id": value}
  record = schema.Columns().record(row, "x:0", "x: row 0")
  assert ("image_id" in record) == (expected is not None)


# A float of 2**53 may be two numbers.
@pytest.mark.parametrize(
  "value", [7.5, 2.0**53, float("inf"), True, [7], {"id": 7}, "7" * 1001]
)
def test_what_identifies_no_image_costs_its_row(value):
  row = {"image": "a", "text": "t", "image_id": value}
  with pytest.raises(sources.BadRow, match="row 0: 'image_id': expec") as bad:
    schema.Columns().record(row, "x:0", "x: row 0")
  assert bad.value.reason == "broken_row"


@pytest.mark.parametrize(
  "value, expected",
  [
    (2.0**53 - 1, 2**53 - 1),
    (-(2.0**53) + 1, -(2**53) + 1),
    ("7" * 1000, "7" * 1000),
    (10**999, 10**999),
  ],
)
def test_the_largest_ids(value, expected):
  assert cells.image_id(value, "x:0", "x: row 0") == expected


@pytest.mark.parametrize("value", [-(2.0**53), 10**1000, "7" * 1001])
def test_ids_beyond_the_largest(value):
  with pytest.raises(sources.BadRow, match="at most 1,000 characters"):
    cells.image_id(value, "x:0", "x: row 0")


@pytest.mark.parametrize(
  "value, missing",
  [
    (None, True),
    (NAN, True),
    (np.float32("nan"), True),
    ("", True),
    (" \n", True),
    ("a", False),
    (0, False),
    (0.0, False),
    (False, False),
    ([], False),
    (b"", False),
  ],
)
def test_empty_cells(value, missing):
  assert cells.is_missing(value) == missing


def columns_at(place, number):
  """Rows without columns, but for one that has all of them."""
  seen = []

  def columns_of(index):
    seen.append(index)
    return ["image", "caption"] if index == place else ["other"]

  return lambda: schema.search(
    schema.Columns().check, columns_of, number, "x"
  ), seen


def test_ten_thousand_rows_are_searched_for_the_columns():
  search, seen = columns_at(9_999, 50_000)
  search()
  assert len(seen) == 10_000
  search, seen = columns_at(10_000, 50_000)
  with pytest.raises(ValueError, match="x: rows 0 to 9999: expected a path"):
    search()
  assert len(seen) == 10_000
  search, seen = columns_at(3, 50_000)
  search()
  assert len(seen) == 4
  search, seen = columns_at(9, 5)
  with pytest.raises(ValueError, match="x: rows 0 to 4"):
    search()


def test_columns_may_be_spread_over_rows():
  rows = [["image"], ["image"], ["caption"]]
  schema.search(schema.Columns().check, rows.__getitem__, 3, "x")
  with pytest.raises(ValueError, match="expected text under"):
    schema.search(schema.Columns().check, rows.__getitem__, 2, "x")


def test_rows_that_cannot_be_read_have_no_columns():
  def columns_of(index):
    raise sources.BadRow("x:0", "broken_row", f"row {index} is broken")

  with pytest.raises(ValueError, match=r"none of these.*row 0 is broken"):
    schema.search(schema.Columns().check, columns_of, 3, "x")
