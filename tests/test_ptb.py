"""The PTB tokenizer, compared with the output of the official one."""

# ruff: noqa: RUF001 - look-alikes are part of what is tested

import json
import random
import shutil
import time

import pytest

from blip_jax.evaluators.scores import ptb

# Captions of every kind, and what Stanford's tokenizer and the official list
# of punctuation left of them.
SENTENCES = {
  "A dog sleeps.": "a dog sleeps",
  "  Two   cats,\ttwo hats!  ": "two cats two hats",
  "Why? Because; see: yes": "why because see yes",
  "": "",
  " ... ": "",
}
APOSTROPHES = {
  "The dog's bowl isn't full": "the dog 's bowl is n't full",
  "can't won't shan't ain't": "ca n't wo n't sha n't ai n't",
  "I'm you're we've he'd they'll": "i 'm you 're we 've he 'd they 'll",
  "IT'S A DOG, ISN'T IT?": "it 's a dog is n't it",
  "shouldn't've": "should n't 've",
  "The dogs' bowls": "the dogs bowls",
  "That’s the cat’s, isn’t it": "that 's the cat 's is n't it",
  "it´s don`t go’sxy": "it ´ s do n`t go 's xy",
  "cannot gonna Gotta WANNA": "can not gon na got ta wan na",
  "gimme, lemme. More'n": "gim me lem me more 'n",
  "cannot've gonna-be": "cannot 've gonna-be",
  "'tis 'Twas 'twere": "'t is 't was twere",
  "'em 'til 'cause ol' somethin'": "'em 'til 'cause ol' somethin'",
  "nothin' goin' 'bout": "nothin goin bout",
  "rock 'n' roll, rock'n'roll": "rock 'n' roll rock 'n' roll",
  "five o'clock O'Neil d'Or": "five o'clock o'neil d'or",
  "o’clock jack-o'-lantern": "o’clock jack-o lantern",
  "ma'am ne'er e'er o'er": "ma'am ne'er e'er o'er",
  "y'all Hawai'i Cap'n C'mon": "y' all hawai'i cap'n c'mon",
  "the '80s, '85 and '90 styles": "the '80s '85 and '90 styles",
  "the 80's and 1980s": "the 80 's and 1980s",
}
QUOTES = {
  "a \"big\" sign 'stop'": "a big sign stop",
  "“big” ‘stop’ «va» ``x''": "big stop va x",
  # Two marks at once are one word, of which the list of punctuation has none.
  "‘he said “yes”’": "he said yes '''",
  "„low” ‚low’": "„ low ‚ low",
}
BRACKETS = {
  "a (red) [old] {odd} car": (
    "a -lrb- red -rrb- -lsb- old -rsb- -lcb- odd -rcb- car"
  ),
}
DOTS = {
  "wait... what.. no....": "wait what no",
  "end of it.The next": "end of it.the next",
  "so…": "so",
  "a . . . b": "a b",
  "no...5 no..5": "no 5 no .5",
}
ABBREVIATIONS = {
  "Mr. and Mrs. Po, Dr. No": "mr. and mrs. po dr. no",
  "on 5th Ave. near Main St.": "on 5th ave. near main st.",
  "flags of the U.S. and U.K.": "flags of the u.s. and u.k.",
  "at 5 p.m. or 10 a.m.": "at 5 p.m. or 10 a.m.",
  "Acme Inc. etc. vs. Jr.": "acme inc. etc. vs. jr.",
  "e.g. a cat, i.e. a pet": "e.g. a cat i.e. a pet",
  "No. 5, no. Figs. 2, figs.": "no. 5 no figs. 2 figs",
  "Sept. 5, Mon. in Wash.": "sept. 5 mon. in wash.",
  "wash. miss. ill. pa.": "wash miss ill pa",
  "12 oz. of 3 in. and 2 lbs.": "12 oz of 3 in and 2 lbs",
  "a Ph.D. from D.C.": "a ph.d. from d.c.",
  "J. S. Bach": "j. s. bach",
  "the letter B. It is red": "the letter b it is red",
  "the letter B. it is red": "the letter b. it is red",
  "odd., od.ds.; o-dd.: A&B., odd.)": "odd. od.ds. o-dd. a&b. odd -rrb-",
  "1.5-m., a_b., 1,000., C.D.s": "1.5-m. a_b. 1,000 c.d.s",
}
NUMBERS = {
  "1,000 cats, 2.5 dogs, .5": "1,000 cats 2.5 dogs .5",
  "at 10:30 or 10:30am or 5pm": "at 10:30 or 10:30 am or 5pm",
  "1st 2nd 21st 3D 4x4": "1st 2nd 21st 3d 4x4",
  "50% off, +5 -5 5+5": "50 % off +5 -5 5 +5",
  "1/2 3/4 24/7 12/25/2010 1/2-20": "1/2 3/4 24/7 12/25/2010 1/2-20",
  "1 1/2 cups and 1½": "1\xa01/2 cups and 1 1/2",
  "½ ¼ ⅓ ⅛ 5² H₂O": "1/2 1/4 1/3 ⅛ 5 ² h ₂ o",
  "5'6\" tall, 5 ft. 6 in.": "5 6 tall 5 ft. 6 in",
  "call 555-1234 or (555) 123-4567": (
    "call 555-1234 or -lrb-555-rrb-\xa0123-4567"
  ),
}
MONEY = {
  "$5 $5.50 US$5 A$1,000": "$ 5 $ 5.50 us$ 5 a$ 1,000",
  "£5 €5 5¢ ¥5": "# 5 $ 5 5 cents ¥ 5",
}
HYPHENS = {
  "a well-known T-shirt": "a well-known t-shirt",
  "a 2-year-old, state-of-the-art": "a 2-year-old state-of-the-art",
  "a dog - no -- a cat": "a dog no a cat",
  "a dog—no–a cat": "a dog no a cat",
  "pre- and post-war -end": "pre and post-war end",
  "a---b a-----b --5 —5": "a b a ----- b 5 5",
  "U.S.-based non-U.S.": "u.s.-based non-u.s.",
  "snake_case a__b": "snake_case a __ b",
}
SLASHES = {
  "and/or his/her/its": "and/or his/her/its",
  "w/ w/o b/w a/b/c/d": "w / w/o b/w a/b/c / d",
  "front / back\\side": "front / back \\ side",
}
SIGNS = {
  "AT&T, R&B, b&b & me": "at&t r&b b & b & me",
  "#1 #dog @cat a@b.com": "# 1 #dog @cat a@b.com",
  "a * b = c ~ d | e ^ f": "a * b = c ~ d | e ^ f",
  "hi!! what?! *** ##": "hi !! what ?! *** ##",
  "90° 5×7 © ™ • ★": "90 ° 5 × 7 © ™ • ★",
  "C++ C# .NET": "c++ c# net",
  ":) ;-) :D <3 ^_^": ":-rrb- ;--rrb- :d < 3 ^_^",
  "see www.a-b.com or http://a.bc/d?e.": "see www.a-b.com or http://a.bc/d?e",
  "a~b.com/cd/ 1b.com/cd": "a~b.com/cd/ 1b com/cd",
  "a.jpg 12.jpg img_1.png": "a.jpg 12.jpg img_1 png",
  "<b>bold</b> &amp; &lt; it&apos;s": "<b> bold </b> & < it 's",
  "&quot;a&quot; &#39; &nbsp;b &eacute;t": "a &#39; b &eacute;t",
  "S&P-500 S&Ls": "s&p-500 s&ls",
}
UNICODE = {
  "Café à Zürich, naïve": "café à zürich naïve",
  "cafe\u0301 so\xadft\xa0spot": "cafe\u0301 soft spot",
  "日本の犬 Привет": "日本の犬 привет",
  # What lies beyond 16 bits is dropped, symbols within are words.
  "a😀dog 👍🏽 ❤️ ☺": "a dog ❤ ☺",
}
CASES = {
  caption: words
  for group in (
    SENTENCES,
    APOSTROPHES,
    QUOTES,
    BRACKETS,
    DOTS,
    ABBREVIATIONS,
    NUMBERS,
    MONEY,
    HYPHENS,
    SLASHES,
    SIGNS,
    UNICODE,
  )
  for caption, words in group.items()
}


