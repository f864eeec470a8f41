"""Tar shards as a source, one sample at a time."""

import io
import os
import pickle
import tarfile

import pytest

from blip_jax.data import offsets, shards, sources


def _tar(path, members):
  with tarfile.open(path, "w") as tar:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return str(path)


def test_shards_are_one_source(tmp_path):
  paths = [
    _tar(
      tmp_path / "0.tar",
      {"00.jpg": b"j0", "00.txt": b"t0", "01.png": b"p1", "01.txt": b"t1"},
    ),
    _tar(
      tmp_path / "1.tar",
      {
        "02.webp": b"w2",
        "02.json": b'{"caption": "t2", "url": "u"}',
        "02.txt": b"t2 first",
        "03.jpg": b"j3",
        "03.json": b'{"caption": "t3"}',
      },
    ),
  ]
  source = pickle.loads(pickle.dumps(shards.TarShards(paths)))
  assert [source[i] for i in range(4)] == [
    {"image": b"j0", "caption": b"t0", "id": "0.tar:00"},
    {"image": b"p1", "caption": b"t1", "id": "0.tar:01"},
    {"image": b"w2", "caption": b"t2 first", "id": "1.tar:02"},
    {"image": b"j3", "caption": "t3", "id": "1.tar:03"},
  ]
  assert len(source) == 4 and source.problems == []
  with pytest.raises(IndexError):
    source[4]


@pytest.mark.parametrize(
  "members, reason",
  [
    ({"a.jpg": b"j"}, "missing_caption"),
    ({"a.txt": b"t"}, "missing_image"),
    ({"a.jpg": b"j", "a.json": b"{"}, "broken_row"),
    ({"a.jpg": b"j", "a.json": b"\xff"}, "broken_row"),
    ({"a.jpg": b"j", "a.json": b"[]"}, "broken_row"),
    ({"a.jpg": b"j", "a.json": b"{}"}, "broken_row"),
    ({"a.jpg": b"j", "a.json": b'{"caption": null}'}, "empty_caption"),
    ({"a.jpg": b"j", "a.json": b'{"captions": []}'}, "empty_caption"),
    ({"a.jpg": b"j", "a.json": b'{"caption": ["a", 1]}'}, "broken_row"),
  ],
)
def test_an_incomplete_sample_is_bad(tmp_path, members, reason):
  source = shards.TarShards([_tar(tmp_path / "s.tar", members)])
  with pytest.raises(sources.BadRow) as bad:
    source[0]
  assert (bad.value.id, bad.value.reason) == ("s.tar:a", reason)


def test_json_may_have_several_captions(tmp_path):
  members = {
    "a.jpg": b"j",
    "a.json": b'{"caption": ["one", "two"]}',
    "b.JPG": b"j",
    "b.json": b'{"url": "u", "captions": ["one"]}',
    "c.gif": b"j",
    "c.json": b'{"text": "one"}',
    "d.jfif": b"j",
    "d.Caption": b"one",
  }
  source = shards.TarShards([_tar(tmp_path / "s.tar", members)])
  captions = [record["caption"] for record in source]
  assert captions == [["one", "two"], ["one"], "one", b"one"]


def test_members_that_are_not_used_are_logged_once(tmp_path, monkeypatch):
  """Also if the index of the shard was in the cache."""
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  logged = []
  monkeypatch.setattr(
    shards.logging, "warning", lambda text, *args: logged.append(text % args)
  )
  members = {"a.jpg": b"j", "a.txt": b"t", "a.seg.png": b"s", "b.heic": b"h"}
  paths = [_tar(tmp_path / f"{i}.tar", members) for i in range(2)]
  for _ in range(3):
    shards._log_unused.cache_clear()  # as a new process does
    for _ in range(2):
      source = shards.TarShards(paths)
    assert [record["id"] for record in source] == ["0.tar:a", "1.tar:a"]
    assert source.problems == []
    assert logged == [
      f"{path}: members that are not used: 1 such as b.heic, "
      "1 such as a.seg.png"
      for path in paths
    ]
    logged.clear()
  assert len([*tmp_path.glob(".*.npy")]) == 2


