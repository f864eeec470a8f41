r"""What a web page leaves in a text: tags, entities, addresses, templates.

A text is searched for what nobody writes in a caption. What a caption may have
is no markup: `a < b > c`, `AT&T; phone`, `[b] right`, `%20` for 20 percent.
"""

import html.entities
import re

# In lower case, as pages also have &NBSP;.
_NAMES = {
  name.removesuffix(";").lower()
  for name in html.entities.html5
  if name.endswith(";")
}
_NAMED = re.compile(r"&([a-z][a-z0-9]+);", re.IGNORECASE)
_BBCODE = "caption|code|color|email|embed|font|gallery|img|list|quote|size|url"
_REMAINS = re.compile(
  "|".join(
    (
      r"<[a-z/!][^<>]*>|<[a-z]+\s[^<>]*=|<%",  # a tag, or its beginning
      # Entities that browsers understand without a semicolon.
      r"&\#\d{1,7};|&\#\d{2,7}|&\#x[0-9a-f]{1,6}",
      r"&(?:amp|apos|gt|lt|nbsp|quot)\b",
      r"(?:https?|ftp)://|\bwww\.\w",
      r"\[/[a-z]+\]|\[(?:img|url)\]",
      rf"\[(?:{_BBCODE})(?:=|\s[^\[\]]*=)",
      r"\{\{|\{%|\$\{|\[\[",
      # An address in which spaces or letters are encoded.
      r"(?:[a-z]|%20\w{1,40})%2[0cf]|[a-z]%3[adf]|%[c-e][0-9a-f]%[89ab]",
      r"\\[nrt]|\\u[0-9a-f]{4}",  # a line end or letter of source code
    )
  ),
  re.IGNORECASE,
)


def is_in(text: str) -> bool:
  """Whether a text has remains of a web page."""
  return bool(_REMAINS.search(text)) or any(
    match[1].lower() in _NAMES for match in _NAMED.finditer(text)
  )
