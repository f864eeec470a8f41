"""Statistics of a report, and which images it shows."""

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
  web = [0] * 20
  web[5] = web[14] = web[19] = 1
  assert content["histogram"]["web"] == web
  assert content["histogram"]["synthetic"] == [0] * 10 + [1] + [0] * 9
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