def test_images_alone_need_no_text(tmp_path):
  members = {"a.jpg": b"j", "b.png": b"p", "b.json": b"{", "c.txt": b"t"}
  path = _tar(tmp_path / "s.tar", members)
  source = shards.TarShards([path], with_captions=False)
  assert [source[i] for i in range(2)] == [
    {"image": b"j", "id": "s.tar:a"},
    {"image": b"p", "id": "s.tar:b"},
  ]
  with pytest.raises(sources.BadRow, match="missing_image"):
    source[2]


def test_ids_distinguish_shards_of_the_same_name(tmp_path):
  paths = []
  for folder in ("a", "b"):
    (tmp_path / folder).mkdir()
    paths.append(
      _tar(tmp_path / folder / "0.tar", {"x.jpg": b"", "x.txt": b""})
    )
  source = shards.TarShards(paths)
  assert [record["id"] for record in source] == ["a/0.tar:x", "b/0.tar:x"]


def test_pickles_in_shards_are_never_opened(tmp_path):
  members = {"a.jpg": b"j", "a.txt": b"t", "a.pkl": b"p", "a.pyd": b"p"}
  source = shards.TarShards([_tar(tmp_path / "s.tar", members)])
  assert len(source) == 1
  assert sorted(source[0]) == ["caption", "id", "image"]
  with pytest.raises(ValueError, match="No samples"):
    shards.TarShards([_tar(tmp_path / "p.tar", {"b.pkl": b"p"})])


def test_missing_shards_are_reported(tmp_path):
  good = _tar(tmp_path / "0.tar", {"a.jpg": b"j", "a.txt": b"t"})
  with pytest.raises(ValueError, match=r"1 of 2 shards do not exist.*1\.tar"):
    shards.TarShards([good, str(tmp_path / "1.tar")])


def test_a_damaged_shard_is_reported_and_its_intact_samples_are_read(tmp_path):
  members = {"a.jpg": b"j" * 600, "a.txt": b"t", "b.jpg": b"j" * 600}
  paths = [_tar(tmp_path / f"{i}.tar", members) for i in range(2)]
  os.truncate(paths[0], 3200)  # within b.jpg
  source = shards.TarShards(paths)
  ids = [f"{shard}.tar:{name}" for shard, name in ("0a", "1a", "1b")]
  assert len(source) == 3
  assert [source[i]["id"] for i in range(2)] == ids[:2]
  (problem,) = source.problems
  assert "0.tar: b.jpg: truncated" in problem


KEPT = {
  "a.question.txt": b"not an ending",
  "a.jpg": b"j0",
  "a.json": b'{"caption": "t0", "answer": ["b"], "size": 0, "url": "u"}',
  "a.question": "w\u00e4s?".encode(),
  "b.png": b"j1",
  "b.txt": b"t1",
  "b.Question": b"why?",
  "b.answer": b"c",
  "b.json": b'{"answer": "not this", "size": null, "url": "v"}',
}


@pytest.mark.parametrize("part", ["image", "text", "json"])
def test_a_member_that_cannot_be_read_costs_its_sample(
  tmp_path, monkeypatch, part
):
  """An error of the disk is there at every restart."""
  members = {"a.jpg": b"j", "a.txt": b"t", "b.jpg": b"k", "b.json": b"{}"}
  members |= {"c.jpg": b"l", "c.txt": b"u"}
  path = _tar(tmp_path / "s.tar", members)
  source = shards.TarShards([path])
  (index,) = source._shards
  offsets_of_part = [index.span(row, part)[0] for row in range(3)]
  broken = next(offset for offset in offsets_of_part if offset >= 0)
  read = shards.files.read_range

  def read_range(path, start, size):
    if start == broken:
      raise OSError(5, "Input/output error")
    return read(path, start, size)

  monkeypatch.setattr(shards.files, "read_range", read_range)
  row = 1 if part == "json" else 0
  with pytest.raises(sources.BadRow, match="Input/output error") as bad:
    source[row]
  assert bad.value.id == f"s.tar:{'ab'[row]}"
  assert bad.value.reason == "unreadable"
  assert source[2]["caption"] == b"u"


