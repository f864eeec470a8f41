r"""The lexer rules of `ptb.py`.

At each position the rule with the longest match wins, and of equal ones the
first. Required context after a token is part of the match: then the token is
the rule's group. So "do" of "don't" (a match of 5 characters) wins over the
word "don" (3).
"""

# ruff: noqa: RUF001 - this file must tell look-alike characters apart

import re
import unicodedata
from collections.abc import Callable

# How tokens are normalised.

_SYMBOLS = {
  "(": "-LRB-",
  ")": "-RRB-",
  "[": "-LSB-",
  "]": "-RSB-",
  "{": "-LCB-",
  "}": "-RCB-",
  "¢": "cents",
  "£": "#",
  **dict.fromkeys("¤\x80₠€", "$"),
  "¼": "1/4",
  "½": "1/2",
  "¾": "3/4",
  "⅓": "1/3",
  "⅔": "2/3",
  "&lt;": "<",
  "&gt;": ">",
  "&amp;": "&",
}
_QUOTES = str.maketrans(
  dict.fromkeys("‘‛‹\x91", "`")
  | dict.fromkeys("’›\x92", "'")
  | dict.fromkeys("“«\x93", "``")
  | dict.fromkeys('”»"\x94', "''")
)


def _word(token: str) -> str:
  # The few tokens with a blank ("1 1/2") get a no-break space and stay one.
  token = token.replace("\xad", "").replace(" ", "\xa0")
  return token.replace("&amp;", "&") or "-"


def _symbol(token: str) -> str:
  return _SYMBOLS.get(token.lower(), token)


def _quote(token: str) -> str:
  return token.replace("&apos;", "'").replace("&quot;", "''").translate(_QUOTES)


def _bracketed(token: str) -> str:
  return _word(token).replace("(", "-LRB-").replace(")", "-RRB-")


def _always(text: str) -> Callable[[str], str]:
  return lambda token: text


# Building blocks of the rules.


def _either(words: str) -> str:
  return "|".join(words.split())


def _capital(words: str) -> str:
  return "|".join(f"{w[0].upper()}(?i:{w[1:]})" for w in words.split())


# Numerals such as "²" are not letters; nor, to a lexer of UTF-16, are
# characters beyond U+FFFF, such as emojis.
_NEITHER = r"\W_²³¹¼-¾⁰⁴-₉⅐-↉①-⒛⓪-⓿❶-➓㈠-㊿\U00010000-\U0010ffff"
_ALNUM = f"[^{_NEITHER}]"
_LETTER = rf"[^\d{_NEITHER}]"
_MARKS = "".join(  # of the scripts from Latin to Lao
  chr(c) for c in range(0x300, 0xF00) if unicodedata.category(chr(c))[0] == "M"
)
# A soft hyphen (U+00AD) may occur anywhere in a word.
_SIGN = rf"(?:{_LETTER}|[{_MARKS}\xad]|&[aeiouAEIOU](?:acute|grave|uml);)"
_APOSTROPHE = "(?:['’\x92]|&apos;)"
_TICK = "(?:['’`‘‛\x91\x92]|&apos;)"  # And characters typed instead.
_BLANK = "[ \xa0]"
_GAP = "[- \xa0]"
_EYES = "'<=>^x~"

_SYLLABLES = rf"{_SIGN}(?:{_SIGN}|[\d\xad])*"
_WORD = f"{_SYLLABLES}(?:[.!?]{_SYLLABLES})*"
_CLITIC = f"{_APOSTROPHE}(?:[dmsDMS]|(?i:ll|re|ve))"
_INITIALS = (
  r"(?:[A-Za-z](?:\.[A-Za-z])+"
  r"|(?i:Canada|EU|Japan|Korean|non|Sino)-U\.S|U\.S\.-U\.(?:K|S\.S\.R))"
)
_NUMBER = r"(?:\d*(?:[.:,\xad٫٬]\d+)+|\d+)"
_SLASH = r"(?:\\?/|⁄)"

# Compounds: 1,000-foot, two-year-old, five-o'clock, AT&T.
_MEASURE = (
  rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:{_INITIALS}\.|[A-Za-z0-9\xad]+))+"
)
_ELIDED = f"(?:[dDlLoO]{_TICK}{_ALNUM})?{_ALNUM}+"
_HYPHENED = f"{_ELIDED}(?:[-_֊‐‑]{_ELIDED})*"
_AND = "[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"

