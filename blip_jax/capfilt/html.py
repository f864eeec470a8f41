"""The page of a report: statistics and images in one self-contained file."""

import base64
import html
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import PIL.Image

from blip_jax.capfilt import findings, text_table
from blip_jax.capfilt.work_units import WorkUnit
from blip_jax.data import thumbnails

TABLE = "report.csv"  # next to the page
THUMBNAIL = 160  # pixels of the longer side
_MAX_TEXT = 300  # characters shown of a text
_MAX_DAMAGE = 20  # lines shown
_IMAGE_OUTCOMES = ("in", "kept", "dropped", "bad")


def card(item: findings.GalleryItem, work_units: Sequence[WorkUnit]) -> str:
  """Returns the HTML of an image and its texts, the one it is shown for bold.

  Args:
    item: an image of a gallery.
    work_units: those that were given to `Findings.add`, by number.
  """
  texts = "".join(
    f'<p class="{"this" if index == item.index else ""}">'
    f'<b class="{row["source"]}">{row["source"]}</b> '
    f"{'-' if row['itm_prob'] is None else format(row['itm_prob'], '.3f')} "
    f"{html.escape(row['text'][:_MAX_TEXT])}</p>"
    for index, row in enumerate(item.rows)
  )
  row = item.rows[item.index]
  return (
    f'<figure><img alt="" src="{_thumbnail(row, work_units[item.work_unit])}">'
    f"<figcaption>{texts}<small>{html.escape(row['key'])}</small></figcaption>"
    "</figure>"
  )


def _thumbnail(row: Mapping[str, Any], work_unit: WorkUnit) -> str:
  """A data URL; empty if the image cannot be read any more."""
  source, _ = work_unit.open()
  pixels = thumbnails.read(
    lambda: source[row["row"]]["image"], THUMBNAIL, row["key"]
  )
  if pixels is None:
    return "data:,"
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, "jpeg", quality=80)
  return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def render(
  content: Mapping[str, Any], galleries: Mapping[str, Sequence[str]]
) -> str:
  """Returns the page.

  Args:
    content: of `report.json`.
    galleries: title -> cards.
  """
  sections = [
    _section("Models and rules", _head(content["job"], content["rules"])),
    *_statistics(content),
    *(
      _section(title, f"<div class=gallery>{''.join(cards)}</div>")
      for title, cards in galleries.items()
    ),
    _section(
      "Throughput",
      _table(
        ["process", "images", "seconds", "images/s"],
        [
          [name, *values.values()]
          for name, values in content["throughput"].items()
        ],
      ),
    ),
    _section("Settings of the job", _json(content["job"])),
  ]
  return _PAGE.replace("BODY", "".join(sections))


def _head(job: Mapping[str, Any], rules: Mapping[str, Any]) -> str:
  """What made the texts, what is kept of them, and where all of them are."""
  model = lambda name: f"weights {job[name]}" if job.get(name) else "none"
  others = {name: rules[name] for name in rules if name != "threshold"}
  lines = [
    ("captioner", model("captioner")),
    ("filter", model("filter")),
    ("seed", str(job.get("seed", "unknown"))),
    ("threshold of itm_prob", str(rules["threshold"])),
    *(
      (f"config.merge.{name}", _limit(name, value))
      for name, value in others.items()
    ),
  ]
  link = f'<a href="{TABLE}" download>{TABLE}</a>'
  return (
    _table(["", ""], lines)
    + f"<p>All texts, with their scores and what is kept, are in {link} (the "
    f"first {text_table.MAX_ROWS:,}) and in the Parquet files next to it.</p>"
  )


def _limit(name: str, value: Any) -> str:
  """The value of a rule; 0 of a `max_` rule sets no limit."""
  if name.startswith("max_") and value == 0:
    return "0 (no limit of its own)"
  return _plain(value)


