"""Rules: which texts of an image are kept."""

import pytest

from blip_jax.capfilt import rules


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
    ({"markup": False}, "it&#39;s a dog", "markup"),
    ({"markup": True}, "it&#39;s a dog", ""),
    ({"markup": False}, "tea & cake, 1 < 2 > 0", ""),
    ({"threshold": 0.95}, "a dog", "below_threshold"),
    ({"threshold": 0.9}, "a dog", ""),
    ({"sources": ("synthetic",)}, "a dog", "other_source"),
  ],
)
def test_rules_for_one_text(options, text, reason):
  assert rules.Rules(**options).reasons([row(text)]) == [reason]


def test_the_most_probable_of_near_duplicates_is_kept():
  texts = [
    row("a red circle left of a blue star", 0.6),
    row("A red circle left of a blue star!", 0.7),
    row("a blue star left of a red circle", 0.8),
    row("a red circle left of a big blue star", 0.9),
    row("...", None),
  ]
  reasons = rules.Rules().reasons(texts)
  assert reasons == ["near_duplicate", "", "", "", "empty_caption"]
  # Equal words in another order have another meaning.
  near = rules.Rules(near_duplicates=0.6).reasons(texts)
  assert near == ["near_duplicate", "near_duplicate", "", "", "empty_caption"]
  off = rules.Rules(near_duplicates=0.0, max_per_image=2).reasons(texts)
  assert off == ["too_many", "too_many", "", "", "empty_caption"]


def test_the_first_of_equally_probable_texts_is_kept():
  texts = [row("a dog"), row("A dog.", source="synthetic")]
  assert rules.Rules().reasons(texts) == ["", "near_duplicate"]


def test_rows_of_the_same_image_file_are_one_image():
  selection = rules.Selection(rules.Rules(max_per_image=2))
  first = [row("a", image="x.jpg", key="1"), row("b", image="x.jpg", key="2")]
  assert selection.reasons(first) == ["", ""]
  second = [
    row("a", image="x.jpg", key="3"),
    row("c", image="x.jpg", key="4"),
    row("a", image="y.jpg", key="5"),
  ]
  assert selection.reasons(second) == ["near_duplicate", "too_many", ""]


@pytest.mark.parametrize(
  "options",
  [{"threshold": 1.5}, {"min_words": -1}, {"sources": ("webb",)}],
)
def test_invalid_rules_are_refused(options):
  with pytest.raises(ValueError, match=f"config.merge.{next(iter(options))}"):
    rules.Rules(**options)
