"""Folders of images, captioned or not."""

import collections
import errno
import io
import os
import pickle
import subprocess

import numpy as np
import PIL.Image
import pytest

from blip_jax.data import datasets, folders, sources, transforms
from blip_jax.runtime import files as files_lib
from tests import helpers


def _make(folder, files):
  """Writes files, each with its content or, for None, empty."""
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content or b""
    path.write_bytes(raw)
  return str(folder)


NAMES = ["b.png", "a.jpg", "sub/c.JPEG", "sub/a.jpg", "sub.jpg", "B.webp"]
HIDDEN = [".hidden.jpg", ".git/d.jpg", "sub/._a.jpg", "notes.md", "jpg"]


def test_a_listing_is_sorted_and_skips_hidden_files(tmp_path):
  folder = _make(tmp_path, dict.fromkeys(NAMES + HIDDEN))
  assert folders.listing(folder) == sorted(NAMES)


def test_links_are_followed_but_not_in_circles(tmp_path):
  folder = _make(tmp_path / "set", {"a.jpg": None, "sub/b.jpg": None})
  _make(tmp_path / "other", {"c.jpg": None})
  os.symlink(tmp_path / "other", tmp_path / "set" / "linked")
  os.symlink(tmp_path / "set", tmp_path / "set" / "sub" / "up")
  os.symlink(tmp_path / "set", tmp_path / "other" / "back")
  names = ["a.jpg", "linked/c.jpg", "sub/b.jpg"]
  assert folders.listing(folder) == names
  os.symlink(tmp_path / "other" / "c.jpg", tmp_path / "set" / "d.jpg")
  assert folders.listing(folder) == ["a.jpg", "d.jpg", *names[1:]]


def test_a_folder_without_images_is_refused(tmp_path):
  folder = _make(tmp_path, {"a.heic": None, "b.heic": None, "README": None})
  with pytest.raises(ValueError, match=r"2 \.heic, 1 without.*\.jpg \.jpeg"):
    folders.listing(folder)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"empty: expected images.* no files"):
    folders.listing(str(tmp_path / "empty"))
  folder = _make(tmp_path / "texts", {"a.txt": "one"})
  with pytest.raises(ValueError, match=r"1 \.txt"):
    folders.CaptionedImages(folder)


def test_images_become_records(tmp_path):
  names = ["a.jpg", "sub/\u00fc.jpg", os.fsdecode(b"\xff.jpg")]
  source = pickle.loads(pickle.dumps(folders.Images(str(tmp_path), names)))
  assert list(source) == [
    {"image": str(tmp_path / name), "id": id}
    for name, id in zip(names, [*names[:2], r"\xff.jpg"], strict=True)
  ]
  assert len(source) == 3 and source[-1] == source[2]
  with pytest.raises(IndexError):
    source[3]


def test_names_are_stored_compactly():
  source = folders.Images("", [f"{i:06d}.jpg" for i in range(10_000)])
  assert len(pickle.dumps(source)) < 10_000 * (10 + 8) + 1000
  assert source[9_999]["id"] == "009999.jpg"


def test_captions_are_in_files_next_to_the_images(tmp_path):
  folder = _make(
    tmp_path,
    {
      "a.jpg": None,
      "a.txt": "one\n",
      "b.c.PNG": None,
      "b.c.txt": "\ufefftwo\r\n\r\n three \u2028 four\n",
      "sub/a.jpg": None,
      "sub/a.txt": "five",
      ".hidden.txt": "no",
    },
  )
  source = pickle.loads(pickle.dumps(folders.CaptionedImages(folder)))
  assert list(source) == [
    {"image": f"{folder}/a.jpg", "caption": "one", "id": "a.jpg"},
    {
      "image": f"{folder}/b.c.PNG",
      "caption": ["two", "three \u2028 four"],
      "id": "b.c.PNG",
    },
    {"image": f"{folder}/sub/a.jpg", "caption": "five", "id": "sub/a.jpg"},
  ]


def test_text_files_have_several_endings(tmp_path):
  """As kohya's tools write them, and as Windows does."""
  texts = ["a.caption", "b.TXT", "c.Caption", "d.caption", "d.txt", "e.txt"]
  names = {f"{name}.JPG": None for name in "abcde"}
  folder = _make(tmp_path, names | {name: f"of {name}" for name in texts})
  source = pickle.loads(pickle.dumps(folders.CaptionedImages(folder)))
  assert [record["caption"] for record in source] == [
    "of a.caption",
    "of b.TXT",
    "of c.Caption",
    "of d.txt",
    "of e.txt",
  ]
  assert folders.text_file(f"{folder}/d.JPG") == f"{folder}/d.txt"
  assert folders.text_file(f"{folder}/b.JPG") == f"{folder}/b.TXT"
  assert folders.text_file(f"{folder}/f.JPG") is None


