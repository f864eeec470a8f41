"""Statistics of a report, and which images it shows."""

import numpy as np
import pytest

from blip_jax.capfilt import findings


def row(key, text, prob, source="web", reason=None):
  return {
    "key": key,
    "text": text,
    "source": source,
    "itm_prob": prob,
    "reason": reason,
  }


def done(num_images, bad=None, damage=()):
  """A done-file, as far as statistics read it."""
  bad = bad or {}
  images = {"in": num_images, "bad": len(bad)}
  return {"images": images, "bad": bad, "damage": [*damage]}


def texts_in(histogram, low, high):
  """The number of texts in the bins between two probabilities."""
  return sum(
    count
    for count, start, end in zip(
      histogram["counts"],
      histogram["edges"],
      histogram["edges"][1:],
      strict=False,
    )
    if low <= start and end <= high
  )


def histogram_of(probs, threshold=0.5):
  found = findings.Findings(threshold)
  for n, prob in enumerate(probs):
    found.add(0, [row(f"{n}", "a dog", float(prob))], [""], done(1))
  return found.as_json()["histogram"]["web"]


@pytest.mark.parametrize(
  "low, high",
  [
    (0.0, 1.0),
    (0.47, 0.53),
    (0.985, 0.999),
    (0.99999, 0.999999),
    (1e-7, 1e-6),
  ],
)
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.5, 1.0])
def test_bins_follow_the_texts(low, high, threshold):
  """Wherever the texts are, no bar has most of them."""
  logits = np.linspace(findings.logit(low), findings.logit(high), 1000)
  probs = np.float32(1 / (1 + np.exp(-logits)))
  histogram = histogram_of(probs, threshold)
  counts, edges = histogram["counts"], histogram["edges"]
  assert sum(counts) == 1000 and 10 <= len(counts) <= 22
  assert max(counts) <= 150
  assert len(edges) == len(counts) + 1 and (np.diff(edges) >= 0).all()
  assert edges[0] <= probs.min() + 1e-7 and probs.max() - 1e-7 <= edges[-1]


def test_no_bin_has_texts_below_and_above_the_threshold():
  probs = [0.31, 0.39, 0.3999, 0.4, 0.4001, 0.6, 0.7]
  histogram = histogram_of(probs, threshold=0.4)
  assert texts_in(histogram, 0.0, 0.4 + 1e-9) == 3
  assert texts_in(histogram, 0.4 - 1e-9, 1.0) == 4


def test_single_texts_do_not_widen_the_bins():
  probs = [1e-6, *np.linspace(0.97, 0.99, 998), 1.0]
  histogram = histogram_of(probs)
  assert max(histogram["counts"]) < 200
  assert sum(histogram["counts"]) == 1000
  assert histogram["edges"][0] < 2e-6 and histogram["edges"][-1] > 0.9999999


def test_statistics_of_two_work_units():
  found = findings.Findings(threshold=0.5)
  found.add(
    0,
    [
      row("a", "A red dog.", 1.0),
      row("a", "a red dog", 0.5, "synthetic"),
      row("b", "click", 0.26),
      row("c", "", None, reason="empty_caption"),
    ],
    ["", "near_duplicate", "below_threshold", "empty_caption"],
    done(5, bad={"d": "unreadable: no image"}),
  )
  found.add(1, [row("f", "a red dog", 0.74)], [""], done(1, damage=["1.tar"]))
  content = found.as_json()
  # The fifth image of the first work unit has no texts.
  assert content["images"] == {"in": 6, "kept": 2, "dropped": 3, "bad": 1}
  assert content["texts"] == {
    "web": {"in": 4, "kept": 2, "below_threshold": 1, "empty_caption": 1},
    "synthetic": {"in": 1, "near_duplicate": 1},
  }
  web = content["histogram"]["web"]
  assert texts_in(web, 0.0, 0.5) == 1 and texts_in(web, 0.5, 1.0) == 2
  synthetic = content["histogram"]["synthetic"]
  assert synthetic["counts"] == [1]
  assert synthetic["edges"] == pytest.approx([0.5, 0.500025])
  assert content["texts_per_image"] == {0: 3, 1: 2}
  assert content["words"]["before"] == {
    "texts": 3,
    "mean_length": 2.33,
    "vocabulary": 4,
    "lengths": {1: 1, 3: 2},
  }
  assert content["words"]["after"] == {
    "texts": 2,
    "mean_length": 3.0,
    "vocabulary": 3,
    "lengths": {3: 2},
  }
  assert content["frequent"] == [("a red dog", 2)]
  assert content["bad"] == {
    "unreadable": {"number": 1, "examples": ["d"]},
    "empty_caption": {"number": 1, "examples": ["c"]},
  }
  assert content["damage"] == ["1.tar"]


