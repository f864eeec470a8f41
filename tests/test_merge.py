"""From the rows of a job to a training set and a report."""

import html.parser
import io
import json
import tarfile

import numpy as np
import PIL.Image
import pytest

from blip_jax import defaults
from blip_jax.capfilt import job, label, ledger, merge, report, rows, rules
from blip_jax.data import datasets
from tests.test_capfilt import SCENES, members, write_shard

# Of one picture: source, probability, text.
TEXTS = (
  ("web", 0.9, "A red circle."),
  ("web", 0.2, "click to enlarge"),
  ("synthetic", 0.8, "a red circle"),
  ("synthetic", 0.6, "a red circle left of a blue star"),
)


def told(row, record, texts):
  """What models might have said of a picture."""
  image = record["image"]
  return label.Labelled(
    row,
    record["id"],
    image if isinstance(image, str) else "",
    str(record["image_id"]) if "image_id" in record else None,
    texts=tuple(
      label.Text(text, source, "", prob, 0.1, -3.0)
      for source, prob, text in texts
    ),
  )


def make_job(folder, config, pictures):
  """A job whose units are done, without any model."""
  settings = {
    key: config[key] for key in ("image_root", "web_texts", "work_unit_rows")
  }
  book = ledger.Ledger(folder)
  book.begin(settings | {"source": list(config.source)}, force=False)
  constant = {"captioner": "c", "filter": "f", "seed": 0}
  for unit in job.units_of(book.settings):
    source, damage = unit.open()
    counts, found = rows.Counts(damage), []
    for place, texts in enumerate(pictures[unit.name]):
      picture = told(place, source[place], texts)
      own = [*rows.of_picture(picture, 0.5, constant)]
      counts.add(picture, own)
      found += own
    book.finish(
      unit,
      rows.to_parquet(found),
      {"unit": unit.name, "input": unit.fingerprint(), **counts.as_json()},
    )
  return book


@pytest.fixture
def listed(tmp_path):
  """A job over a list of five pictures, in three units."""
  root = tmp_path / "pictures"
  root.mkdir()
  lines = []
  for n in range(5):
    PIL.Image.fromarray(SCENES[n]["image"]).save(root / f"{n}.png")
    lines.append({"image": f"{n}.png", "caption": "x", "image_id": n})
  (tmp_path / "web.json").write_text(json.dumps(lines))
  config = defaults.capfilt().lock()
  config.update(source=(str(tmp_path / "web.json"),), image_root=str(root))
  config.update(work_unit_rows=2, out=str(tmp_path / "out"))
  config.merge.out = str(tmp_path / "clean.json")
  units = {
    "web.json-00000": [TEXTS, TEXTS[1:2]],
    "web.json-00001": [TEXTS[:1], TEXTS[2:]],
    "web.json-00002": [TEXTS[3:]],
  }
  make_job(config.out, config, units)
  return config


def run(config):
  return merge.merge(config, config.out)


def captions(path, root=""):
  source = datasets.open_source(str(path), str(root))
  return [source[n]["caption"] for n in range(len(source))]


def test_a_list_of_what_is_kept_is_read_by_training(listed, tmp_path):
  stats = run(listed)
  assert stats == {
    "synthetic/in": 5,
    "synthetic/kept": 4,
    "synthetic/near_duplicate": 1,
    "web/below_threshold": 2,
    "web/in": 4,
    "web/kept": 2,
  }
  assert json.loads((tmp_path / "clean.json.stats.json").read_text()) == stats
  source = datasets.open_source(str(tmp_path / "clean.json"), listed.image_root)
  assert len(source) == 6
  assert source[0]["caption"] == "A red circle."
  assert source[1]["caption"] == TEXTS[3][2]
  assert source[0]["image"] == f"{listed.image_root}/0.png"
  assert source[0]["image_id"] == "0"
  first = json.loads((tmp_path / "clean.json").read_text())[0]
  assert first["image"] == "0.png"
  assert first["source"] == "web"
  assert first["itm_prob"] == pytest.approx(0.9)


def test_the_threshold_and_the_sources_can_be_changed(listed, tmp_path):
  listed.merge.threshold = 0.0
  listed.merge.sources = ("web",)
  run(listed)
  assert captions(tmp_path / "clean.json") == [
    TEXTS[n][2] for n in (0, 1, 1, 0)
  ]
  listed.merge.threshold = 0.95
  with pytest.raises(ValueError, match="no text is kept"):
    run(listed)
  # What was there stays.
  assert len(captions(tmp_path / "clean.json")) == 4
  assert not [*tmp_path.glob(".*")]


