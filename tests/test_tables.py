"""CSV and TSV as sources: as csv writes them, and as found on the web."""

import csv
import io
import os
import pickle
import random

import pytest

from blip_jax.data import offsets, sources, tables


def _csv(path, content, **options):
  raw = content if isinstance(content, bytes) else content.encode()
  path.write_bytes(raw)
  return tables.Csv(path, **options)


@pytest.fixture
def table(tmp_path):
  """Make a source of a file's content."""
  return lambda content, name="a.csv", **options: _csv(
    tmp_path / name, content, **options
  )


def _csv_text(rows, delimiter, **style):
  file = io.StringIO(newline="")
  csv.writer(file, delimiter=delimiter, **style).writerows(rows)
  return file.getvalue()


def test_rows_become_records(table):
  source = table(
    "image,caption,image_id\n"
    "a.jpg,one,7\n"
    '/elsewhere/b.jpg,"two, and ""three""",x1\n'
    "https://a.org/p/c.jpg,,\n",
    image_root="/data",
  )
  assert list(source) == [
    {"image": "/data/a.jpg", "caption": "one", "image_id": 7, "id": "a.csv:0"},
    {
      "image": "/elsewhere/b.jpg",
      "caption": 'two, and "three"',
      "image_id": "x1",
      "id": "a.csv:1",
    },
    {"image": "/data/a.org/p/c.jpg", "caption": "", "id": "a.csv:2"},
  ]
  assert len(source) == 3 and source[-1] == source[2]
  with pytest.raises(IndexError):
    source[3]
  assert list(pickle.loads(pickle.dumps(source))) == list(source)


TEXTS = ["", "plain", 'a "quoted" word', "one, two\tthree; four", '5" nail']
TEXTS += ["two\nlines", 'an end\n\nand a "quote"\n', "\u4e00\u4e8c", '"', '\n"']


# Chunks of one byte put a boundary between any two characters.
@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("style", [{}, {"quoting": csv.QUOTE_ALL}])
@pytest.mark.parametrize(
  "name, delimiter, options",
  [("a.csv", ",", {}), ("a.TSV", "\t", {}), ("a.csv", ";", {"delimiter": ";"})],
)
def test_rows_are_those_that_csv_writes(
  table, monkeypatch, chunk, style, name, delimiter, options
):
  monkeypatch.setattr(offsets, "_CHUNK", chunk)
  texts = TEXTS * 3
  random.Random(0).shuffle(texts)
  rows = [[text, f"{i}.jpg", text] for i, text in enumerate(texts)]
  rows = [["title", "image", "caption"], *rows]
  source = table(_csv_text(rows, delimiter, **style), name, **options)
  assert [record["caption"] for record in source] == texts
  assert source[7]["image"] == "7.jpg"


@pytest.mark.parametrize(
  "content",
  [
    b"\xef\xbb\xbfimage,caption\r\na.jpg,one\r\nb.jpg,two\r\n",
    b"\n\n image , caption\n\na.jpg, one\n\r\n\nb.jpg,two",
    b'"image","caption"\n"a.jpg", "one"\n"b.jpg", "two"\n',
  ],
)
def test_byte_order_marks_blank_lines_and_spaces_are_skipped(table, content):
  assert [(r["image"], r["caption"]) for r in table(content)] == [
    ("a.jpg", "one"),
    ("b.jpg", "two"),
  ]


def test_the_first_column_may_have_no_name(table):
  content = "\timage\tcaption\n0\ta.jpg\tone\n"
  (record,) = table(content, "a.tsv")
  assert record["caption"] == "one"


@pytest.mark.parametrize(
  "line, detail",
  [
    ("b.jpg", r"expected 2 fields .*'caption'\], found 1: b'b.jpg"),
    ("b.jpg,one, two", "found 3: .* needs quotes around it"),
    ('b.jpg,"one" two', "expected after"),
    ('b.jpg,"an unclosed quote', "unexpected end"),
    ('"b.jpg,one', "unexpected end"),
    (b"b.jpg,\xff", "utf-8"),
    ("b.jpg,\"['one', 'two']\"", "expected a JSON list of texts"),
    ('b.jpg,"[""a"",' + "[" * 50_000 + ',""b""]"', "expected a JSON list"),
  ],
)
def test_a_malformed_line_costs_one_row(table, line, detail):
  line = line if isinstance(line, bytes) else line.encode()
  good = b'a.jpg,"a good one\nof two lines"\n'
  nail = b'n.jpg,a 5" nail\n'
  content = b"image,caption\n" + good + nail + (line + b"\n" + good) * 2 + nail
  source = table(content)
  assert len(source) == 7
  for index in (0, 3, 5):
    assert source[index]["caption"] == "a good one\nof two lines"
  for index in (1, 6):
    assert source[index]["caption"] == 'a 5" nail'
  for index in (2, 4):
    with pytest.raises(sources.BadRow, match=detail) as bad:
      source[index]
    assert bad.value.reason == "broken_row"
    assert bad.value.id == f"a.csv:{index}"
    assert f"{source.path}: row {index} (byte" in bad.value.detail