def test_galleries_show_texts_near_the_threshold_and_far_from_it():
  found = findings.Findings(threshold=0.5)
  probs = [n / 100 for n in range(100)]
  rows = [row(str(n), f"text {n}", prob) for n, prob in enumerate(probs)]
  reasons = ["" if prob >= 0.5 else "below_threshold" for prob in probs]
  found.add(3, rows, reasons, done(100))
  keys = {
    title: [item.rows[item.index]["key"] for item in gallery]
    for title, gallery in found.galleries().items()
  }
  down, up = range(99, 87, -1), range(50, 62)
  assert keys == {
    "Web texts kept, far above the threshold": [*map(str, down)],
    "Web texts kept, near the threshold": [*map(str, up)],
    "Web texts dropped, near the threshold": [
      str(n) for n in range(49, 37, -1)
    ],
    "Web texts dropped, far from the threshold": [str(n) for n in range(12)],
  }
  (item, *_) = next(iter(found.galleries().values()))
  assert item == findings.GalleryItem(3, [rows[99]], 0)


def keys_of(found, end):
  """The images of all galleries whose titles contain a word."""
  return [
    item.rows[item.index]["key"]
    for title, gallery in found.galleries().items()
    for item in gallery
    if end in title
  ]


@pytest.mark.parametrize("num_images", [1, 2, 5, 24, 40])
def test_no_image_is_near_the_threshold_and_far_from_it(num_images):
  """Images with several texts, of both sources, kept and dropped."""
  found = findings.Findings(threshold=0.5)
  for n in range(num_images):
    spread = (n + 1) / (2 * num_images + 2)
    rows = [
      row(f"{n}", f"text {k}", 0.5 + sign * spread / (k + 1), source)
      for k in range(3)
      for sign in (1, -1)
      for source in ("web", "synthetic")
    ]
    reasons = ["" if x["itm_prob"] >= 0.5 else "below" for x in rows]
    found.add(0, rows, reasons, done(1))
  near, far = keys_of(found, "near"), keys_of(found, "far")
  assert near and (far or num_images == 1)
  assert not {*near} & {*far}
  for gallery in found.galleries().values():
    keys = [item.rows[item.index]["key"] for item in gallery]
    assert len({*keys}) == len(keys) <= 12


def test_an_image_is_shown_for_its_nearest_text_and_for_its_farthest():
  found = findings.Findings(threshold=0.5)
  for key in "abcd":
    probs = [0.9, 0.6, 0.7] if key < "c" else [0.95, 0.99, 0.98]
    rows = [row(key, f"{prob}", prob) for prob in probs]
    found.add(0, rows, [""] * 3, done(1))
  texts = {
    title.rpartition(", ")[2]: [item.rows[item.index]["text"] for item in items]
    for title, items in found.galleries().items()
  }
  assert texts == {
    "near the threshold": ["0.6", "0.6"],
    "far above the threshold": ["0.99", "0.99"],
  }


def test_galleries_do_not_depend_on_the_order_of_the_rows():
  rows = [row(str(n), "a dog", 0.75) for n in range(40)]
  galleries = []
  for ordered in (rows, rows[::-1]):
    found = findings.Findings(threshold=0.5)
    found.add(0, ordered, [""] * 40, done(40))
    galleries.append(
      {
        title: [item.rows[0]["key"] for item in gallery]
        for title, gallery in found.galleries().items()
      }
    )
  assert galleries[0] == galleries[1]
  assert len(galleries[0]["Web texts kept, near the threshold"]) == 12


