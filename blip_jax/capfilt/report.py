"""What a job found, as one page to look at (`report.html`) and as JSON."""

import base64
import collections
import heapq
import html
import io
import json
import logging
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import tqdm
from ml_collections import ConfigDict

from blip_jax import pictures
from blip_jax.capfilt import job, label, ledger, merge, rows, rules
from blip_jax.data import sources, transforms
from blip_jax.runtime import writers

log = logging.getLogger(__name__)

BINS = 20
# Of a gallery; of what is frequent; of what is bad.
PICTURES, FREQUENT, EXAMPLES = 12, 20, 5
THUMBNAIL = 160
# Different texts that are counted before the rare ones are forgotten.
_MANY_TEXTS = 2_000_000
_SOURCES = (label.WEB, label.SYNTHETIC)
_WHEN = ("before", "after")


class _Shown(NamedTuple):
  """A picture of a gallery: in which unit, and all rows of it."""

  unit: int
  rows: list[dict[str, Any]]
  text: int  # the row that it is shown for


def report(config: ConfigDict, workdir: str) -> dict[str, int]:
  """Writes `report.html` and `report.json` into the job's folder.

  The page has everything in it, thumbnails too, and loads nothing. What is kept
  is what `config.merge` would keep of the units that are done.

  Raises:
    ValueError: no unit is done.
  """
  book = ledger.Ledger(config.out or workdir)
  todo = [u for u in job.units_of(book.settings) if book.done(u) is not None]
  if not todo:
    raise ValueError(
      f"{book.folder}: no unit is done, so there is nothing to "
      "show; start the job with config.job=capfilt"
    )
  selection = rules.Selection(rule := merge.rules_of(config))
  found = Findings(rule.threshold)
  for number, unit in enumerate(tqdm.tqdm(todo, unit="unit")):
    own = rows.read(book.rows_path(unit))
    found.add(number, own, selection.reasons(own), book.done(unit))
  told = found.as_json() | {
    "job": book.settings,
    "rules": vars(rule),
    "throughput": _throughput(book.folder),
  }
  galleries = {
    title: [_card(shown, todo) for shown in gallery]
    for title, gallery in found.galleries().items()
  }
  writers.write_json(book.folder / "report.json", told)
  page = book.folder / "report.html"
  writers.write_text(page, render(told, galleries))
  log.info("%s shows what was kept and why", page)
  return {
    f"{source}/{fate}": number
    for source, fates in told["texts"].items()
    for fate, number in fates.items()
  }


