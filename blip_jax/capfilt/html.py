"""The page of a report: figures and pictures in one file that loads nothing."""

import base64
import html
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from blip_jax.capfilt import findings
from blip_jax.data import sources, transforms
from blip_jax.inference import images

log = logging.getLogger(__name__)

THUMBNAIL = 160


def card(shown: findings.Shown, todo: Sequence[Any]) -> str:
  """HTML of a picture and its texts; the one that it is shown for is bold."""
  texts = "".join(
    f'<p class="{"this" if place == shown.text else ""}">'
    f'<b class="{row["source"]}">{row["source"]}</b> '
    f"{'-' if row['itm_prob'] is None else format(row['itm_prob'], '.3f')} "
    f"{html.escape(row['text'][:300])}</p>"
    for place, row in enumerate(shown.rows)
  )
  row = shown.rows[shown.text]
  return (
    f'<figure><img alt="" src="{_thumbnail(row, todo[shown.unit])}">'
    f"<figcaption>{texts}<small>{html.escape(row['key'])}</small></figcaption>"
    "</figure>"
  )


def _thumbnail(row: Mapping[str, Any], unit: Any) -> str:
  """A data URL; empty if the picture has gone since."""
  source, _ = unit.open()
  try:
    picture = images.open_image(source[row["row"]]["image"])
  except (sources.BadRow, transforms.BadSample, IndexError) as error:
    log.warning("%s: cannot be shown: %s", row["key"], error)
    return "data:,"
  picture = PIL.Image.fromarray(np.asarray(picture))
  side = max(picture.size)
  if side < THUMBNAIL:  # as the model sees it
    grow = THUMBNAIL // side
    picture = picture.resize(
      (picture.width * grow, picture.height * grow),
      PIL.Image.Resampling.NEAREST,
    )
  picture.thumbnail((THUMBNAIL, THUMBNAIL))
  file = io.BytesIO()
  picture.save(file, "jpeg", quality=80)
  return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def render(
  told: Mapping[str, Any], galleries: Mapping[str, Sequence[str]]
) -> str:
  """The page: figures from `report.json`, and cards of pictures."""
  before, after = told["words"]["before"], told["words"]["after"]
  texts = told["texts"]
  fates = sorted(
    {fate for of in texts.values() for fate in of} - {"in", "kept"}
  )
  kept = sum(of.get("kept", 0) for of in texts.values())
  sections = [
    _section(
      f"{kept:,} of {sum(of.get('in', 0) for of in texts.values()):,} texts "
      f"are kept, on {told['pictures']['kept']:,} of "
      f"{told['pictures']['in']:,} pictures",
      _table(
        ["texts", "in", "kept", "share", *(f.replace("_", " ") for f in fates)],
        [
          [
            source,
            of.get("in", 0),
            of.get("kept", 0),
            f"{of.get('kept', 0) / max(of.get('in', 0), 1):.1%}",
            *(of.get(fate, 0) for fate in fates),
          ]
          for source, of in texts.items()
        ],
      )
      + _table(
        ["pictures", *told["pictures"]], [["", *told["pictures"].values()]]
      ),
    ),
    _section(
      "Probability of a match (itm_prob), and the threshold",
      "".join(
        _histogram(source, bins, told["rules"]["threshold"])
        for source, bins in told["histogram"].items()
      ),
    ),
    _section(
      "Kept texts of a picture",
      _bars(told["texts_per_picture"].items()),
    ),
    _section(
      "Words",
      _table(
        ["", "texts", "words a text", "different words"],
        [
          ["web, as it was", *_words(before)],
          ["new training set", *_words(after)],
        ],
      )
      + "<div class=side>"
      + "".join(
        f"<div><h3>{title}</h3>{_bars(of['lengths'].items(), 30)}</div>"
        for title, of in (
          ("words a text, before", before),
          ("words a text, after", after),
        )
      )
      + "</div>",
    ),
    _section(
      "Most frequent kept texts", _table(["text", "times"], told["frequent"])
    ),
    _section(
      "Bad samples",
      _table(
        ["why", "number", "examples"],
        [
          [why, of["number"], ", ".join(of["examples"])]
          for why, of in told["bad"].items()
        ],
      )
      + "".join(f"<p>{html.escape(line)}</p>" for line in told["damage"][:20])
      if told["bad"] or told["damage"]
      else "<p>There are none.</p>",
    ),
    *(
      _section(title, f"<div class=gallery>{''.join(cards)}</div>")
      for title, cards in galleries.items()
    ),
    _section(
      "Throughput",
      _table(
        ["process", "pictures", "seconds", "pictures/s"],
        [[name, *of.values()] for name, of in told["throughput"].items()],
      ),
    ),
    _section(
      "Settings",
      f"<pre>{html.escape(json.dumps(told['job'], indent=2))}</pre>",
    ),
  ]
  return _PAGE.replace("BODY", "".join(sections))


def _words(of: Mapping[str, Any]) -> tuple[int, float, int]:
  return of["texts"], of["mean_length"], of["vocabulary"]


def _section(title: str, content: str) -> str:
  return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def _table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
  def cell(tag, x):
    if isinstance(x, int | float):
      return f"<{tag} class=n>{x:,}</{tag}>"
    return f"<{tag}>{html.escape(str(x))}</{tag}>"

  row = lambda tag, line: "".join(cell(tag, x) for x in line)
  body = "".join(f"<tr>{row('td', line)}</tr>" for line in lines)
  return f"<table><tr>{row('th', head)}</tr>{body}</table>"


def _bars(items: Iterable[tuple[Any, int]], most: int = 12) -> str:
  items = [*items][:most]
  top = max((number for _, number in items), default=1) or 1
  return "".join(
    f"<div class=bar><span>{name}</span>"
    f'<i style="width:{60 * number / top:.2f}%"></i>{number:,}</div>'
    for name, number in items
  )


def _histogram(title: str, bins: Sequence[int], threshold: float) -> str:
  top, width, height = max(*bins, 1), 24, 120
  columns = "".join(
    f'<rect x="{n * width + 1}" width="{width - 2}" '
    f'y="{height * (1 - number / top):.1f}" '
    f'height="{height * number / top:.1f}" '
    f'class="{"in" if (n + 0.5) / len(bins) >= threshold else "out"}">'
    f"<title>{n / len(bins):.2f}: {number:,}</title></rect>"
    for n, number in enumerate(bins)
  )
  x = threshold * width * len(bins)
  return (
    f"<h3>{title}: {sum(bins):,} texts</h3>"
    f'<svg viewBox="0 0 {width * len(bins)} {height + 18}">{columns}'
    f'<line x1="{x}" x2="{x}" y1="0" y2="{height}"/>'
    f'<text x="0" y="{height + 14}">0</text>'
    f'<text x="{min(x + 4, width * len(bins) - 90)}" y="{height + 14}">'
    f"threshold {threshold}</text>"
    f'<text x="{width * len(bins) - 8}" y="{height + 14}">1</text></svg>'
  )


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
svg { width: 100%; max-width: 640px }
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
</style><h1>CapFilt report</h1>BODY</html>
"""
