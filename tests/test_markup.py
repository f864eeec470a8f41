"""What a web page leaves in a text, and what only looks like it."""

import html.entities

import pytest

from blip_jax.capfilt import markup

REMAINS = [
  *("it&#39;s a dog", "a dog&#x27;s bowl", "quote &#8217; here", "it&#39s"),
  *("5 &frac12; cups", "a&nbsp;b", "a &amp b", "&copy; 2020", "&NBSP;a"),
  *("&amp;amp;", "a &thickapprox; b", "R&#38;D", "&#XE9;"),
  *("<br>a", "<b>dog</b>", "a<br/>b", "<!-- a -->", "<img src=a.jpg alt="),
  *(
    "see www.example.com",
    "WWW.A.ORG",
    "http://x.org/a",
    "HTTPS://X",
    "ftp://a",
  ),
  *("[img]x[/img]", "a [b]dog[/b]", "[url=a]dog", '[caption id="1"] a dog'),
  *("{{title}}", "[[File:a.jpg]]", "{% if a %}", "${title}", "<% a %>"),
  *("a%20dog", "%20dog%20", "caf%C3%A9", "a%2Fb%3Fc"),
  *("dog\\nbowl", "a\\r\\nb", "caf\\u00e9", "a\\tb"),
]
ORDINARY = [
  *("AT&T; phone", "a < b > c", "I <3 you", "Q&A", "5 & 6", "tea & cake"),
  *("R&B; soul", "a B&B; an inn", "D&D;", "Barnes&Noble; a shop", "cats&dogs;"),
  *("1 < 2 > 0", "x<3>2", "a <- b", "-> here", "3 > 2", "<>", "a&b"),
  *("[a] left, [b] right", "a dog [VIDEO]", "[1]", "[sic]", "a [red] dog"),
  *("%20 indirim", "20%", "100% cotton", "50%20", "a 5% ABV", "{a dog}"),
  *("www", "the www is old", "a/b", "and/or", "$5", "#1 & #2", "Tom &#1"),
  *("AC\\DC", "http", "a semicolon; here", "e.g. dogs", "C:\\dogs", "100%a"),
  "a dog \u00bd \u2019 \u00a0 \u00e9",
]


@pytest.mark.parametrize("text", REMAINS)
def test_remains_of_a_web_page_are_seen(text):
  assert markup.is_in(text)
  assert markup.is_in(f"A dog. {text} on a beach")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_not_markup(text):
  assert not markup.is_in(text)
  assert not markup.is_in(f"A dog, {text}, on a beach")


def test_every_entity_of_html_is_seen():
  names = [name for name in html.entities.html5 if name.endswith(";")]
  assert len(names) > 2000
  assert all(markup.is_in(f"a &{name} b") for name in names)


def test_a_long_text_is_searched_quickly():
  for text in ("&" * 50_000, "<a " * 20_000, "%20a" * 10 + "[" * 50_000):
    markup.is_in(text)
