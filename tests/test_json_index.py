"""Offsets of the rows of JSON files."""

import itertools
import json
import random
import time

import numpy as np
import pytest

from blip_jax.data import json_index
from blip_jax.runtime import files

ROWS = [
  {"image": "a.jpg", "caption": 'a "quoted" word'},
  {"image": "b.jpg", "caption": "braces } ] { [ , and a backslash \\"},
  {"image": "c.jpg", "caption": '\\" \\\\" \\\\\\', "nested": [{"a": [1]}, {}]},
  {"image": "d.jpg", "caption": ["zwölf Boxkämpfer", "\u4e00\u4e8c", ""]},
  {},
]


def _write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def _parse(path, index):
  for start, end in itertools.pairwise(index.tolist()):
    raw = files.read_range(path, start, end - start)
    yield json.loads(raw.decode().rstrip().removesuffix(","))


# Chunks of one byte put a boundary between any two characters.
@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("style", [{}, {"indent": 1}, {"ensure_ascii": False}])
def test_json_rows_are_those_of_json(tmp_path, monkeypatch, chunk, style):
  rows = ROWS * 3
  random.Random(0).shuffle(rows)
  path = _write(tmp_path / "a.json", json.dumps(rows, **style) + "\n")
  monkeypatch.setattr(json_index, "_CHUNK", chunk)
  index, damage = json_index.list_rows(path)
  assert list(_parse(path, index)) == rows
  assert damage == []


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n", "\n \t\r\n "])
def test_jsonl_rows_are_the_lines(tmp_path, monkeypatch, chunk, newline):
  text = newline.join(json.dumps(row) for row in ROWS)
  path = _write(tmp_path / "a.jsonl", text)
  monkeypatch.setattr(json_index, "_CHUNK", chunk)
  index, _ = json_index.line_rows(path)
  assert list(_parse(path, index)) == ROWS
  with_end, _ = json_index.line_rows(
    _write(tmp_path / "b.jsonl", text + newline)
  )
  np.testing.assert_array_equal(with_end[:-1], index[:-1])


def test_byte_order_marks_are_skipped(tmp_path):
  bom = b"\xef\xbb\xbf"
  path = _write(tmp_path / "a.json", bom + json.dumps(ROWS).encode())
  assert list(_parse(path, json_index.list_rows(path)[0])) == ROWS
  path = _write(tmp_path / "a.jsonl", bom + b'{"a": 1}\n')
  assert list(_parse(path, json_index.line_rows(path)[0])) == [{"a": 1}]


@pytest.mark.parametrize(
  "content, message",
  [
    ("", "found nothing"),
    (" \n", "found nothing"),
    ('{"images": []}', r"expected a JSON list of rows \('\['\), found b'\{"),
    ("[ ]", "expected a JSON list of rows, found none"),
    ('[{"a": 1}, {"b": 2}', r"end of the file .* in or after row 1 \(byte 10"),
    ('[{"a": 1}, {"b": "2', r"end of the file .* in or after row 1 \(byte 10"),
    ('[{"a": 1}, {"b": 2}, ', r"truncated"),
    ('[{"a": 1}] [{"b": 2}]', "more after the end .*byte 9"),
  ],
)
def test_a_file_that_is_not_a_json_list_is_refused(tmp_path, content, message):
  path = _write(tmp_path / "bad.json", content)
  with pytest.raises(ValueError, match=message) as error:
    json_index.list_rows(path)
  assert path in str(error.value)


def test_a_json_list_is_refused_as_jsonl(tmp_path):
  path = _write(tmp_path / "a.jsonl", '[\n{"a": 1}\n]')
  with pytest.raises(ValueError, match="one JSON object per line"):
    json_index.line_rows(path)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("style", [{}, {"indent": 1}])
def test_the_lists_of_an_object_have_rows(tmp_path, monkeypatch, chunk, style):
  content = {
    "info": {"contributor": ["a", "b"], "description": "[{\\"},
    "images": ROWS[:2],
    "licenses": [],
    'a "quoted" [key': [None, [1, 2], "x"],
    "version": 2,
    "annotations": ROWS[2:],
  }
  path = _write(tmp_path / "a.json", json.dumps(content, **style) + "\n")
  monkeypatch.setattr(json_index, "_CHUNK", chunk)
  found = json_index.lists(path)
  assert {key: list(_parse(path, rows)) for key, rows in found.items()} == {
    "images": ROWS[:2],
    "licenses": [],
    'a \\"quoted\\" [key': [None, [1, 2], "x"],
    "annotations": ROWS[2:],
  }


