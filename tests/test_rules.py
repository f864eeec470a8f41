"""Rules: which texts of an image are kept."""

import functools
import itertools
import random
import time
import timeit

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


def reason(text, prob=0.9, **options):
  return rules.Rules(**options).reasons([row(text, prob)])[0]


@pytest.mark.parametrize(
  "words, least, most, expected",
  [
    (2, 3, 0, "too_short"),
    (3, 3, 0, ""),
    (3, 0, 3, ""),
    (4, 0, 3, "too_long"),
    (1, 1, 1, ""),
    (300, 0, 0, ""),
  ],
)
def test_limits_of_words_include_the_limit(words, least, most, expected):
  text = " ".join(f"w{n}" for n in range(words))
  assert reason(text, min_words=least, max_words=most) == expected


@pytest.mark.parametrize(
  "prob, threshold, expected",
  [
    (0.5, 0.5, ""),
    (0.49, 0.5, "below_threshold"),
    (0.0, 0.0, ""),
    (1.0, 1.0, ""),
    (0.99, 1.0, "below_threshold"),
  ],
)
def test_a_probability_at_the_threshold_is_kept(prob, threshold, expected):
  assert reason("a dog", prob, threshold=threshold) == expected


@pytest.mark.parametrize(
  "text, number",
  [
    ("", 1),
    ("a", 1),
    ("a b", 1),
    ("a a", 2),
    ("a a b", 2),
    ("b a a a", 3),
    ("a a b a a a b", 3),
    ("a b a b", 2),
    ("a b c a b c a b", 3),
    ("a a a a", 4),
  ],
)
def test_repeats_are_runs_of_a_word_or_occurrences_of_a_pair(text, number):
  """A text is dropped if it has more than the limit."""
  if number > 1:
    assert reason(text, max_repeats=number - 1) == "repetition"
  assert reason(text, max_repeats=number, min_words=0) == ""
  assert reason(text, max_repeats=0, min_words=0) == ""


@pytest.mark.parametrize(
  "similarity, expected", [(0.5, "near_duplicate"), (0.51, "")]
)
def test_texts_at_the_similarity_are_near_duplicates(similarity, expected):
  """Start and end count: (start a), ab, bc, cd are shared, of eight pairs."""
  texts = [row("a b c d e", 0.9), row("a b c d f", 0.8)]
  result = rules.Rules(near_duplicates=similarity).reasons(texts)
  assert result == ["", expected]


def test_single_words_have_pairs_too():
  texts = [row("dog", 0.9), row("cat", 0.8), row("dog.", 0.7)]
  found = rules.Rules(near_duplicates=1.0).reasons(texts)
  assert found == ["", "", "near_duplicate"]


def test_the_best_texts_of_an_image_fill_its_number():
  texts = [
    row(name, prob)
    for name, prob in zip("abcd", (0.6, 0.9, 0.7, 0.8), strict=True)
  ]
  for number, kept in (
    (1, "b"),
    (2, "bd"),
    (3, "bcd"),
    (4, "abcd"),
    (0, "abcd"),
  ):
    found = rules.Rules(max_per_image=number).reasons(texts)
    names = [n for n, why in zip("abcd", found, strict=True) if not why]
    assert "".join(names) == kept
    assert {why for why in found if why} <= {"too_many"}


def test_texts_without_an_image_file_belong_to_their_key():
  selection = rules.Selection(rules.Rules(max_per_image=1))
  rows = [row("a", key="1"), row("b", key="1", prob=0.8), row("c", key="2")]
  assert selection.reasons(rows) == ["", "too_many", ""]
  # In the next work unit nothing is remembered of them.
  assert selection.reasons([row("a", key="1")]) == [""]


@pytest.mark.parametrize(
  "options",
  [
    {"threshold": 0.0},
    {"threshold": 1.0},
    {"near_duplicates": 1.0},
    {"min_words": 10_000},
    {"max_words": 10_000},
    {"max_repeats": 10_000},
    {"max_per_image": 10_000},
    {"sources": ("web",)},
  ],
)
def test_the_limits_themselves_are_allowed(options):
  rules.Rules(**options)


@pytest.mark.parametrize(
  "options",
  [
    {"threshold": -0.1},
    {"near_duplicates": 1.1},
    {"min_words": 10_001},
    {"max_words": -1},
    {"max_repeats": -1},
    {"max_per_image": 10_001},
    {"sources": ()},
  ],
)
def test_values_beyond_the_limits_are_refused(options):
  with pytest.raises(ValueError, match=f"config.merge.{next(iter(options))}"):
    rules.Rules(**options)


