"""The whole data pipeline on bad web data, from files to batches.

Damaged images, texts, rows and shards are either converted, or skipped,
counted and listed. No other row is lost.
"""

import collections
import io
import itertools
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from blip_jax.data import (
  datasets,
  examples,
  loader,
  rejects,
  scenes,
  tokenizer,
  transforms,
)

SIZE = 16


@pytest.fixture(scope="module")
def example():
  return examples.PairExample(
    tokenizer.Tokenizer.load(scenes.vocab_dir()), transforms.EvalImage(SIZE)
  )


def _image(mode="RGB", kind="PNG", **options):
  """Returns an encoded image with a ramp from black (left) to white."""
  ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))
  image = Image.fromarray(ramp).convert(mode)
  if mode == "I;16":
    image = Image.fromarray(ramp.astype(np.uint16) * 257)
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def _claims_to_be_huge():
  """Returns an image of a hundred bytes that would decode to 10 GB."""

  def chunk(kind, content):
    body = kind + content
    size, check = struct.pack(">I", len(content)), zlib.crc32(body)
    return size + body + struct.pack(">I", check)

  header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
  data = zlib.compress(b"\0" * 100)
  magic = b"\x89PNG\r\n\x1a\n"
  return magic + chunk(b"IHDR", header) + chunk(b"IDAT", data)


def _animation():
  dark = Image.new("P", (40, 30), 0)
  file = io.BytesIO()
  frames = [Image.open(io.BytesIO(_image("P", "GIF"))), dark]
  frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
  return file.getvalue()


CONVERTED = {
  "cmyk.jpg": _image("CMYK", "JPEG"),
  "sixteen_bits.png": _image("I;16"),
  "palette.png": _image("P"),
  "transparent.png": _image("RGBA"),
  "grey.png": _image("L"),
  "animated.gif": _animation(),
}
SKIPPED = {
  "missing.jpg": (None, "missing"),
  "zero_bytes.jpg": (b"", "empty"),
  "html.jpg": (b"<!DOCTYPE html><html>404</html>" * 20, "not_an_image"),
  "truncated.jpg": (_image(kind="JPEG")[:-200], "truncated"),
  "huge.png": (_claims_to_be_huge(), "too_large"),
}
TEXTS = {
  "a megabyte": ("word " * 200_000, "too_long"),
  "empty": ("", "empty_caption"),
  "blank": (" \t\n ", "empty_caption"),
  "nothing left": ("...!", "empty_caption"),
  "controls only": ("\0\x01\x1b", "empty_caption"),
  "half a character": ("\ud800 red", "invalid_utf8"),
}


def _rows(example, source, path=None, max_fraction=0.9):
  """Returns the good rows by id, and the bad samples, of one pass."""
  bad = rejects.BadSamples(path, max_fraction=max_fraction)
  good = {}
  for arrays, ids in loader.eval_loader(source, example, 4, bad_samples=bad):
    for slot in np.flatnonzero(arrays["valid"]):
      good[ids[slot]] = {key: array[slot] for key, array in arrays.items()}
  return good, bad


def _listed(path):
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert all(sorted(row) == ["detail", "id", "reason"] for row in rows)
  return {row["id"]: row["reason"] for row in rows}


def _web_data(folder):
  """Writes annotations with every kind of image and text.

  Returns:
    The source, and the expected reasons of bad rows by id.
  """
  (folder / "good.png").write_bytes(_image())
  rows, expected = [], {}

  def add(image, caption, reason=None):
    if reason:
      expected[f"web.jsonl:{len(rows)}"] = reason
    rows.append(json.dumps({"image": image, "caption": caption}))

  for name, content in CONVERTED.items():
    (folder / name).write_bytes(content)
    add(name, "a red circle")
  for name, (content, reason) in SKIPPED.items():
    if content is not None:
      (folder / name).write_bytes(content)
    add(name, "a red circle", reason)
    add("good.png", "a red circle")
  for caption, reason in TEXTS.values():
    add("good.png", caption, reason)
    add("good.png", "a\x07 red\x9b circle")
  (folder / "web.jsonl").write_text("\n".join(rows))
  return datasets.open_source(f"{folder}/web.jsonl", str(folder)), expected