@pytest.mark.parametrize("caption", CASES)
def test_tokens_equal_the_official_ones(caption):
  assert ptb.tokenize(caption) == CASES[caption]


def test_example_in_the_docstring():
  words = ptb.tokenize("The man's T-shirt (red) wasn't $5.")
  assert words == "the man 's t-shirt -lrb- red -rrb- was n't $ 5"
  assert words in ptb.tokenize.__doc__


def test_the_next_caption_decides_on_a_period_after_a_letter():
  sign = "A sign that reads K."
  for following, last in {
    "A man rests": "k",
    "\nThe": "k",
    "a man rests": "k.",
    "Men rest": "k.",
    "": "k.",
  }.items():
    words, _ = ptb.tokenize_lines([sign, following])
    assert words == f"a sign that reads {last}", following
  assert ptb.tokenize_lines(["e.g.", "The cat"]) == ["e.g.", "the cat"]


@pytest.mark.parametrize(
  "ending", ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x85", "\u2028"]
)
def test_each_caption_stays_on_its_line(ending):
  captions = [f"one{ending}two", "", f"three{ending}", "four"]
  assert ptb.tokenize_lines(captions) == ["one two", "", "three", "four"]
  assert ptb.tokenize_lines([]) == []


def test_lower_case_words_are_unchanged():
  rng = random.Random(0)
  captions = [
    " ".join(
      "".join(rng.choices("bdgkpt", k=rng.randint(2, 9)))
      for _ in range(rng.randint(0, 12))
    )
    for _ in range(200)
  ]
  assert ptb.tokenize_lines(captions) == captions