def quadratic(texts, similarity):
  """The definition, text by text."""
  kept, reasons = [], []
  for text in texts:
    words = rules.words_of(text)
    pairs = {*itertools.pairwise(["", *words, ""])}
    near = any(
      len(pairs & other) >= similarity * len(pairs | other) for other in kept
    )
    reasons.append("near_duplicate" if near and similarity else "")
    if not near or not similarity:
      kept.append(pairs)
  return reasons


@pytest.mark.parametrize("similarity", [0.0, 0.1, 0.3, 0.5, 2 / 3, 0.8, 1.0])
def test_near_duplicates_are_those_of_the_definition(similarity):
  rng = random.Random(0)
  texts = [
    " ".join(rng.choices("abcd", k=rng.randrange(0, 8))) for _ in range(200)
  ]
  found = rules.Rules(near_duplicates=similarity, min_words=0).reasons(
    [row(text) for text in texts]
  )
  expected = quadratic(texts, similarity)
  assert found == expected
  assert len(set(found)) == (2 if similarity else 1)


@pytest.mark.parametrize("similarity", [1.0, 0.7, 0.3])
@pytest.mark.parametrize("text", ["a picture of thing {0}", "{0} {1} {2} x y"])
def test_the_time_of_many_texts_of_an_image_is_linear(similarity, text):
  rng = random.Random(0)
  seconds = []
  for count in (1_000, 4_000):
    words = ([rng.randrange(50) for _ in range(3)] for _ in range(count))
    texts = [row(text.format(n, *w)) for n, w in enumerate(words)]
    reasons = functools.partial(
      rules.Rules(near_duplicates=similarity).reasons, texts
    )
    # Without the garbage collector, which would look through all of pytest.
    seconds.append(timeit.timeit(reasons, timer=time.process_time, number=1))
  assert seconds[1] < 8 * seconds[0] + 0.2  # four times the texts


def test_the_texts_of_an_image_are_capped():
  texts = [row(f"text {n}", 0.9 - 0.0001 * n) for n in range(1_500)]
  reasons = rules.Rules().reasons(texts)
  assert reasons == [""] * 1_000 + ["too_many"] * 500
  more = rules.Rules(max_per_image=1_200).reasons(texts)
  assert more.count("") == 1_200
  selection = rules.Selection(rules.Rules())
  found = []
  for start in (0, 750):
    found += selection.reasons(
      [t | {"image": "x.jpg"} for t in texts[start : start + 750]]
    )
  assert found == reasons


@pytest.mark.parametrize("name", ["itm_prob", "itc_cosine", "log_prob"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_with_a_score_that_is_no_number_are_dropped(name, value):
  """Rows that were labelled before such scores were refused."""
  labelled = {name: value, "reason": "below_threshold"}
  texts = [row("a dog") | labelled, row("a cat", 0.8)]
  assert rules.Rules(threshold=0.0).reasons(texts) == ["bad_score", ""]


def long_texts(count, num_words, own):
  """Texts of which a share of the words is their own."""
  rng = random.Random(0)
  for n in range(count):
    words = [f"w{k}" for k in range(num_words)]
    for k in rng.sample(range(num_words), int(own * num_words)):
      words[k] = f"x{n}y{k}"
    yield " ".join(words)


def test_the_time_of_long_texts_is_bounded():
  texts = [row(text) for text in long_texts(100, 5_000, 0.2)]
  start = time.process_time()
  reasons = rules.Rules(near_duplicates=0.6).reasons(texts)
  assert time.process_time() - start < 4.0
  assert reasons == [""] * 100


def test_the_comparisons_of_an_image_are_bounded(monkeypatch):
  """Beyond the limit, equal texts are found still, and no others."""
  texts = [row(text) for text in long_texts(9, 20, 0.15)]
  likes = rules.Rules(near_duplicates=0.5)
  assert likes.reasons(texts).count("near_duplicate") > 0
  monkeypatch.setattr(rules, "MAX_COMPARISONS", 0)
  assert likes.reasons([*texts, texts[3]]) == [""] * 9 + ["near_duplicate"]


@pytest.mark.parametrize("similarity", [0.6, 1.0])
@pytest.mark.parametrize("num_words", [199, 200, 201, 1_000])
def test_of_long_texts_the_first_words_and_the_rest_are_compared(
  similarity, num_words
):
  words = [f"w{n}" for n in range(num_words)]
  end = [*words[:-1], "end"]
  twice = [row(" ".join(w)) for w in (words, end, words)]
  found = rules.Rules(near_duplicates=similarity).reasons(twice)
  other_end = "near_duplicate" if similarity < 1 else ""
  assert found == ["", other_end, "near_duplicate"]