def test_images_of_many_formats_are_listed(tmp_path):
  names = ["a.JPG", "b.jfif", "c.jpe", "d.avif", "e.J2K", "f.pnm", "g.apng"]
  assert folders.listing(_make(tmp_path, dict.fromkeys(names))) == names


def test_files_that_are_not_used_are_counted_once(tmp_path, monkeypatch):
  logged = []
  monkeypatch.setattr(
    sources.logging, "warning", lambda text, *args: logged.append(text % args)
  )
  names = ["a.jpg", "b.HEIC", "c.heic", "d.jxl", "README", ".hidden.heic"]
  names += ["a.txt", "e.jpg", "e.caption", "e.txt", "Metadata.CSV"]
  folder = _make(tmp_path, dict.fromkeys(names, "text"))
  for _ in range(2):
    folders.listing(folder)
    folders.CaptionedImages(folder)
  assert logged == [
    f"{folder}: files that are not used: 2 .heic, 1 without ending, 1 .jxl",
    f"{folder}: text files that are not used, because the image has another "
    "one: 1",
  ]


def test_images_that_a_table_does_not_list_are_counted(tmp_path, caplog):
  names = ["a.jpg", "b.jpg", "sub/c.jpg", "d.heic"]
  folder = _make(tmp_path, dict.fromkeys(names, "image"))
  table = "file_name,caption\n./a.jpg,a dog\nb.jpg,\n"
  (tmp_path / "metadata.csv").write_text(table)
  for _ in range(2):
    assert len(datasets.open_source(str(folder))) == 2
  assert caplog.text.count("not used") == 2
  assert (
    f"{folder}: 1 of its 3 images are not in metadata.csv, so they are not "
    "used, such as sub/c.jpg"
  ) in caplog.text
  assert f"{folder}: files that are not used: 1 .heic" in caplog.text


def test_a_table_of_captions_may_be_named_in_any_case(tmp_path):
  folder = _make(tmp_path, {"Metadata.CSV": "file_name,caption\n"})
  assert folders.metadata(folder) == f"{folder}/Metadata.CSV"
  _make(tmp_path, {"metadata.jsonl": "{}"})
  with pytest.raises(ValueError, match=r"Metadata.CSV.*metadata.jsonl"):
    folders.metadata(folder)


@pytest.mark.parametrize(
  "files, id, reason, detail",
  [
    ({"b.jpg": None}, "b.jpg", "missing_caption", "b.txt: no such file"),
    ({"b.txt": "b"}, "b.txt", "missing_image", r"b.txt: no image .*\.jpg"),
    ({"b.jpg": None, "b.txt": "\n \n"}, "b.jpg", "empty_caption", "b.txt"),
    ({"b.jpg": None, "b.txt": b"\xff"}, "b.jpg", "broken_row", "utf-8"),
  ],
)
def test_an_unmatched_file_is_a_bad_row(tmp_path, files, id, reason, detail):
  pairs = {f"{n}.{e}": "text" for n in "ac" for e in ("jpg", "txt")}
  source = folders.CaptionedImages(_make(tmp_path, pairs | files))
  assert len(source) == 3 and source[0] and source[2]
  with pytest.raises(sources.BadRow, match=detail) as bad:
    source[1]
  assert (bad.value.id, bad.value.reason) == (id, reason)


def test_a_folder_without_captions_is_refused(tmp_path):
  folder = _make(tmp_path, {"a.jpg": None, "b.jpg": None, "README.txt": "r"})
  with pytest.raises(
    ValueError, match=r"a\.txt for a\.jpg.* any of 2 images.*metadata\.csv"
  ):
    folders.CaptionedImages(folder)


def test_a_folder_may_have_a_table_of_captions(tmp_path):
  assert folders.metadata(str(tmp_path)) is None
  _make(tmp_path, {"metadata.csv": "image,caption"})
  assert folders.metadata(str(tmp_path)) == str(tmp_path / "metadata.csv")
  _make(tmp_path, {"metadata.jsonl": "{}"})
  with pytest.raises(ValueError, match=r"metadata\.csv', .*metadata\.jsonl"):
    folders.metadata(str(tmp_path))


@pytest.mark.parametrize("ending", transforms.ENDINGS)
def test_listed_image_formats_can_be_decoded(ending):
  format = PIL.Image.registered_extensions()[ending]
  file = io.BytesIO()
  grey = PIL.Image.fromarray(np.full((8, 8), 120, np.uint8))
  (grey if ending == ".pgm" else grey.convert("RGB")).save(file, format)
  assert helpers.decode(file.getvalue(), 100).shape == (8, 8, 3)