def test_each_source_may_have_its_own_weight(listed, tmp_path):
  human = tmp_path / "human.jsonl"
  lines = (
    {"image": "4.png", "caption": ["one", "two", "..."]},
    {"image": "4.png", "caption": None},
  )
  human.write_text("".join(json.dumps(line) + "\n" for line in lines))
  listed.merge.by_source = True
  listed.merge.human = (str(human),)
  listed.merge.out = str(tmp_path / "clean.jsonl")
  stats = run(listed)
  assert (stats["human/in"], stats["human/kept"]) == (4, 2)
  assert stats["human/empty_caption"] == 2
  assert captions(tmp_path / "clean.human.jsonl") == ["one", "two"]
  assert len(captions(tmp_path / "clean.web.jsonl")) == 2
  assert len(captions(tmp_path / "clean.synthetic.jsonl")) == 4


def test_a_picture_that_is_gone_costs_no_other(listed, tmp_path):
  (tmp_path / "pictures" / "0.png").unlink()
  listed.merge.out = str(tmp_path / "clean")
  stats = run(listed)
  assert stats["web/missing"] == 1
  assert stats["web/kept"] == 1
  assert stats["synthetic/kept"] == 3
  assert len(captions(tmp_path / "clean" / "*.tar")) == 4


def test_shards_hold_pictures_as_they_were(tmp_path):
  shard = write_shard(tmp_path / "0.tar", members(0, 2))
  config = defaults.capfilt().lock()
  config.update(source=(str(shard),), out=str(tmp_path / "out"))
  config.merge.out = str(tmp_path / "clean")
  make_job(config.out, config, {"0": [TEXTS, TEXTS[:1]]})
  run(config)
  source = datasets.open_source(str(tmp_path / "clean" / "*.tar"))
  assert len(source) == 3
  assert [source[n]["caption"].decode() for n in range(3)] == [
    "A red circle.",
    TEXTS[3][2],
    "A red circle.",
  ]
  with PIL.Image.open(io.BytesIO(source[2]["image"])) as picture:
    np.testing.assert_array_equal(np.asarray(picture), SCENES[1]["image"])
  with tarfile.open(tmp_path / "clean" / "00000.tar") as tar:
    along = json.load(tar.extractfile("000000002.json"))
  assert along["key"] == "0.tar:0001"
  # Again, to the same bytes; over another set, never.
  before = (tmp_path / "clean" / "00000.tar").read_bytes()
  with pytest.raises(ValueError, match="is there already"):
    run(config)
  config.merge.out = str(tmp_path / "again")
  run(config)
  assert (tmp_path / "again" / "00000.tar").read_bytes() == before
  config.merge.out = str(tmp_path / "clean.json")
  with pytest.raises(ValueError, match="is no file of its own"):
    run(config)
  config.merge.out = str(tmp_path / "clean.zip")
  with pytest.raises(ValueError, match=r"expected a \.json"):
    run(config)


def test_a_job_that_is_not_finished_is_not_merged(listed, tmp_path):
  (tmp_path / "out" / "web.json-00001.done.json").unlink()
  with pytest.raises(ValueError, match="1 of 3 units are not done"):
    run(listed)


def test_jobs_are_merged(listed, tmp_path):
  other = defaults.capfilt().lock()
  other.update(source=listed.source, image_root=listed.image_root)
  units = {"web.json-00000": [[("web", 0.7, "another")]] + [()] * 4}
  make_job(tmp_path / "other", other, units)
  listed.merge.jobs = (str(tmp_path / "other"),)
  run(listed)
  assert captions(tmp_path / "clean.json")[-1] == "another"


def row(text, prob=0.9, source="web", image=None, key="k"):
  return {
    "key": key,
    "image": image,
    "text": text,
    "source": source,
    "itm_prob": prob,
    "reason": None if prob is not None else "empty_caption",
  }