def test_further_values_can_be_kept(tmp_path):
  path = _tar(tmp_path / "s.tar", KEPT)
  source = shards.TarShards([path], keep=("question", "answer"))
  source = pickle.loads(pickle.dumps(source))
  assert [source[i] for i in range(2)] == [
    {
      "image": b"j0",
      "caption": "t0",
      "question": "w\u00e4s?",
      "answer": ["b"],
      "id": "s.tar:a",
    },
    {
      "image": b"j1",
      "caption": b"t1",
      "question": "why?",
      "answer": "c",
      "id": "s.tar:b",
    },
  ]
  source = shards.TarShards([path], keep=("url", "answer"))
  assert [source[i]["url"] for i in range(2)] == ["u", "v"]
  assert source[1]["answer"] == "c", "a member takes precedence"
  source = shards.TarShards([path], False, keep=("size", "txt"))
  with pytest.raises(sources.BadRow, match="'txt'") as bad:
    source[0]
  assert (bad.value.id, bad.value.reason) == ("s.tar:a", "missing_column")
  with pytest.raises(sources.BadRow, match="'size'") as bad:
    source[1]
  assert bad.value.reason == "missing_column"
  source = shards.TarShards([path], False, keep=("size", "question.txt"))
  assert source[0] == {
    "image": b"j0",
    "size": 0,
    "question.txt": "not an ending",
    "id": "s.tar:a",
  }


def test_a_value_that_no_sample_has_cannot_be_kept(tmp_path):
  path = _tar(tmp_path / "s.tar", KEPT)
  with pytest.raises(
    ValueError,
    match=r"s\.tar: .*\['title'\].*\['caption', 'answer', 'size', 'url', "
    r"'question.txt', 'jpg', 'json', 'question', 'png', ",
  ):
    shards.TarShards([path], keep=("question", "answer", "title"))


def test_only_one_of_the_shards_needs_a_value_to_keep(tmp_path):
  members = {"a.jpg": b"j", "a.txt": b"t"}
  paths = [_tar(tmp_path / "0.tar", members)]
  paths.append(_tar(tmp_path / "1.tar", members | {"a.answer": b"yes"}))
  source = shards.TarShards(paths, keep=("answer",))
  assert source[1]["answer"] == "yes"
  with pytest.raises(sources.BadRow, match="missing_column"):
    source[0]


def test_kept_text_must_be_utf8(tmp_path):
  members = {"a.jpg": b"j", "a.txt": b"t", "a.answer": b"\xff"}
  path = _tar(tmp_path / "s.tar", members)
  source = shards.TarShards([path], keep=("answer",))
  with pytest.raises(sources.BadRow, match=r"answer: .*utf-8") as bad:
    source[0]
  assert bad.value.reason == "broken_row"


def test_kept_members_change_no_rows(tmp_path, monkeypatch):
  """Neither their number nor their order; each choice has a cache."""
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  members = {"b.answer": b"1", "x.answer": b"2", "a.jpg": b"j", "a.txt": b"t"}
  members |= {"b.jpg": b"k", "b.txt": b"u"}
  path = _tar(tmp_path / "s.tar", members)
  for _ in range(2):
    plain = shards.TarShards([path])
    kept = shards.TarShards([path], keep=("answer",))
    assert [plain[i]["id"] for i in range(2)] == ["s.tar:a", "s.tar:b"]
    assert len(plain) == len(kept) == 2
    assert kept[1] == {**plain[1], "answer": "1"}
  assert len(os.listdir(tmp_path)) == 3
