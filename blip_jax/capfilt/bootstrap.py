"""The paper's Table 1 in miniature: what CapFilt is worth, from one command.

Pre-train on noisy pairs -> fine-tune a captioner and a filter apart from each
other on a few clean ones -> CapFilt -> pre-train anew on what it made of the
noisy pairs, for {nothing, filter only, captioner only, both}. All pre-trainings
have equally many steps, and so see equally many texts (noisy ones more often).
"""

import json
import logging
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping

from blip_jax import defaults as default_keys
from blip_jax import train
from blip_jax.capfilt import job, label, ledger, merge, rows
from blip_jax.config import Config
from blip_jax.runtime import (
  files,
)
from blip_jax.tasks import caption, pretrain, retrieval

log = logging.getLogger(__name__)

# Run -> whether its training set is filtered, and what kinds of texts it has.
RUNS = {
  "none": (False, (label.WEB,)),
  "filter": (True, (label.WEB,)),
  "captioner": (False, (label.WEB, label.SYNTHETIC)),
  "both": (True, (label.WEB, label.SYNTHETIC)),
}
METRICS = ("caption_exact", "txt_r1", "img_r1")

Results = dict[str, float]


def defaults() -> Config:
  """Defaults of pre-training, cleaning and pre-training again."""
  return Config(
    dict(
      job="bootstrap",
      seeds=(0, 1, 2),
      web="",  # noisy pairs; {seed} stands for the seed
      clean="",  # a few that captioner and filter are fine-tuned on
      pretrain=pretrain.defaults(),
      captioner=caption.defaults(),
      filter=retrieval.defaults(),
      capfilt=default_keys.capfilt(),
    )
  )


def bootstrap(config: Config, workdir: str) -> Results:
  """Runs the experiment once for each of `config.seeds`.

  What is finished is not done again. Writes `results.json`: each figure as its
  mean over the seeds, and under `NAME/seed_<seed>`; and `table.md`.

  Args:
    config: see `configs/bootstrap.py`.
    workdir: where every stage of every seed has a folder of its own.

  Returns:
    In percent: `filter/wrong_removed` and `filter/right_kept` of the noisy
    texts, `captioner/right` of the synthetic ones, and `<run>/<metric>` for
    `RUNS` and `METRICS`.
  """
  found = {}
  for seed in config.seeds:
    folder = pathlib.Path(workdir, f"seed_{seed}")
    found[seed] = _once(folder, lambda f, s=seed: _one_seed(config, s, f))
  names = next(iter(found.values()))
  results = {n: statistics.fmean(f[n] for f in found.values()) for n in names}
  results |= {
    f"{name}/seed_{seed}": own[name]
    for seed, own in found.items()
    for name in names
  }
  text = table(found)
  files.write_text(pathlib.Path(workdir, "table.md"), text)
  files.write_json(os.path.join(workdir, "results.json"), results)
  print(text)
  return results


def _one_seed(config: Config, seed: int, folder: pathlib.Path) -> Results:
  """All stages of one seed."""
  web, clean = (spec.format(seed=seed) for spec in (config.web, config.clean))
  run = lambda c, name, source: _once(
    folder / name, lambda path: _train(c, path, seed, source)
  )
  results = {"none": run(config.pretrain, "none", web)}

  for name in ("captioner", "filter"):
    own = config[name].copy_and_resolve_references()
    own.init.weights = str(folder / "none")
    run(own, f"{name}_model", clean)

  own = config.capfilt.copy_and_resolve_references()
  own.update(source=(web,), seed=seed, out=str(folder / "capfilt"))
  own.captioner = str(folder / "captioner_model")
  own.filter = str(folder / "filter_model")
  job.run(own, own.out)
  truth = compare(own.out)

  for name, (is_filtered, sources) in RUNS.items():
    if name == "none":
      continue
    cleaned = folder / "sets" / name
    own.merge.update(sources=sources, out=str(cleaned))
    own.merge.threshold = own.threshold if is_filtered else 0.0
    if not cleaned.exists():
      merge.merge(own, own.out)
    results[name] = run(config.pretrain, name, f"{cleaned}/*.tar")
  return truth | {
    f"{name}/{metric}": found[f"test/{metric}"]
    for name, found in results.items()
    for metric in METRICS
  }


def _once(
  folder: pathlib.Path, do: Callable[[pathlib.Path], Mapping[str, float]]
) -> Results:
  """What a stage found, now or before."""
  path = folder / "results.json"
  if not path.exists():
    log.info("--- %s", folder)
    found = do(folder)
    files.write_json(path, found)
  return json.loads(path.read_text())


def _train(
  config: Config, folder: pathlib.Path, seed: int, source: str
) -> Results:
  config = config.copy_and_resolve_references()
  config.seed = seed
  config.data.train = (source,)
  return train.train(config, str(folder))


def compare(folder: str | os.PathLike) -> Results:
  """What a job said of its texts beside what is true of its pictures.

  For sources that know it: records with `references`, all that may truly be
  said of a picture.
  """
  book = ledger.Ledger(folder)
  right, wrong, written = [], [], []
  for unit in job.units_of(book.settings):
    source, _ = unit.open()
    for row in rows.read(book.rows_path(unit)):
      true = source[row["row"]]["references"]
      if row["source"] == label.WEB:
        (right if row["text"] in true else wrong).append(row["kept"])
      else:
        written.append((row["text"] in true, row["kept"]))
  kept = [is_right for is_right, is_kept in written if is_kept]
  percent = lambda of: 100.0 * statistics.fmean(of) if of else 0.0
  return {
    "filter/wrong_removed": 100.0 - percent(wrong),
    "filter/right_kept": percent(right),
    "captioner/right": percent([is_right for is_right, _ in written]),
    "captioner/right_of_kept": percent(kept),
    "texts/noise": percent([False] * len(right) + [True] * len(wrong)),
    "texts/web_kept": float(sum(right) + sum(wrong)),
    "texts/synthetic_kept": float(len(kept)),
  }


def table(found: Mapping[int, Results]) -> str:
  """Means over seeds, and their range, as Markdown."""

  def cell(name: str) -> str:
    values = [own[name] for own in found.values()]
    return (
      f"{statistics.fmean(values):.1f} ({min(values):.1f}-{max(values):.1f})"
    )

  titles = {
    "none": "nothing",
    "filter": "filter only",
    "captioner": "captioner only",
    "both": "both",
  }
  first = next(iter(found.values()))
  lines = [
    "| bootstrapped by | text R@1 | image R@1 | captions exactly right |",
    "|---|---|---|---|",
    *(
      f"| {titles[run]} | {cell(f'{run}/txt_r1')} | {cell(f'{run}/img_r1')} | "
      f"{cell(f'{run}/caption_exact')} |"
      for run in RUNS
    ),
    "",
    f"Means of {len(found)} seeds, in percent (lowest to highest).",
    "",
    *(f"- {n}: {cell(n)}" for n in first if n.partition("/")[0] not in RUNS),
    *(f"- {n}: {cell(n)}" for n in first if n in _OF_MODELS),
  ]
  return "\n".join(lines) + "\n"


_OF_MODELS = (
  "filter/wrong_removed",
  "filter/right_kept",
  "captioner/right",
  "captioner/right_of_kept",
)
