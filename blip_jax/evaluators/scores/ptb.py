"""Penn Treebank tokens of captions, cut as the official metrics cut them.

COCO's scores are of the words that Stanford's PTBTokenizer (CoreNLP 3.4.1,
`-preserveLines -lowerCase`) finds, less punctuation. This lexer was written
against the output of that one, until captions no longer differed.
"""

import re
from collections.abc import Iterable, Iterator

from blip_jax.evaluators.scores import ptb_rules

# The official list has the brackets as "-LRB-", but lower case has made them
# "-lrb-" by then: they stay, and count as words in every published score.
PUNCTUATION = frozenset(
  ["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# Nine of ten tokens (the group) and the blanks between, by a short cut: no rule
# cuts them in another way.
_COMMON = re.compile(
  r"(?: |&nbsp;)+|(\n|(?!(?i:cannot|gimme|gonna|gotta|lemme|wanna)\b)"
  r"[A-Za-z]+(?=[ \n]))"
)


def tokenize(caption: str) -> str:
  """Returns the words of a caption in lower case, with a space between them.

  >>> tokenize("The man's T-shirt (red) wasn't $5.")
  "the man 's t-shirt -lrb- red -rrb- was n't $ 5"
  """
  return tokenize_lines([caption])[0]


def tokenize_lines(captions: Iterable[str]) -> list[str]:
  """Returns the words of each caption, read as lines of one text.

  That the official metrics do so shows where a caption ends with a letter: its
  period is dropped if the *next* caption begins like a sentence. Of "a sign
  that reads K." remains "k" before "A man ..." and "k." before "man ...".

  Two departures: a line break within a caption is a space, where the official
  wrapper replaces "\\n" but is put out of step by the rarer ones; and the last
  caption too ends with a line break, as a smiley needs to be seen as one.
  """
  lines = (" ".join(caption.splitlines()) for caption in captions)
  words = [[]]
  for token in _tokens("".join(f"{line}\n" for line in lines)):
    if token == "\n":
      words.append([])
    elif token not in PUNCTUATION:
      words[-1].append(token)
  return [" ".join(line) for line in words[:-1]]


def _tokens(text: str) -> Iterator[str]:
  """All tokens of a text, punctuation and line breaks ("\\n") included."""
  at, end = 0, len(text)
  text += "\n"  # Some rules look at two characters of what follows.
  while at < end:
    if common := _COMMON.match(text, at):
      at = common.end()
      if common[1]:
        yield common[1].lower()
      continue
    longest = write = None
    for pattern, writer in ptb_rules.RULES:
      match = pattern.match(text, at)
      if match and (longest is None or match.end() > longest.end()):
        longest, write = match, writer
    if longest is None:  # A character that the lexer does not know.
      at += 1
      continue
    token = longest[longest.lastindex or 0]
    at += len(token)
    yield write(token).lower()
