"""Answers as VQA's official evaluation normalises them, quirks included."""

import re

# Each word is found without any one of its apostrophes.
_CONTRACTIONS = """
  ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
  hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd
  it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
  not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
  shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
  someone'll someone's something'd something'd've something'll that's there'd
  there'd've there're there's they'd they'd've they'll they're they've 'twas
  wasn't we'd've we've weren't what'll what're what's what've when's where'd
  where's where've who'd who'd've who'll who's who've why'll why're why's won't
  would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
  you're you've
"""
_NUMBERS = "zero one two three four five six seven eight nine ten"
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# An argument of the official program is in the place of another one, so that
# no more periods than this are removed.
_MAX_PERIODS = 32


def _without_an_apostrophe() -> dict[str, str]:
  words = _CONTRACTIONS.split()
  written = {
    word[:at] + word[at + 1 :]: word
    for word in words
    for at, letter in enumerate(word)
    if letter == "'"
  }
  return written | {"somebody'd": "somebodyd"}  # the one that is reversed


_WRITTEN = _without_an_apostrophe()
_DIGITS = {word: str(n) for n, word in enumerate(_NUMBERS.split())}
_DIGITS["none"] = "0"


def stripped(answer: str) -> str:
  """Returns an answer without line ends, tabs and outer white space."""
  return answer.replace("\n", " ").replace("\t", " ").strip()


def normalised(answer: str) -> str:
  """Returns an answer in lower case, without punctuation and articles.

  Numbers up to ten become digits, and so does "none", which becomes "0". A
  punctuation mark next to a space is deleted everywhere, and so is every mark
  if there is a comma between digits; any other becomes a space.
  """
  has_thousands = _THOUSANDS.search(answer) is not None
  text = answer
  for mark in _PUNCTUATION:
    is_loose = f"{mark} " in answer or f" {mark}" in answer
    text = text.replace(mark, "" if is_loose or has_thousands else " ")
  text = _PERIOD.sub("", text, count=_MAX_PERIODS)
  words = [_DIGITS.get(word, word) for word in text.lower().split()]
  return " ".join(
    _WRITTEN.get(word, word) for word in words if word not in _ARTICLES
  )