@pytest.mark.parametrize(
  "files, captions",
  [
    ({"a.txt": "low", "a.TXT": "high"}, "low"),
    ({"a.TXT": "high", "a.caption": "other"}, "high"),
    ({"a.caption": "low", "a.CAPTION": "high"}, "low"),
    ({"a.CAPTION": "high"}, "high"),
  ],
)
def test_the_preferred_of_several_text_files_is_read(tmp_path, files, captions):
  """Text before caption, and lower case before any other."""
  folder = _make(tmp_path, {"a.jpg": None, **files})
  (record,) = folders.CaptionedImages(folder)
  assert record["caption"] == captions
  assert folders._by_preference({".CAPTION", ".TXT", ".caption", ".txt"}) == [
    *(".txt", ".TXT", ".caption", ".CAPTION")
  ]


def test_at_most_ten_endings_are_counted_the_commonest_first():
  counts = collections.Counter({f".{c}": 5 for c in "lkjihgfedcb"})
  counts |= {"": 9, ".z": 7}
  text = folders._counts(counts)
  assert text.startswith("9 without ending, 7 .z, 5 .b, 5 .c,")
  assert text.endswith("5 .i") and text.count(",") == 9


def test_names_are_stored_as_bytes():
  names = ["", "a", "\u00fc.jpg", os.fsdecode(b"\xff")]
  stored = folders._Names(names)
  assert len(stored) == 4
  assert [stored[n] for n in range(4)] == names


def test_a_folder_is_listed_once_whatever_links_lead_to_it(tmp_path):
  """All paths through nine folders that link to each other are a million."""
  folder = tmp_path / "set"
  names = [f"d{n}" for n in range(9)]
  _make(folder, {f"{name}/{name}.png": None for name in names})
  _make(tmp_path / "other", {"deep/x.png": None})
  for name in names:
    for other in names:
      if name != other:
        (folder / name / other).symlink_to(f"../{other}")
  (folder / "a").symlink_to("d3")
  (folder / "b").symlink_to("../other")
  (folder / "c").symlink_to("../other/deep")
  (folder / "e").symlink_to("..")
  expected = [*(f"{name}/{name}.png" for name in names), "b/deep/x.png"]
  assert folders.listing(str(folder)) == sorted(expected)


def test_a_link_to_a_folder_with_this_one_in_it(tmp_path):
  _make(tmp_path, {"set/a.png": None, "other/b.png": None})
  (tmp_path / "set" / "up").symlink_to("..")
  assert folders.listing(str(tmp_path / "set")) == ["a.png", "up/other/b.png"]


def test_folders_may_be_deep(tmp_path, caplog):
  """Deeper than Python calls, and than a path may be long."""
  _make(tmp_path, {"a.png": None})
  here = os.open(tmp_path, os.O_RDONLY)
  deepest = os.path.join(*"d" * 1500, "x.png")
  for depth in range(2500):
    os.mkdir("d", dir_fd=here)
    inner = os.open("d", os.O_RDONLY, dir_fd=here)
    os.close(here)
    here = inner
    if depth == 1499:
      os.close(os.open("x.png", os.O_CREAT, dir_fd=here))
  os.close(here)
  try:
    assert folders.listing(str(tmp_path)) == ["a.png", deepest]
    assert "subfolders that cannot be read" in caplog.text
  finally:
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # Python cannot


def test_a_folder_that_cannot_be_read_costs_its_files(
  tmp_path, monkeypatch, caplog
):
  _make(tmp_path, {"a.png": None, "secret/b.png": None, "z/c.png": None})
  entries = files_lib.entries

  def fail(folder, number=errno.EACCES):
    if str(folder).endswith("secret"):
      raise OSError(number, "Permission denied", folder)
    return entries(folder)

  monkeypatch.setattr(files_lib, "entries", fail)
  assert folders.listing(str(tmp_path)) == ["a.png", "z/c.png"]
  assert "not used: 1, such as secret: Permission denied" in caplog.text
  monkeypatch.setattr(files_lib, "entries", lambda f: fail(f, errno.EMFILE))
  with pytest.raises(OSError):
    folders.listing(str(tmp_path))
  with pytest.raises(OSError):
    folders.listing(str(tmp_path / "secret"))


@pytest.mark.parametrize("kind", ["folder", "pipe", "nowhere", "itself"])
def test_what_is_no_file_is_no_table(tmp_path, caplog, kind):
  _make(tmp_path, {"a.png": None, "a.txt": "one"})
  table = tmp_path / "metadata.csv"
  match kind:
    case "folder":
      table.mkdir()
    case "pipe":
      os.mkfifo(table)
    case _:
      table.symlink_to(table.name if kind == "itself" else "nowhere")
  (record,) = datasets.open_source(str(tmp_path))
  assert record["caption"] == "one"
  assert f"{table}: no regular file" in caplog.text
  (tmp_path / "metadata.jsonl").write_text(
    '{"file_name": "a.png", "caption": "two"}'
  )
  (record,) = datasets.open_source(str(tmp_path))
  assert record["caption"] == "two"