def test_lines_are_joined_only_into_rows_of_enough_fields(table):
  source = table('image,caption\n"a.jpg,one\nb.jpg,two"\nc.jpg,"a\nb"\n')
  assert len(source) == 3
  with pytest.raises(sources.BadRow, match="unexpected end"):
    source[0]
  assert [source[i]["caption"] for i in (1, 2)] == ['two"', "a\nb"]


def test_the_last_line_of_a_row_starts_no_other_row(table):
  source = table('image,caption\na.jpg,"one\n"\nb.jpg,",two\nlines"\n')
  assert [r["caption"] for r in source] == ["one\n", ",two\nlines"]


def test_the_lines_that_an_unclosed_quote_joins_are_bounded(table, monkeypatch):
  monkeypatch.setattr(tables, "_MAX_JOINED_BYTES", 40)
  content = 'image,caption\na.jpg,"one\ntwo"\nb.jpg,"' + "long\n" * 10 + '"\n'
  source = table(content)
  assert source[0]["caption"] == "one\ntwo"
  assert len(source) == 12
  with pytest.raises(sources.BadRow, match="unexpected end"):
    source[1]


@pytest.mark.parametrize(
  "line, reason",
  [
    (",one", "missing_image"),
    ("nan,one", "missing_image"),
    ("a.jpg,NaN", "empty_caption"),
    ("a.jpg,null", "empty_caption"),
    ("a.jpg,[]", "empty_caption"),
    ("a.jpg,[null]", "broken_row"),
    ('a.jpg,"[""one"", 5]"', "broken_row"),
  ],
)
def test_an_empty_cell_costs_its_row(table, line, reason):
  source = table(f"image,caption\n{line}\na.jpg,one\n")
  with pytest.raises(sources.BadRow) as bad:
    source[0]
  assert (bad.value.id, bad.value.reason) == ("a.csv:0", reason)
  assert source[1]["caption"] == "one"


def test_multiple_captions_are_a_json_list(table):
  content = 'image,captions\na.jpg,"[""one"", ""two, 2""]"\nb.jpg,[three]\n'
  content += 'c.jpg,[2019]\nd.jpg,"[{""raw"": ""four""}]"\n'
  source = table(content)
  assert [record["caption"] for record in source] == [
    ["one", "two, 2"],
    "[three]",
    "[2019]",
    ["four"],
  ]


@pytest.mark.parametrize(
  "field, image_id",
  [
    ("7", 7),
    ("7.0", 7),
    ("7.5", "7.5"),
    ("007", "007"),
    ("-7", "-7"),
    ("", None),
    ("nan", None),
    ("a", "a"),
  ],
)
def test_image_ids_in_plain_decimal_become_numbers(table, field, image_id):
  (record,) = table(f"image,caption,image_id\na.jpg,one,{field}\n")
  assert record.get("image_id") == image_id


def test_images_alone_need_no_captions(table):
  content = "file_name,img_id\na.jpg,7\n"
  assert list(table(content, with_captions=False)) == [
    {"image": "a.jpg", "image_id": 7, "id": "a.csv:0"}
  ]
  (record,) = table("image\na.jpg\n", with_captions=False)
  assert record == {"image": "a.jpg", "id": "a.csv:0"}


def test_columns_can_be_named(table):
  content = 'image,crop,caption,title\na.jpg,b.jpg,one,"[""two""]"\n'
  (record,) = table(content, image="crop", caption="title")
  assert (record["image"], record["caption"]) == ("b.jpg", ["two"])


def test_further_columns_can_be_kept(table):
  content = "image,caption,question,answer\na.jpg,one,what?,7\nb.jpg,two,,8\n"
  source = table(content, keep=("question", "answer"))
  assert source[0] == {
    "image": "a.jpg",
    "caption": "one",
    "question": "what?",
    "answer": "7",
    "id": "a.csv:0",
  }
  assert source[1]["question"] == "", "an empty field is an empty text"
  assert source[1] == pickle.loads(pickle.dumps(source))[1]
  (record, _) = table(content, keep=("answer",), with_captions=False)
  assert record == {"image": "a.jpg", "answer": "7", "id": "a.csv:0"}
  with pytest.raises(
    ValueError, match=r"a\.csv: header: .*\['title'\].*'question', 'answer'\]"
  ):
    table(content, keep=("answer", "title"))