def test_each_kind_is_converted_or_skipped_and_listed(tmp_path, example):
  source, expected = _web_data(tmp_path)
  report = tmp_path / "bad_samples.jsonl"
  good, bad = _rows(example, source, report)

  assert _listed(report) == expected
  assert bad.reasons == collections.Counter(expected.values())
  assert len(good) == len(source) - len(expected) == 17
  tokens = good["web.jsonl:0"]["input_ids"]
  for id, row in good.items():
    np.testing.assert_array_equal(row["input_ids"], tokens, id)
    # The image shows the ramp, whatever its format.
    left, right = row["image"][:, :3].mean(), row["image"][:, -3:].mean()
    assert left < 60 and right > 195, id


def test_training_skips_bad_rows(tmp_path, example):
  source, expected = _web_data(tmp_path)
  report = tmp_path / "bad_samples.jsonl"
  batches = loader.train_loader(
    [source],
    example,
    batch_size=17,
    seed=0,
    bad_samples=rejects.BadSamples(report, max_fraction=0.9),
  )
  for _ in range(2):  # two epochs of 17 good rows each
    _, ids = next(batches)
    assert len(set(ids)) == 17 and not set(ids) & set(expected)
  batches.close()
  assert set(_listed(report)) <= set(expected)


def test_training_ends_if_too_many_rows_are_bad(tmp_path, example):
  source, _ = _web_data(tmp_path)
  bad = rejects.BadSamples(
    tmp_path / "bad_samples.jsonl", max_fraction=0.2, min_seen=28
  )
  batches = loader.train_loader(
    [source], example, batch_size=4, seed=0, bad_samples=bad
  )
  with pytest.raises(ValueError) as error:
    list(itertools.islice(batches, 100))
  batches.close()
  message = str(error.value)
  assert "11 of 28 rows" in message and "empty_caption 4" in message
  assert "bad_samples.jsonl" in message and "max_bad_fraction" in message


def test_a_broken_line_loses_one_row(tmp_path, example):
  (tmp_path / "a.png").write_bytes(_image())
  good = b'{"image": "a.png", "caption": "a red circle"}'
  lines = [
    good,
    b'{"image": "a.png", "caption": "cut o',
    good,
    b'{"image": "a.png", "caption": "\xff\xfe"}',
    good,
    b"\0\0\0\0",
    b"[" * 100_000,
    b"",
    good,
    good[:-9],
  ]
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b"\n".join(lines))
  source = datasets.open_source(str(path), str(tmp_path))
  report = tmp_path / "bad_samples.jsonl"
  good_rows, _ = _rows(example, source, report)
  assert sorted(good_rows) == [f"rows.jsonl:{row}" for row in (0, 2, 4, 7)]
  assert _listed(report) == {
    f"rows.jsonl:{row}": "broken_row" for row in (1, 3, 5, 6, 8)
  }
  detail = json.loads(report.read_text().splitlines()[1])["detail"]
  assert f"{path}: row 3 (byte" in detail and "utf-8" in detail


def test_a_broken_row_of_a_json_list_loses_one_row(tmp_path, example):
  (tmp_path / "a.png").write_bytes(_image())
  good = b'{"image": "a.png", "caption": "a red circle"}'
  broken = [
    b'{"image": "a.png", "caption": "\xff"}',
    b'{"image": "a.png", "caption": }',
    b"{}",
    b"null",
    b"",
  ]
  path = tmp_path / "rows.json"
  path.write_bytes(b"[" + b",\n".join([good, *broken, good]) + b"]")
  source = datasets.open_source(str(path), str(tmp_path))
  report = tmp_path / "bad_samples.jsonl"
  good_rows, _ = _rows(example, source, report)
  assert sorted(good_rows) == ["rows.json:0", "rows.json:6"]
  reasons = ["broken_row", "broken_row", "missing_image", "broken_row"]
  assert list(_listed(report).values()) == [*reasons, "broken_row"]


