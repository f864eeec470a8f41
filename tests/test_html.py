"""The page of a report: what it shows, and that it loads nothing."""

import base64
import html.parser
import io

import numpy as np
import PIL.Image
import pytest

from blip_jax.capfilt import findings, work_units
from blip_jax.capfilt import html as report_html

HOSTILE = "<script>alert(1)</script> & \"so\" 'on'"


class Page(html.parser.HTMLParser):
  """Tags, text and URLs of a page; fails on tags that are not closed."""

  def __init__(self, text):
    super().__init__()
    self.open_tags, self.urls, self.tags, self.text = [], [], [], ""
    self.feed(text)
    assert self.open_tags in ([], ["html"])  # which need not be closed

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag not in ("meta", "img"):
      self.open_tags.append(tag)
    self.urls += [value for name, value in attrs if name in ("src", "href")]

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)

  def handle_endtag(self, tag):
    assert self.open_tags.pop() == tag

  def handle_data(self, data):
    self.text += data


def content(**changes):
  words = {"texts": 2, "mean_length": 2.5, "vocabulary": 4, "lengths": {2: 1}}
  return {
    "images": {"in": 3, "kept": 1, "dropped": 1, "bad": 1},
    "texts": {
      "web": {"in": 1200, "kept": 300, "below_threshold": 900},
      "synthetic": {},
    },
    "histogram": {
      "web": {"edges": [0.25, 0.4, 0.5, 0.75], "counts": [1, 2, 4]},
      "synthetic": {"edges": [], "counts": []},
    },
    "texts_per_image": {0: 1, 1: 1},
    "words": {"before": words, "after": words},
    "frequent": [("a red dog", 2)],
    "bad": {},
    "damage": [],
    "rules": {"threshold": 0.5, "sources": ["web"], "min_words": 3},
    "throughput": {"host-1": {"images": 3, "seconds": 2.0, "per_second": 1.5}},
    "job": {"seed": 7, "captioner": "c0ffee", "filter": "beef"},
  } | changes


def test_the_page_shows_the_statistics():
  page = Page(report_html.render(content(), {"Web texts kept": ["CARD"]}))
  assert "300 of 1,200 texts are kept, for 1 of 3 images" in page.text
  assert "totalkeptdroppedunusableimages3111" in page.text
  assert "below threshold" in page.text
  assert "25.0%" in page.text
  assert "Web texts keptCARD" in page.text
  assert "host-1" in page.text
  assert "Images and texts that cannot be usedNone." in page.text
  assert page.urls == ["report.csv"]


def test_the_page_begins_with_models_seed_rules_and_threshold():
  page = Page(report_html.render(content(), {}))
  head = page.text[page.text.index("Models and rules") :][:300]
  for line in (
    "captionerweights c0ffee",
    "filterweights beef",
    "seed7",
    "threshold of itm_prob0.5",
    'config.merge.sources["web"]',
    "config.merge.min_words3",
  ):
    assert line in head
  page = Page(report_html.render(content(job={"filter": "f"}), {}))
  assert "captionernone" in page.text


def test_texts_and_errors_are_escaped():
  page = Page(
    report_html.render(
      content(
        frequent=[(HOSTILE, 1)],
        bad={"unreadable": {"number": 1, "examples": [HOSTILE]}},
        damage=[HOSTILE],
        job={"source": HOSTILE},
      ),
      {HOSTILE: []},
    )
  )
  assert "script" not in page.tags
  assert page.text.count(HOSTILE) == 4


@pytest.fixture
def unit():
  """A work unit of one image, 16 pixels wide and high."""
  return work_units.WorkUnit("a", "scenes:train?num=1&size=16")


def gallery_item(index=0, key="k", row=0):
  texts = (("web", 0.912, HOSTILE), ("synthetic", None, "a" * 400))
  rows = [
    {"key": key, "row": row, "source": source, "itm_prob": prob, "text": text}
    for source, prob, text in texts
  ]
  return findings.GalleryItem(0, rows, index)


def test_a_card_has_the_texts_of_an_image_and_its_thumbnail(unit):
  page = Page(report_html.card(gallery_item(key=HOSTILE), [unit]))
  assert "script" not in page.tags
  assert f"web 0.912 {HOSTILE}" in page.text
  assert f"synthetic - {'a' * 300}{HOSTILE}" in page.text
  (url,) = page.urls
  header, data = url.split(",")
  assert header == "data:image/jpeg;base64"
  with PIL.Image.open(io.BytesIO(base64.b64decode(data))) as image:
    assert image.size == (160, 160)
    pixels = np.asarray(image, np.float32)
  source, _ = unit.open()
  expected = np.repeat(np.repeat(source[0]["image"], 10, 0), 10, 1)
  assert np.abs(pixels - expected).mean() < 12  # JPEG


def test_the_text_that_a_card_is_shown_for_is_bold(unit):
  text = report_html.card(gallery_item(index=1), [unit])
  assert '<p class=""><b class="web">' in text
  assert '<p class="this"><b class="synthetic">' in text


def test_an_image_that_is_gone_has_no_thumbnail(unit):
  page = Page(report_html.card(gallery_item(row=5), [unit]))
  assert page.urls == ["data:,"]


def test_the_histogram_marks_the_threshold():
  text = report_html.render(content(), {})
  assert text.count('class="out"') == 2 and text.count('class="in"') == 1
  assert '<line x1="48" x2="48"' in text
  assert "<title>0.5 to 0.75: 4</title>" in text
  assert "7 web texts" in text and "0 synthetic texts" in text


@pytest.mark.parametrize("threshold, x", [(0.0, 0), (0.9, 72)])
def test_a_threshold_outside_of_all_texts_is_marked_at_their_side(threshold, x):
  text = report_html.render(content(rules={"threshold": threshold}), {})
  assert f'<line x1="{x}" x2="{x}"' in text
  assert f">threshold {threshold}<" in text


def test_probabilities_close_to_one_are_told_apart():
  edges = [0.9999, 0.99995, 0.99999]
  histogram = {"web": {"edges": edges, "counts": [1, 2]}}
  text = report_html.render(content(histogram=histogram), {})
  assert "<title>0.99995 to 0.99999: 2</title>" in text


def test_a_rule_that_sets_no_limit_says_so():
  text = report_html.render(
    content(rules={"threshold": 0.0, "max_words": 0}), {}
  )
  page = Page(text)
  assert "0 (no limit of its own)" in page.text
  page = Page(
    report_html.render(content(rules={"threshold": 0.0, "max_words": 7}), {})
  )
  assert "no limit" not in page.text