def test_the_lists_of_an_object_in_an_object(tmp_path, monkeypatch):
  """Those of VisDial; other values at that depth are no lists of it."""
  content = {
    "split": "val",
    "data": {"answers": ["a, [b", "}"], "info": {"n": [1]}, "dialogs": ROWS},
    "licenses": [[1, 2], {"x": []}],
  }
  path = _write(tmp_path / "a.json", json.dumps(content))
  monkeypatch.setattr(json_index, "_CHUNK", 5)
  found = json_index.lists(path, depth=3)
  assert found.keys() == {"answers", "dialogs"}
  assert list(_parse(path, found["dialogs"])) == ROWS
  assert list(_parse(path, found["answers"])) == ["a, [b", "}"]


@pytest.mark.parametrize(
  "content, message",
  [
    ("[1]", r"expected a JSON object \('\{'\), found b'\["),
    ('{"images": [{}, {}', r"in or after row 1 \(byte 15\). The file is trunc"),
    ('{"images": [{}], "annotations": [{}, {}, ', r"in or after row 2 \(byte"),
    ('{"images": [{}]', r"truncated"),
    ('{"images', r"in or after its beginning"),
    ('{"image": "a"}\n{"image": "b"}', r"more after .*\(byte 13\).* \.jsonl"),
  ],
)
def test_a_file_that_is_not_one_object_is_refused(tmp_path, content, message):
  path = _write(tmp_path / "bad.json", content)
  with pytest.raises(ValueError, match=message) as error:
    json_index.lists(path)
  assert path in str(error.value)


def test_a_file_begins_with_an_object_or_a_list(tmp_path):
  path = tmp_path / "a.json"
  for content, expected in (("\ufeff {", True), ("[{", False), ("", False)):
    assert json_index.is_object(_write(path, content)) is expected


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("number", [1, 2, 63, 64, 65, 66, 67, 128, 1001, 1002])
def test_runs_of_backslashes_may_be_long(tmp_path, monkeypatch, number, block):
  monkeypatch.setattr(json_index, "_BLOCK", block)
  quote = b'\\"' if number % 2 else b'"'
  text = b"\\" * (number - number % 2)
  rows = b'[{"a": "' + text + quote + b'", "b": [1, "c"]}, {"a": 2}]'
  if number % 2 == 0:
    rows = rows.replace(b'"", "b"', b'", "b"')
  path = _write(tmp_path / "a.json", rows)
  parsed = list(_parse(path, json_index.list_rows(path)[0]))
  assert parsed == json.loads(rows) and len(parsed) == 2


def test_backslashes_before_the_beginning():
  data = np.frombuffer(b"\\" * 301 + b'"', np.uint8)
  assert json_index._escaped(data, np.array([301])).tolist() == [True]
  assert json_index._escaped(data, np.array([300])).tolist() == [False]


def test_a_string_of_backslashes_is_quick(tmp_path):
  """Eight megabytes, in one run and in many."""
  one = b"\\" * 4_000_000
  many = (b"\\" * 100 + b'\\"') * 40_000
  content = b'[{"a": "' + one + b'"}, {"a": "' + many + b'"}, {"a": "b"}]'
  path = _write(tmp_path / "a.json", content)
  start = time.process_time()
  index, _ = json_index.list_rows(path)
  assert time.process_time() - start < 5
  assert list(_parse(path, index))[2] == {"a": "b"} and len(index) == 4


def test_an_object_of_many_lists_is_quick(tmp_path):
  same = b",".join([b'"aaa": []'] * 20_000)
  other = b",".join(b'"k%d":[1]' % n for n in range(5_000))
  rows = b'{"images": [{}, {}],' + same + b"," + other + b', "aaa": [1, 2]}'
  path = _write(tmp_path / "a.json", rows)
  start = time.process_time()
  found = json_index.lists(path)
  assert time.process_time() - start < 2
  assert len(found) == 5_002
  assert len(found["images"]) == len(found["aaa"]) == 3


@pytest.mark.parametrize(
  "before, key",
  [
    (b'{"a": ', b"a"),
    (b'{"a" \n:\t', b"a"),
    (b'{"":', b""),
    (b'{"a\\"b\\\\": ', b'a\\"b\\\\'),
    (b'"\\\\\\" ":', b'\\\\\\" '),
    (b'{"a", ', None),
    (b'{"a"', None),
    (b"{a: ", None),
    (b'a": ', None),
    (b'\\"a": ', None),
    (b"", None),
    (b": ", None),
    (b'":', None),
  ],
)
def test_the_key_in_front_of_a_value(before, key):
  assert json_index._key(before) == key
