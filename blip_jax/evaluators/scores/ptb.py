"""Penn Treebank tokenisation of captions, as in the official metrics.

COCO's metrics are computed on the tokens of Stanford's PTBTokenizer (CoreNLP
3.4.1, `-preserveLines -lowerCase`) without punctuation. This lexer was
developed against the output of that tokenizer, until captions no longer
differed.
"""

import re
from collections.abc import Iterable, Iterator

from blip_jax.evaluators.scores import ptb_rules

# The official list has brackets as "-LRB-", but by then they are lower-cased to
# "-lrb-": they are kept, and count as words in every published score.
PUNCTUATION = frozenset(
  ["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# A shortcut for nine tokens in ten (the group) and the blanks between them: no
# rule splits them differently.
_COMMON = re.compile(
  r"(?: |&nbsp;)+|(\n|(?!(?i:cannot|gimme|gonna|gotta|lemme|wanna)\b)"
  r"[A-Za-z]+(?=[ \n]))"
)


def tokenize(caption: str) -> str:
  """Returns the tokens of a caption in lower case, separated by spaces.

  >>> tokenize("The man's T-shirt (red) wasn't $5.")
  "the man 's t-shirt -lrb- red -rrb- was n't $ 5"
  """
  return tokenize_lines([caption])[0]


def tokenize_lines(captions: Iterable[str]) -> list[str]:
  """Tokenises captions as lines of one text, as the official metrics do.

  This matters where a caption ends with a single letter: its period is dropped
  if the *next* caption starts like a sentence. "a sign that reads K." ends with
  "k" before "A man ..." and with "k." before "man ...".

  Two departures: a line break within a caption is a space, where the official
  wrapper replaces only "\\n", so that rarer line breaks misalign its lines; and
  the last caption ends with a line break too, without which a smiley at its end
  would not be recognised.
  """
  lines = (" ".join(caption.splitlines()) for caption in captions)
  words: list[list[str]] = [[]]
  for token in _tokens("".join(f"{line}\n" for line in lines)):
    if token == "\n":
      words.append([])
    elif token not in PUNCTUATION:
      words[-1].append(token)
  return [" ".join(line) for line in words[:-1]]


def _tokens(text: str) -> Iterator[str]:
  """Yields all tokens of a text, with punctuation and line breaks ("\\n")."""
  at, end = 0, len(text)
  text += "\n"  # Some rules look two characters ahead.
  while at < end:
    if common := _COMMON.match(text, at):
      at = common.end()
      if common[1]:
        yield common[1].lower()
      continue
    longest, normalise = None, str
    for pattern, rule in ptb_rules.RULES:
      match = pattern.match(text, at)
      if match and (longest is None or match.end() > longest.end()):
        longest, normalise = match, rule
    if longest is None:  # A character that the lexer does not know.
      at += 1
      continue
    token = longest[longest.lastindex or 0]
    at += len(token)
    yield normalise(token).lower()