_TAG = "[A-Za-z][A-Za-z0-9_:.-]*"
_URL_END = r"""[^\s"<>|.!?(){},-]"""
# Without "www." neither digits nor capitals: nothing from "," to "_".
_SITE = (
  r"""(?:(?i:www\.)(?:[^\s"<>|.!?(){},]+\.)+[A-Za-z]{2,4}"""
  r"""|(?:[^\s!"$'()`{|},-_]+\.)+(?i:com|net|org|edu))"""
)

# Abbreviations before a name, those that may end a sentence, and others.
_TITLES = _either(
  """cf dr ft lt mr ms mt ph st vs adj adm adv ave cie col cpl det drs ens gen
  gov hon jos maj mme mrs mfg mtg pfc pvt rep rev sen sfc sgt spc ste alex asst
  atty brig capt cmdr dept elec govs insp invt mlle msgr natl pres prof reps
  sens supt assoc attys comdr lieut profs supts treas messrs wm"""
)
_ENDINGS = _either(
  r"""al co ct ga jr ky md mo rd rt sq sr va vt ala apr aug bhd cos dak dec esq
  est etc ext feb fla fri inc ind jan jul jun kan ltd mar mon neb nev nov oct
  plc pte pty sep seq sys tel thu tue wed wis wyo ariz assn bldg blvd bros colo
  conn corp intl kans mich minn mont okla penn ppte ppty ptes ptys sept tenn
  tues univ wisc calif pptes pptys thurs ph\.d ed\.d"""
)
_STATES = _capital("ark az del ill la mass miss ore pa tex wash")
_NUMBERED = _either("art ca figs? nos? op pp prop")
# Words that start a sentence.
_OPENERS = _capital(
  r"""a about according additionally after an as at but earlier he her here
  however if in it last many more now once one other our she since so some such
  that the their then there these they this we what when while yet you
  mr\. ms\."""
)
_FILES = _either(
  """bat bmp class cgi cpp dll docx? exe gif gz h html? java jar jpe?g mov mp3
  pdf php pl png ppt ps py sql tar txt wav xml zip c x"""
)