def test_any_text_gives_one_line_of_tokens():
  rng = random.Random(0)
  signs = "ab AB.,'\"-/:;()[]<>&#@$%!?*_~^\\|0123½é’“…😀"
  signs += " \n\r\t\0\x85\xa0\xad\ud800"
  captions = ["".join(rng.choices(signs, k=30)) for _ in range(2000)]
  lines = ptb.tokenize_lines(captions)
  assert len(lines) == len(captions)
  for line in lines:
    assert not set(line.split(" ")) & ptb.PUNCTUATION
    assert "\n" not in line and "  " not in line and line == line.strip(" ")


def test_long_texts_without_spaces_take_seconds():
  start = time.process_time()
  for text in ("a," * 4000, "<!" * 4000, "#." * 4000, "a'" * 4000, "1/" * 4000):
    ptb.tokenize(text)
  assert time.process_time() - start < 20


def _raw_and_tokenized(folder, case):
  """Captions and words of a case, in the order of the official run."""
  tokenized = json.loads((folder / f"tokenized_{case}.json").read_text())
  if case == "abstract50s_candsB":
    hyps, refs = "abstract_candsB.json", "abstract48S.json"
    hyps, refs = (f"cider_abstract50s/{name}" for name in (hyps, refs))
  else:
    refs = "captions_val2017.json"
    hyps = {
      "vinvl_val2017": "vinvl_base_val2017_results.json",
      "fakecap_in_val2017": "fakecap_in_val2017_results.json",
      "ruizewang_fakecap_val2017": (
        "ruizewang_captions_val2017_fakecap_results.json"
      ),
    }[case]
  for name, kind in ((hyps, "hyps"), (refs, "refs")):
    rows = json.loads((folder / name).read_text())
    captions = {}
    for row in rows if isinstance(rows, list) else rows["annotations"]:
      captions.setdefault(str(row["image_id"]), []).append(row["caption"])
    for image_id, words in tokenized[kind].items():
      # Of two candidates the official run took the first.
      yield from zip(captions[image_id][: len(words)], words, strict=True)


@pytest.mark.parametrize(
  "case",
  [
    "vinvl_val2017",
    "fakecap_in_val2017",
    "ruizewang_fakecap_val2017",
    "abstract50s_candsB",
  ],
)
def test_all_official_captions_are_tokenised_alike(shared_dir, case):
  folder = shared_dir / "data" / "coco_eval"
  captions, words = zip(*_raw_and_tokenized(folder, case), strict=True)
  found = ptb.tokenize_lines(captions)
  assert len(captions) > 700
  wrong = [
    (caption, expected, got)
    for caption, expected, got in zip(captions, words, found, strict=True)
    if got != expected
  ]
  assert not wrong


def test_live_official_tokenizer_gives_the_same():
  package = "pycocoevalcap.tokenizer.ptbtokenizer"
  official = pytest.importorskip(package, reason="needs the extra [coco]")
  if shutil.which("java") is None:
    pytest.skip("needs Java")
  # It loses blank captions at the end of a file.
  captions = [*filter(str.strip, CASES), "the end"]
  tokenised = official.PTBTokenizer().tokenize(
    {i: [{"caption": text}] for i, text in enumerate(captions)}
  )
  assert ptb.tokenize_lines(captions) == [
    words for (words,) in tokenised.values()
  ]