def test_a_table_without_a_header_has_columns_by_option(table):
  content = 'a dog\thttp://h/a.jpg\t7\n"two\ndogs"\thttp://h/b.jpg\t8\n'
  columns = "caption, url,image_id"
  source = table(content, "cc3m.tsv", columns=columns)
  source = pickle.loads(pickle.dumps(source))
  assert list(source) == [
    {"image": "h/a.jpg", "caption": "a dog", "image_id": 7, "id": "cc3m.tsv:0"},
    {
      "image": "h/b.jpg",
      "caption": "two\ndogs",
      "image_id": 8,
      "id": "cc3m.tsv:1",
    },
  ]
  source = table("odd row\n" + content, "cc3m.tsv", columns=columns)
  with pytest.raises(sources.BadRow, match=r"row 0 .*expected 3 fields"):
    source[0]
  assert len(source) == 3 and source[2]["caption"] == "two\ndogs"
  content = "a;b.jpg;c\n"
  options = {"columns": ",photo,title", "delimiter": ";", "image": "photo"}
  (record,) = table(content, caption="title", **options)
  assert (record["image"], record["caption"]) == ("b.jpg", "c")


@pytest.mark.parametrize(
  "columns, message",
  [
    ("caption,photo", r"\?columns: expected a path under .*'photo'\]"),
    (
      "caption,url,size",
      r"rows 0 to 1: none of these .*expected 3 fields",
    ),
    ("url", r"\?columns: expected several columns with ','"),
  ],
)
def test_columns_that_do_not_fit_are_refused(table, columns, message):
  with pytest.raises(ValueError, match=message) as error:
    table("a dog,a.jpg\na cat,b.jpg\n", columns=columns)
  assert "a.csv" in str(error.value)


@pytest.mark.parametrize("twice", ["image", "caption", "image_id", "size"])
def test_a_column_that_is_needed_occurs_once(table, twice):
  content = f"image,caption,image_id,size,x,x,{twice}\na.jpg,b,3,4,5,6,7\n"
  with pytest.raises(ValueError, match=rf"more under \['{twice}'\]"):
    table(content, keep=("size",))


def test_indices_with_and_without_a_header_differ(table, monkeypatch):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  content = "image,caption\na.jpg,one\nb.jpg,two\n"
  for _ in range(2):
    assert len(table(content)) == 2
    assert len(table(content, columns="image,caption")) == 3


@pytest.mark.parametrize(
  "content, message",
  [
    ("", "expected a header line .* found nothing"),
    ("\n\n", "expected a header line .* found nothing"),
    ("image,caption\n", "no rows after the header"),
    ("image,title\na,b\n", r"text under 'caption' .*'title'\].*\?caption="),
    ("photo,caption\na,b\n", r"a path under 'image' .*'photo',.*\?image="),
    ("a.jpg,one\nb.jpg,two\n", r"'image' .*\['a.jpg', 'one'\].*\?columns="),
    ("image;caption\na;b\n", r"found \['image;caption'\]. \?delimiter="),
    ("imäge,caption\na,b\n".encode("latin-1"), "line in UTF-8 .*xe4"),
  ],
)
def test_a_file_that_is_not_a_table_is_refused(table, content, message):
  with pytest.raises(ValueError, match=message) as error:
    table(content)
  assert "a.csv" in str(error.value)


def test_a_delimiter_is_one_character(table):
  with pytest.raises(ValueError, match="one character as delimiter, found '::"):
    table("image::caption\na::b\n", delimiter="::")


def test_a_missing_file_is_reported(tmp_path):
  with pytest.raises(ValueError, match=r"none\.csv: no such annotation file"):
    tables.Csv(tmp_path / "none.csv")


def test_the_index_of_a_large_file_is_cached(table, tmp_path, monkeypatch):
  monkeypatch.setattr(offsets, "MIN_CACHED_BYTES", 0)
  rows = [["image", "caption"]] + [[f"{i}.jpg", "a\nb"] for i in range(5000)]
  content = _csv_text(rows, ",")
  source = table(content)
  assert len(source) == 5000
  assert len(pickle.dumps(source)) < 2000
  assert pickle.loads(pickle.dumps(source))[4999]["image"] == "4999.jpg"
  assert len(list(tmp_path.glob(".a.csv.rows44-*.npy"))) == 1
  assert len(os.listdir(tmp_path)) == 2


def test_a_line_that_ends_a_row_does_not_begin_another_one(table):
  """The second line of the first row would also make a row of three fields
  with the line after it."""
  source = table('image,caption,more\nx.jpg,"a\n",\nz",w,v\n')
  assert len(source) == 2
  assert source[0]["caption"] == "a\n"
  assert source[1]["caption"] == "w"


@pytest.mark.parametrize("extra, is_joined", [(0, True), (1, False)])
def test_a_row_of_several_lines_has_a_longest_length(
  table, monkeypatch, extra, is_joined
):
  row = 'a.jpg,"one\ntwo"\n'
  monkeypatch.setattr(tables, "_MAX_JOINED_BYTES", len(row) - extra)
  source = table(f"image,caption\n{row}")
  assert len(source) == (1 if is_joined else 2)
