"""Flickr's files of captions as sources."""

import os
import pickle

import pytest

from blip_jax.data import datasets, offsets, sources, token_file

LINES = [
  b"b.jpg#0\tA dog .",
  b"b.jpg#1\tTwo\tdogs .",
  b"a#1.jpg.1#0\tA cat .",
  b"b.jpg#2\tThree dogs .",
]


def _write(path, lines):
  path.write_bytes(b"\n".join(lines) + b"\n")
  return str(path)


@pytest.mark.parametrize("name", ["results.token", "Flickr8k.token.txt"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_an_image_has_all_its_captions(tmp_path, name, newline):
  (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + newline.join(LINES))
  source = datasets.open_source(f"{tmp_path}/{name}", "flickr")
  source = pickle.loads(pickle.dumps(source))
  expected = [
    {
      "image": "flickr/b.jpg",
      "caption": ["A dog .", "Two\tdogs .", "Three dogs ."],
      "id": f"{name}:0",
    },
    {"image": "flickr/a#1.jpg.1", "caption": ["A cat ."], "id": f"{name}:1"},
  ]
  assert list(source) == expected
  assert source[-1] == expected[1]
  with pytest.raises(IndexError):
    source[2]
  (_, record) = datasets.open_images(f"{tmp_path}/{name}", "flickr")
  assert record == {"image": "flickr/a#1.jpg.1", "id": f"{name}:1"}


@pytest.mark.parametrize(
  "line", [b"c.jpg\tno number", b"c.jpg#0 no tab", b"c.jpg#0\t\xff", b"#0\tc"]
)
def test_a_line_of_another_form_costs_one_row(tmp_path, line):
  path = _write(tmp_path / "results.token", [line, *LINES, line, b"", line])
  source = token_file.TokenFile(path)
  bad = [row for row in range(len(source)) if not _is_good(source, row)]
  assert len(source) - len(bad) == 2 and bad[0] == 0
  assert source[1]["caption"][2] == "Three dogs ."


def _is_good(source, row):
  try:
    return bool(source[row])
  except sources.BadRow as bad:
    assert (bad.id, bad.reason) == (f"results.token:{row}", "broken_row")
    assert f"{source.path}: image {row}: " in bad.detail
    return False


@pytest.mark.parametrize(
  "content, message",
  [
    ([], "found nothing"),
    ([b"image,caption", b"a.jpg,one"], r"none of these can be read.*'image,c"),
  ],
)
def test_another_file_is_refused(tmp_path, content, message):
  path = _write(tmp_path / "results.token", content)
  with pytest.raises(ValueError, match=message):
    token_file.TokenFile(path)
  path = _write(tmp_path / "results.token", LINES)
  with pytest.raises(ValueError, match=r"\['x'\] that 'keep' names"):
    datasets.open_source(f"{path}?keep=x")


def test_names_may_be_no_utf8_and_captions_may_be_empty(tmp_path):
  path = _write(tmp_path / "results.token", [b"\xe9.jpg#0\t", b"b.jpg#0\tb"])
  source = token_file.TokenFile(path)
  assert source[1]["caption"] == ["b"]
  assert source[0]["image"] == os.fsdecode(b"\xe9.jpg")


def test_the_index_of_a_large_file_is_cached(tmp_path, monkeypatch):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  path = _write(tmp_path / "results.token", LINES)
  first = token_file.TokenFile(path)
  assert len(list(tmp_path.glob(".results.token.images-*.npy"))) == 1
  assert list(pickle.loads(pickle.dumps(first))) == list(first)
  assert list(token_file.TokenFile(path)) == list(first)