def _plain(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def _statistics(content: Mapping[str, Any]) -> Iterable[str]:
  before, after = content["words"]["before"], content["words"]["after"]
  texts, image_counts = content["texts"], content["images"]
  num_texts = sum(counts.get("in", 0) for counts in texts.values())
  num_kept = sum(counts.get("kept", 0) for counts in texts.values())
  yield _section(
    f"{num_kept:,} of {num_texts:,} texts are kept, for "
    f"{image_counts['kept']:,} of {image_counts['in']:,} images",
    _text_table(texts)
    + _table(
      ["", "total", "kept", "dropped", "unusable"],
      [["images", *(image_counts[key] for key in _IMAGE_OUTCOMES)]],
    ),
  )
  yield _section(
    "Matching probability (itm_prob) and the threshold",
    "<p>Each bar says on hovering what it counts; bars close to 0 and 1 stand "
    "for smaller steps. Green texts reach the threshold.</p>"
    + "".join(
      _histogram(
        source, bins["edges"], bins["counts"], content["rules"]["threshold"]
      )
      for source, bins in content["histogram"].items()
    ),
  )
  yield _section(
    "Kept texts per image",
    "<p>Left: number of kept texts. Right: how many images have that many.</p>"
    + _bars(content["texts_per_image"].items()),
  )
  lengths = "".join(
    f"<div><h3>{title}</h3>{_bars(words['lengths'].items(), 30)}</div>"
    for title, words in (
      ("Words per web text, before CapFilt", before),
      ("Words per text, new training set", after),
    )
  )
  yield _section(
    "Words",
    _table(
      ["", "texts", "words per text", "different words"],
      [
        ["web texts, before CapFilt", *_word_counts(before)],
        ["new training set", *_word_counts(after)],
      ],
    )
    + "<p>Left: number of words. Right: how many texts have that many.</p>"
    + f"<div class=side>{lengths}</div>",
  )
  yield _section(
    "Most frequent kept texts", _table(["text", "count"], content["frequent"])
  )
  yield _section(
    "Images and texts that cannot be used",
    _bad_samples(content["bad"], content["damage"]),
  )


def _text_table(texts: Mapping[str, Mapping[str, int]]) -> str:
  reasons = sorted(
    {outcome for counts in texts.values() for outcome in counts}
    - {"in", "kept"}
  )
  titles = [reason.replace("_", " ") for reason in reasons]
  return _table(
    ["", "total", "kept", "share kept", *titles],
    [
      [
        f"{source} texts",
        counts.get("in", 0),
        counts.get("kept", 0),
        f"{counts.get('kept', 0) / max(counts.get('in', 0), 1):.1%}",
        *(counts.get(reason, 0) for reason in reasons),
      ]
      for source, counts in texts.items()
    ],
  )


def _bad_samples(
  bad: Mapping[str, Mapping[str, Any]], damage: Sequence[str]
) -> str:
  if not bad and not damage:
    return "<p>None.</p>"
  table = _table(
    ["reason", "count", "examples"],
    [
      [reason, samples["number"], ", ".join(samples["examples"])]
      for reason, samples in bad.items()
    ],
  )
  lines = "".join(
    f"<p>{html.escape(line)}</p>" for line in damage[:_MAX_DAMAGE]
  )
  return table + lines


def _word_counts(words: Mapping[str, Any]) -> tuple[int, float, int]:
  return words["texts"], words["mean_length"], words["vocabulary"]


def _section(title: str, content: str) -> str:
  return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def _json(value: Any) -> str:
  return f"<pre>{html.escape(json.dumps(value, indent=2))}</pre>"


def _table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
  def cell(tag: str, value: Any) -> str:
    if isinstance(value, int | float):
      return f"<{tag} class=n>{value:,}</{tag}>"
    return f"<{tag}>{html.escape(str(value))}</{tag}>"

  row = lambda tag, line: "".join(cell(tag, value) for value in line)
  body = "".join(f"<tr>{row('td', line)}</tr>" for line in lines)
  return f"<table><tr>{row('th', head)}</tr>{body}</table>"


def _bars(items: Iterable[tuple[Any, int]], max_bars: int = 12) -> str:
  items = [*items][:max_bars]
  largest = max((number for _, number in items), default=1) or 1
  return "".join(
    f"<div class=bar><span>{name}</span>"
    f'<i style="width:{60 * number / largest:.2f}%"></i>{number:,}</div>'
    for name, number in items
  )


def _histogram(
  source: str,
  edges: Sequence[float],
  counts: Sequence[int],
  threshold: float,
) -> str:
  """Bars of the same width; each says on hovering what it counts."""
  title = f"<h3>{sum(counts):,} {source} texts</h3>"
  if not counts:
    return title
  largest, bin_width, height = max(counts), 24, 120
  width = bin_width * len(counts)
  is_kept = [low + high >= 2 * threshold for low, high in _pairs(edges)]
  columns = "".join(
    f'<rect x="{n * bin_width + 1}" width="{bin_width - 2}" '
    f'y="{height * (1 - number / largest):.1f}" '
    f'height="{height * number / largest:.1f}" '
    f'class="{"in" if is_kept[n] else "out"}">'
    f"<title>{low:.7g} to {high:.7g}: {number:,}</title></rect>"
    for n, (number, (low, high)) in enumerate(
      zip(counts, _pairs(edges), strict=True)
    )
  )
  # The threshold is between two bars, or before or behind all of them.
  x = bin_width * is_kept.count(False)
  return (
    f'{title}<svg viewBox="0 0 {width} {height + 34}">{columns}'
    f'<line x1="{x}" x2="{x}" y1="0" y2="{height}"/>'
    f'<text x="0" y="{height + 14}">{edges[0]:.7g}</text>'
    f'<text x="{width}" y="{height + 14}" text-anchor="end">{edges[-1]:.7g}'
    f'</text><text x="{x}" y="{height + 30}" text-anchor="'
    f'{"start" if x < width / 2 else "end"}">threshold {threshold}</text></svg>'
  )


def _pairs(edges: Sequence[float]) -> list[tuple[float, float]]:
  return list(itertools.pairwise(edges))


_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>CapFilt report</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #202124; margin: 0 auto;
  max-width: 1180px; padding: 16px; background: #eef0f3 }
section { background: #fff; border-radius: 8px; padding: 12px 20px 18px;
  margin: 0 0 16px }
h1 { font-size: 22px } h2 { font-size: 18px } h3 { font-size: 14px }
table { border-collapse: collapse; margin: 0 0 12px }
td, th { padding: 3px 12px; border-bottom: 1px solid #e3e5e8;
  text-align: left } .n { text-align: right }
svg { width: 100%; max-width: 640px; overflow: visible }
.in { fill: #127a3a } .out { fill: #b9bec5 }
svg line { stroke: #c42626; stroke-width: 1.5 } svg text { font-size: 12px }
.bar { display: flex; align-items: center; gap: 8px; font-size: 13px }
.bar span { width: 3em; text-align: right } .bar i { background: #4472b8;
  height: 12px } .side { display: grid; grid-template-columns: 1fr 1fr }
.gallery { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)) }
figure { margin: 0 } figure img { max-width: 160px; display: block }
figure p { margin: 4px 0; font-size: 13px; color: #6e737a;
  overflow-wrap: anywhere } figure p.this { color: #202124; font-weight: 600 }
b.web { color: #a15c00 } b.synthetic { color: #4472b8 } small { color: #8a8f96;
  overflow-wrap: anywhere } pre { overflow-x: auto; font-size: 12px }
</style><h1>CapFilt report</h1>
<p>The texts that the rules in config.merge keep, of all finished work units.
Under an image, each of its texts has its source and its matching probability;
the text that the image is shown for is in bold.</p>BODY</html>
"""