RULES = [
  (re.compile(pattern), normalise)
  for pattern, normalise in (
    # Two words in one.
    ("((?i:can))(?i:not)|((?i:got))(?i:ta)|((?i:gon|wan))(?i:na)", _word),
    ("((?i:lem|gim))(?i:me)|((?i:more))'n|('[tT])(?i:is|was)", _word),
    # Markup and entities.
    (
      rf"<(?:[!?][A-Za-z-][^>\n]*|/{_TAG} *"
      rf"""|{_TAG}(?: +(?:{_TAG}(?: *= *(?:'[^'\n]*'|"[^"\n]*"))?)?)*/?)>""",
      _word,
    ),
    ("&#[0-9]+;", _word),
    ("(?i:&(?:amp|lt|gt);)", _symbol),
    # Words, and clitics that are split off: it 's, do n't.
    (f"({_WORD}){_CLITIC}", _word),
    (f"([A-Za-z\xad]*[A-MO-Za-mo-z\xad])[nN]{_TICK}[tT]", _word),
    (_WORD, _word),
    # Words with an apostrophe: 'em, '80s, ol', e'er, Cap'n, ma'am, O'Neil.
    (
      f"{_APOSTROPHE}(?:[nN]{_APOSTROPHE}?|(?i:em|till?|cause)|[2-9]0[sS])"
      f"|(?:[dDjJlL]|(?i:dunkin|ol|somethin)){_APOSTROPHE}"
      "|(?i:c'mon|e'er|ev'ry|li'l|nat'l|nor'easter|s'mores)"
      f"|[oO]{_TICK}[oO]|(?i:cap{_APOSTROPHE}n|c{_APOSTROPHE}est)"
      f"|{_LETTER}+[aeiouyAEIOUY]{_TICK}[aeiouA-Z]{_LETTER}*"
      f"|[A-HJ-XZn]{_TICK}{_LETTER}{{2,}}",
      _word,
    ),
    (rf"({_APOSTROPHE}[0-9]{{2}})\s", _word),
    (f"([yY]{_APOSTROPHE}){_LETTER}", _word),
    # The web.
    (rf"""(?i:https?://)[^\s"<>|(){{}}]+{_URL_END}""", _word),
    (_SITE, _word),
    (rf"""{_SITE}/[^\s"<>|()]+{_URL_END}""", _word),
    (
      r"""<?[A-Za-z0-9][^\s"<>|(){}]*@(?:[^\s"<>|(){}.]+\.)*"""
      r"""[^\s"<>|(){}.]+>?""",
      _word,
    ),
    (f"@[A-Za-z_][A-Za-z_0-9]*|#{_LETTER}+", _word),
    (f"({_CLITIC})[^A-Za-z]", _quote),
    (f"[nN]{_TICK}[tT]", _quote),
    # Numbers.
    (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", _word),
    (f"[+-]?{_NUMBER}", _word),
    ("[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)", _word),
    (f"(?:[0-9]{{1,4}}{_GAP})?[0-9]{{1,4}}{_SLASH}[0-9]{{1,4}}", _word),
    ("[¼-¾⅓⅔]", _symbol),
    # Names that start or end with a symbol.
    (r"(?i:-[LR][RCS]B-|C\.D\.s|pro-|anti-|C\+\+|[CF]#)", _word),
    ("(?i:S(?:&|&amp;)P-500|S(?:&|&amp;)Ls)", _word),
    # Abbreviations, initials and file names.
    (rf"((?i:{_ENDINGS})\.|(?:{_STATES})\.)(?s:..)", _word),
    (rf"(?i:{_TITLES})\.", _word),
    (rf"((?i:{_NUMBERED})\.)\s?\d", _word),
    *(
      (rf"({pattern}\.)[,;:、]", _word)
      for pattern in (_WORD, _MEASURE, _HYPHENED, _AND)
    ),
    (rf"([A-Za-z])\.\s+(?:{_OPENERS})\s", _word),
    (rf"{_INITIALS}\.|[A-Za-z]\.", _word),
    (rf"({_ALNUM}+(?:\.{_ALNUM}+)*\.(?i:{_FILES}))[\s.?!,]", _word),
    # Compounds.
    (_MEASURE, _word),
    (_HYPHENED, _word),
    (_AND, _word),
    (rf"{_PART}(?:\\?/{_PART}){{1,2}}", _word),
    # Telephone numbers: (555) 123-4567, +55 555 1234567.
    (
      rf"(?:\([0-9]{{2,3}}\){_BLANK}?|\+{{0,2}}(?:[0-9]{{2,4}}{_GAP}){{1,2}})"
      rf"[0-9]{{3,4}}{_GAP}?[0-9]{{3,5}}",
      _bracketed,
    ),
    # Symbols.
    (r"[A-Z]*\$|[¢-¥\x80₠€؋฿₤￠￡￥￦]", _symbol),
    (r"(')[A-Za-z]\S|''|['\"]|[`‘’‛-”‹›«»\x91-\x94]{1,2}", _quote),
    ("(?i:&(?:apos|quot);)", _quote),
    (_CLITIC, _quote),
    (rf"\.{{3,5}}|(?:\.{_BLANK}){{2,4}}\.|[…\x85]", _always("...")),
    ("-{1,4}|[–—―\x96\x97]|(?i:&(?:md|mdash|ndash);)", _always("--")),
    (r"-{5,}|[?!]+|@+|#+|\*+|(?:\\\*){1,3}|_+|<<|>>", _word),
    # Smileys: ;-), (^_^).
    (r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _bracketed),
    (
      rf"[-{_EYES}]_[-{_EYES}]|\([-{_EYES}][._]?[-{_EYES}]\)"
      rf"|\([{_EYES}]-[{_EYES}`]\)",
      _bracketed,
    ),
    # Other characters that are tokens by themselves.
    (
      r"[]!-/:-?[\\^`{|}~¡¦-©¬®-±´¶-¸¿×÷\u037e\u0387\u0589\u05be\u05c0\u05c3"
      r"\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e\u061f"
      r"\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e4f\u1fbd"
      r"\u2016\u2017\u201a\u201e\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042"
      r"\u2044\u207a-\u207e\u208a-\u208e\u2100-\u214f\u2155-\u215e\u2190-\u2bff"
      r"\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
      r"\uff5b-\uff65]",
      _symbol,
    ),
  )
]