@pytest.mark.parametrize(
  ("options", "text", "reason"),
  [
    ({}, "a dog", ""),
    ({"min_words": 3}, "a dog", "too_short"),
    ({"max_words": 3}, "a dog on a beach", "too_long"),
    ({"max_repeats": 2}, "dai dai dai", "repetition"),
    ({"max_repeats": 2}, "a dog and a dog and a dog", "repetition"),
    ({"max_repeats": 2}, "a dog and a cat", ""),
    ({"markup": False}, "<b>a dog</b>", "markup"),
    ({"markup": False}, "see https://a.org/b", "markup"),
    ({"markup": False}, "tea & cake, 1 < 2 > 0", ""),
    ({"threshold": 0.95}, "a dog", "below_threshold"),
    ({"sources": ("synthetic",)}, "a dog", "other_source"),
  ],
)
def test_rules_of_one_text(options, text, reason):
  assert rules.Rules(**options).reasons([row(text)]) == [reason]


def test_near_duplicates_keep_the_likeliest():
  texts = [
    row("a red circle left of a blue star", 0.6),
    row("A red circle left of a blue star!", 0.7),
    row("a blue star left of a red circle", 0.8),
    row("a red circle left of a big blue star", 0.9),
    row("...", None),
  ]
  reasons = rules.Rules().reasons(texts)
  assert reasons == ["near_duplicate", "", "", "", "empty_caption"]
  # The same words in another order say something else.
  near = rules.Rules(near_duplicates=0.6).reasons(texts)
  assert near == ["near_duplicate", "near_duplicate", "", "", "empty_caption"]
  off = rules.Rules(near_duplicates=0.0, max_per_image=2).reasons(texts)
  assert off == ["too_many", "too_many", "", "", "empty_caption"]


def test_a_picture_of_many_rows_is_one_picture():
  selection = rules.Selection(rules.Rules(max_per_image=2))
  one = [row("a", image="x.jpg", key="1"), row("b", image="x.jpg", key="2")]
  assert selection.reasons(one) == ["", ""]
  more = [
    row("a", image="x.jpg", key="3"),
    row("c", image="x.jpg", key="4"),
    row("a", image="y.jpg", key="5"),
  ]
  assert selection.reasons(more) == ["near_duplicate", "too_many", ""]


@pytest.mark.parametrize(
  "options",
  [{"threshold": 1.5}, {"min_words": -1}, {"sources": ("webb",)}],
)
def test_rules_that_cannot_be_are_refused(options):
  with pytest.raises(ValueError, match=f"config.merge.{next(iter(options))}"):
    rules.Rules(**options)


class Page(html.parser.HTMLParser):
  """Tags that are open, and what a page would load."""

  def __init__(self, text):
    super().__init__()
    self.open, self.loads, self.tags, self.text = [], [], [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag not in ("meta", "img"):
      self.open.append(tag)
    self.loads += [v for k, v in attrs if k in ("src", "href")]

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_the_report_shows_what_was_kept_and_loads_nothing(listed, tmp_path):
  hostile = "<script>alert(1)</script> & \"so\" 'on'"
  config = defaults.capfilt().lock()
  config.update(source=listed.source, image_root=listed.image_root)
  config.out = str(tmp_path / "other")
  texts = [[("web", 0.9, hostile)], TEXTS, TEXTS[1:2], (), TEXTS[:2]]
  book = make_job(config.out, config, {"web.json-00000": texts})
  (book.folder / "log").mkdir()
  line = {"unit": "web.json-00000", "pictures": 5, "seconds": 2.0}
  (book.folder / "log" / "here-1.jsonl").write_text(json.dumps(line) + "\n")
  found = report.report(config, config.out)
  assert found["web/kept"] == 3
  page = Page((tmp_path / "other" / "report.html").read_text())
  assert not page.open[1:]  # html itself need not be closed
  assert "script" not in page.tags
  assert hostile in page.text
  assert page.loads
  assert all(url.startswith("data:image/jpeg") for url in page.loads)

  told = json.loads((tmp_path / "other" / "report.json").read_text())
  assert told["pictures"] == {"in": 5, "kept": 3, "dropped": 2, "bad": 0}
  assert told["texts_per_picture"] == {"0": 2, "1": 2, "2": 1}
  assert sum(told["histogram"]["web"]) == 6
  assert told["histogram"]["web"][17] == 3  # 0.9, as float32
  assert told["words"]["before"]["texts"] == 6
  assert told["words"]["after"]["texts"] == 4
  assert ["a red circle", 2] in told["frequent"]
  assert told["throughput"]["here-1"]["pictures_per_second"] == 2.5


def test_a_report_of_nothing_is_refused(listed, tmp_path):
  for path in (tmp_path / "out").glob("*.done.json"):
    path.unlink()
  with pytest.raises(ValueError, match="no unit is done"):
    report.report(listed, listed.out)