class Findings:
  """Counts over the rows of units, and pictures that are worth a look."""

  def __init__(self, threshold: float):
    self._threshold = threshold
    self._texts = {source: collections.Counter() for source in _SOURCES}
    self._pictures = collections.Counter()
    self._histogram = {source: np.zeros(BINS, int) for source in _SOURCES}
    self._per_picture = collections.Counter()
    self._lengths = {when: collections.Counter() for when in _WHEN}
    self._words = {when: collections.Counter() for when in ("before", "after")}
    self._frequent = collections.Counter()
    self._bad: dict[str, list[str]] = collections.defaultdict(list)
    self._num_bad = collections.Counter()
    self._damage: list[str] = []
    self._best: dict[str, list] = collections.defaultdict(list)
    self._ties = 0

  def add(
    self,
    unit: int,
    found: list[dict[str, Any]],
    reasons: list[str],
    told: dict[str, Any],
  ) -> None:
    """Takes note of a unit.

    Args:
      unit: its number.
      found: its rows.
      reasons: why each is left out; "" if it is not.
      told: what its done-file says.
    """
    self._damage += told["damage"]
    self._pictures.update({k: told["pictures"][k] for k in ("in", "bad")})
    for key, why in told["bad"].items():
      self._note_bad(why.partition(":")[0], key)
    places = collections.defaultdict(list)
    for place, row in enumerate(found):
      places[row["key"]].append(place)
    for own in places.values():
      self._add_picture(unit, [(found[p], reasons[p]) for p in own])
    without_texts = (
      told["pictures"]["in"] - told["pictures"]["bad"] - len(places)
    )
    self._per_picture[0] += without_texts

  def _add_picture(
    self, unit: int, own: list[tuple[dict[str, Any], str]]
  ) -> None:
    for place, (row, reason) in enumerate(own):
      source, prob = row["source"], row["itm_prob"]
      self._texts[source].update(["in", reason or "kept"])
      if prob is None:
        self._note_bad(row["reason"], row["key"])
        continue
      self._histogram[source][min(int(prob * BINS), BINS - 1)] += 1
      words = rules.words_of(row["text"])
      if source == label.WEB:
        self._count("before", words)
      if not reason:
        self._count("after", words)
        self._frequent[" ".join(words)] += 1
      self._consider(unit, [r for r, _ in own], place, not reason)
    if len(self._frequent) > _MANY_TEXTS:
      often = self._frequent.most_common(_MANY_TEXTS // 2)
      self._frequent = collections.Counter(dict(often))
    self._per_picture[sum(not reason for _, reason in own)] += 1

  def _count(self, when: str, words: Sequence[str]) -> None:
    self._lengths[when][len(words)] += 1
    self._words[when].update(words)

  def _note_bad(self, why: str, key: str) -> None:
    self._num_bad[why] += 1
    if len(self._bad[why]) < EXAMPLES:
      self._bad[why].append(key)

  def _consider(
    self, unit: int, own: list[dict[str, Any]], place: int, kept: bool
  ) -> None:
    """Keeps a text for the galleries, if it is among the nearest to the
    threshold, or among the farthest from it, of its kind."""
    row = own[place]
    distance = abs(row["itm_prob"] - self._threshold)
    # In steps, so that chance and not the order decides between equals.
    chance = zlib.crc32(f"{row['key']} {place}".encode()) / 2**32
    for name, score in (("near", -distance), ("far", round(distance, 2))):
      kind = row["source"], kept, name
      self._ties += 1
      entry = (score, chance, self._ties, _Shown(unit, own, place))
      if len(self._best[kind]) < PICTURES:
        heapq.heappush(self._best[kind], entry)
      else:
        heapq.heappushpop(self._best[kind], entry)

  def galleries(self) -> dict[str, list[_Shown]]:
    """Title -> pictures, the best examples first."""
    titles = {
      (True, "far"): "kept, far above the threshold",
      (True, "near"): "kept, near the threshold",
      (False, "near"): "left out, near the threshold",
      (False, "far"): "left out, far from the threshold",
    }
    return {
      f"{source} texts {title}": [
        entry[-1] for entry in sorted(self._best[source, *kind], reverse=True)
      ]
      for source in _SOURCES
      for kind, title in titles.items()
      if self._best[source, *kind]
    }

  def as_json(self) -> dict[str, Any]:
    mean = lambda of: sum(n * k for n, k in of.items()) / max(of.total(), 1)
    usable = self._pictures["in"] - self._pictures["bad"]
    return {
      "pictures": {
        "in": self._pictures["in"],
        "kept": usable - self._per_picture[0],
        "dropped": self._per_picture[0],
        "bad": self._pictures["bad"],
      },
      "texts": {source: dict(of) for source, of in self._texts.items()},
      "histogram": {s: of.tolist() for s, of in self._histogram.items()},
      "texts_per_picture": _sorted(self._per_picture),
      "words": {
        when: {
          "texts": self._lengths[when].total(),
          "mean_length": round(mean(self._lengths[when]), 2),
          "vocabulary": len(self._words[when]),
          "lengths": _sorted(self._lengths[when]),
        }
        for when in _WHEN
      },
      "frequent": self._frequent.most_common(FREQUENT),
      "bad": {
        why: {"number": number, "examples": self._bad[why]}
        for why, number in self._num_bad.most_common()
      },
      "damage": self._damage,
    }


def _sorted(counter: Mapping[int, int]) -> dict[int, int]:
  return dict(sorted(counter.items()))


def _throughput(folder: pathlib.Path) -> dict[str, dict[str, float | int]]:
  """Of each process that took part: pictures, seconds, and their ratio."""
  found = {}
  for path in sorted((folder / "log").glob("*.jsonl")):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    number = sum(line["pictures"] for line in lines)
    seconds = sum(line["seconds"] for line in lines)
    found[path.stem] = {
      "pictures": number,
      "seconds": round(seconds, 1),
      "pictures_per_second": round(number / max(seconds, 1e-3), 2),
    }
  return found


def _card(shown: _Shown, todo: Sequence[Any]) -> str:
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
  first = unit.rows[0] if unit.rows else 0
  try:
    picture = pictures.open_picture(source[row["row"] - first]["image"])
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