BAD_VALUES = [
  ({"image": None}, "missing_image"),
  ({"image": float("nan")}, "missing_image"),
  ({"image": ""}, "missing_image"),
  ({"image": 7}, "broken_row"),
  ({"image": "a\0.png"}, "unreadable"),
  ({"image": "\ud800.png"}, "unreadable"),
  ({"image": "n" * 5000}, "unreadable"),
  ({"caption": None}, "empty_caption"),
  ({"caption": float("nan")}, "empty_caption"),
  ({"caption": ""}, "empty_caption"),
  ({"caption": 2023}, "broken_row"),
  ({"caption": [None, 5]}, "broken_row"),
  ({"image_id": [3]}, "broken_row"),
  ({"size": None}, "missing_column"),
  ({"size": float("nan")}, "missing_column"),
]


def test_a_bad_value_loses_one_row(tmp_path, example):
  """Also if it is in the first row, or the key is absent."""
  (tmp_path / "a.png").write_bytes(_image())
  good = {"image": "a.png", "caption": "a red circle", "size": 3}
  expected = [reason for _, reason in BAD_VALUES]
  rows = [good | bad for bad, _ in BAD_VALUES]
  for key, reason in [
    ("image", "missing_image"),
    ("caption", "missing_caption"),
    ("size", "missing_column"),
  ]:
    rows.append({name: good[name] for name in good if name != key})
    expected.append(reason)
  (tmp_path / "rows.jsonl").write_text(
    "\n".join(map(json.dumps, [*rows, good]))
  )
  (tmp_path / "rows.json").write_text(json.dumps([*rows, good]))
  for name in ("rows.jsonl", "rows.json"):
    source = datasets.open_source(f"{tmp_path}/{name}?keep=size", str(tmp_path))
    report = tmp_path / f"{name}.bad"
    good_rows, _ = _rows(example, source, report, max_fraction=0.99)
    assert list(good_rows) == [f"{name}:{len(rows)}"]
    assert list(_listed(report).values()) == expected


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_empty_cells_of_pandas_lose_one_row(tmp_path, example, kind):
  nan = float("nan")
  cells = {
    "image": [nan, "a.png", "a.png", "a.png"],
    "caption": ["a red circle", nan, "a red circle", "a red circle"],
    "image_id": [1, 2, nan, 4],
  }
  path = tmp_path / f"rows.{kind}"
  if kind == "csv":
    rows = zip(*cells.values(), strict=True)
    lines = [[str(x) if x == x else "" for x in row] for row in rows]
    path.write_text("\n".join(map(",".join, [list(cells), *lines])))
  else:
    table = {key: pyarrow.array(cells[key], from_pandas=True) for key in cells}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
  (tmp_path / "a.png").write_bytes(_image())
  source = datasets.open_source(str(path), str(tmp_path))
  report = tmp_path / "bad_samples.jsonl"
  good_rows, _ = _rows(example, source, report)
  assert sorted(good_rows) == [f"{path.name}:2", f"{path.name}:3"]
  assert _listed(report) == {
    f"{path.name}:0": "missing_image",
    f"{path.name}:1": "empty_caption",
  }
  assert "image_id" not in source[2] and source[3]["image_id"] == 4


def test_a_damaged_shard_loses_only_its_damaged_rows(tmp_path, example):
  members = []
  for number, content in enumerate(
    [_image(), SKIPPED["truncated.jpg"][0], _image(), _image(), b"GIF8"]
  ):
    members.append((f"{number}.jpg", content))
    members.append(
      (f"{number}.txt", b"a red circle" if number != 2 else b"\xff")
    )
  for shard in range(2):
    with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
      for name, content in members:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
  with tarfile.open(tmp_path / "0.tar") as tar:
    os.truncate(tmp_path / "0.tar", tar.getmember("3.jpg").offset_data + 5)

  source = datasets.open_source(f"{tmp_path}/*.tar")
  report = tmp_path / "bad_samples.jsonl"
  good, bad = _rows(example, source, report)
  assert sorted(good) == ["0.tar:0", "1.tar:0", "1.tar:3"]
  assert _listed(report) == {
    "0.tar:1": "truncated",
    "0.tar:2": "invalid_utf8",
    "1.tar:1": "truncated",
    "1.tar:2": "invalid_utf8",
    "1.tar:4": "not_an_image",
  }
  assert bad.seen == 8
  (problem,) = source.problems
  assert "0.tar: 3.jpg: truncated" in problem
