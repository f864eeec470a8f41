"""Text beyond the limit of a row costs that row, in every format."""

import io
import json
import os
import tarfile

import pytest

from blip_jax.data import datasets, image_limits, json_index, sources

LONG = "x" * 5000


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch):
  monkeypatch.setattr(sources, "MAX_ROW_BYTES", 1000, raising=False)


def _rows(*captions):
  return [
    {"image": f"{n}.png", "caption": text} for n, text in enumerate(captions)
  ]


def _jsonl(texts):
  return "".join(json.dumps(row) + "\n" for row in _rows(*texts))


def _coco(texts):
  images = [{"id": n, "file_name": f"{n}.png"} for n in range(len(texts))]
  annotations = [
    {"image_id": n, "caption": text} for n, text in enumerate(texts)
  ]
  return json.dumps({"images": images, "annotations": annotations})


def _karpathy(texts):
  images = [
    {"filename": f"{n}.png", "split": "val", "sentences": [{"raw": text}]}
    for n, text in enumerate(texts)
  ]
  return json.dumps({"images": images})


def _csv(texts):
  return "image,caption\n" + "".join(
    f"{n}.png,{text}\n" for n, text in enumerate(texts)
  )


def _token(texts):
  return "".join(f"{n}.png#0\t{text}\n" for n, text in enumerate(texts))


FORMATS = {
  "a.jsonl": _jsonl,
  "a.json": lambda texts: json.dumps(_rows(*texts)),
  "coco.json": _coco,
  "karpathy.json": _karpathy,
  "a.csv": _csv,
  "results.token": _token,
}


def found(source):
  """Captions of a source, and the reasons of rows without one."""
  captions, reasons = [], []
  for row in range(len(source)):
    try:
      captions += sources.captions(source[row])
    except sources.BadRow as bad:
      reasons.append(bad.reason)
      assert bad.id and ("1000" in bad.detail or bad.reason != "too_long")
  return captions, reasons


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_that_is_too_long_costs_itself(tmp_path, name, at):
  texts = ["one", "two"]
  texts.insert(at, LONG)
  (tmp_path / name).write_text(FORMATS[name](texts))
  spec = str(tmp_path / name)
  spec += "?split=val" if name == "karpathy.json" else ""
  captions, reasons = found(datasets.open_source(spec))
  assert captions == ["one", "two"]
  # A COCO annotation is lost, so its image has no caption.
  expected = "missing_caption" if name == "coco.json" else "too_long"
  assert reasons == [expected]


def test_all_captions_of_an_image_together_have_the_limit(tmp_path):
  lines = [f"a.png#{n}\t{'y' * 90}\n" for n in range(20)]
  path = tmp_path / "results.token"
  path.write_text("".join(lines) + "b.png#0\tone\n")
  assert found(datasets.open_source(str(path))) == (["one"], ["too_long"])


def test_text_next_to_an_image_has_the_limit(tmp_path):
  for name in "abc":
    (tmp_path / f"{name}.png").write_bytes(b"")
    (tmp_path / f"{name}.txt").write_text(f"\ufeff{name} one\r\n\n {name} two")
  os.truncate(tmp_path / "b.txt", 1 << 40)  # sparse
  captions, reasons = found(datasets.open_source(str(tmp_path)))
  assert captions == ["a one", "a two", "c one", "c two"]
  assert reasons == ["too_long"]


def _tar(path, members):
  with tarfile.open(path, "w") as tar:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
  "name, reason",
  [
    ("b.txt", "too_long"),
    ("b.json", "too_long"),
    ("b.more", "too_long"),
    ("b.jpg", "too_large"),
  ],
)
def test_members_of_a_shard_have_limits(tmp_path, monkeypatch, name, reason):
  monkeypatch.setattr(image_limits, "MAX_BYTES", 3000)
  members = {
    f"{key}.{ending}": b'{"caption": "one"}'
    for key in "abc"
    for ending in ("jpg", "json", "more")
  }
  if name == "b.txt":
    members = {**members, "a.txt": b"one", "c.txt": b"one"}
  members[name] = LONG.encode()
  _tar(tmp_path / "a.tar", dict(sorted(members.items())))
  source = datasets.open_source(f"{tmp_path}/a.tar", keep=("more",))
  captions, reasons = found(source)
  assert captions in (["one", "one"], [b"one", b"one"])
  assert reasons == [reason]


def test_blank_rows_that_are_too_long_are_rows(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(' \n  {"a": 1}\n' + " " * 2000 + "\n")
  assert json_index.line_rows(str(path))[0].tolist() == [4, 13, 2014]
  path = tmp_path / "a.json"
  path.write_text('[{"a": 1}, ' + " " * 2000 + "]")
  assert len(json_index.list_rows(str(path))[0]) == 3