def test_rare_texts_are_forgotten_to_bound_memory(monkeypatch):
  monkeypatch.setattr(findings, "_MAX_COUNTED_TEXTS", 4)
  found = findings.Findings(threshold=0.5)
  texts = ["a", "a", "b", "b", "c", "d", "e"]
  rows = [row(str(n), text, 0.9) for n, text in enumerate(texts)]
  found.add(0, rows, [""] * len(rows), done(len(rows)))
  assert found.as_json()["frequent"] == [("a", 2), ("b", 2)]


def test_nothing_has_a_mean_length_of_zero():
  words = findings.Findings(threshold=0.5).as_json()["words"]
  assert words["after"]["mean_length"] == pytest.approx(0.0)


def test_bins_by_hand():
  """Steps of 1e-4 logits from the threshold. Of 200 texts, 1 % are below step
  0, and 1 % above step 196: 20 bins of 10 steps, which is 197 / 20 rounded up.
  The first and the last bin have all that is outside."""
  steps = {-1000: 1, **dict.fromkeys(range(198), 1), 1000: 1}
  found = findings.Findings(0.5)._histogram(steps)
  assert found["counts"] == [11, *[10] * 18, 9]
  edges = np.array([-1000, *range(10, 200, 10), 1001]) * 1e-4
  np.testing.assert_allclose(
    found["edges"], 1 / (1 + np.exp(-edges)), rtol=1e-9
  )


@pytest.mark.parametrize(
  "steps, counts, edges",
  [
    ({}, [], []),
    ({7: 3}, [3], [7, 8]),
    ({0: 1, 19: 1}, [1, *[0] * 18, 1], range(21)),
    ({0: 1, 20: 1}, [1, *[0] * 9, 1], range(0, 23, 2)),
    ({-1: 2, 0: 1}, [2, 1], [-1, 0, 1]),
  ],
)
def test_bins_of_few_texts(steps, counts, edges):
  found = findings.Findings(0.5)._histogram(steps)
  assert found["counts"] == counts
  edges = np.array([*edges], float)
  # The last bin ends after the largest step.
  if len(edges):
    edges[-1] = max(edges[-1], max(steps) + 1)
  expected = 1 / (1 + np.exp(-1e-4 * edges))
  np.testing.assert_allclose(found["edges"], expected, rtol=1e-9)


@pytest.mark.parametrize(
  "prob, logit",
  [
    (0.5, 0.0),
    (0.75, np.log(3)),
    (0.0, -np.log(2**25 - 1)),
    (1.0, np.log(2**25 - 1)),
  ],
)
def test_logits_are_finite(prob, logit):
  assert findings.logit(prob) == pytest.approx(logit)


def test_five_examples_of_each_kind_of_bad_image():
  found = findings.Findings(0.5)
  for n in range(7):
    report = done(1) | {"bad": {f"key {n}": "truncated: why"}}
    report["images"] = {"in": 1, "bad": 1}
    found.add(0, [], [], report)
  assert found.as_json()["bad"] == {
    "truncated": {"number": 7, "examples": [f"key {n}" for n in range(5)]}
  }
  images = found.as_json()["images"]
  assert images == {"in": 7, "kept": 0, "dropped": 0, "bad": 7}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_probability_that_is_no_number_is_bad(value):
  found = findings.Findings(threshold=0.5)
  rows = [row("a", "a dog", value), row("a", "a cat", 0.9)]
  found.add(0, rows, ["bad_score", ""], done(1))
  content = found.as_json()
  assert content["bad"] == {"bad_score": {"number": 1, "examples": ["a"]}}
  assert content["texts"]["web"] == {"in": 2, "bad_score": 1, "kept": 1}
  assert sum(content["histogram"]["web"]["counts"]) == 1
