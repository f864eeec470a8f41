"""The paper's Table 1 in miniature: what CapFilt gains, from one command.

Pre-train on noisy pairs, fine-tune a captioner and a filter separately on a few
clean pairs, run CapFilt on the noisy pairs, and pre-train from scratch on its
result, once each with the filter only, the captioner only, and both. All
pre-trainings have the same number of steps and so see the same number of texts:
a smaller training set is repeated more often.
"""

import logging
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping

from blip_jax import train
from blip_jax.capfilt import job, label, ledger, merge, rows
from blip_jax.runtime import files
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

# Run -> whether its training set is filtered, and the sources of its texts.
RUNS = {
  "none": (False, (label.WEB,)),
  "filter": (True, (label.WEB,)),
  "captioner": (False, (label.WEB, label.SYNTHETIC)),
  "both": (True, (label.WEB, label.SYNTHETIC)),
}
METRICS = ("caption_exact", "txt_r1", "img_r1")

Results = dict[str, float]


def bootstrap(config: Config, workdir: str) -> Results:
  """Runs the experiment once for each of `config.seeds`.

  Stages that are finished are not repeated. Writes `table.md` and
  `results.json`, which has the mean of each metric over the seeds, and its
  single values as `NAME/seed_<seed>`.

  Args:
    config: see `configs/bootstrap.py`.
    workdir: has a folder for every stage of every seed.

  Returns:
    In percent: `filter/wrong_removed` and `filter/right_kept` of the noisy
    texts, `captioner/right` of the synthetic ones, and `<run>/<metric>` for
    `RUNS` and `METRICS`.
  """
  by_seed = {}
  for seed in config.seeds:
    folder = files.as_path(workdir) / f"seed_{seed}"
    by_seed[seed] = _once(folder, lambda f, s=seed: _run_seed(config, s, f))
  names = next(iter(by_seed.values()))
  results = {
    name: statistics.fmean(values[name] for values in by_seed.values())
    for name in names
  }
  results |= {
    f"{name}/seed_{seed}": values[name]
    for seed, values in by_seed.items()
    for name in names
  }
  text = table(by_seed)
  files.write_text(files.as_path(workdir) / "table.md", text)
  files.write_json(os.path.join(workdir, "results.json"), results)
  print(text)
  return results


def _run_seed(config: Config, seed: int, folder: pathlib.PurePath) -> Results:
  """All stages of one seed."""
  web, clean = (spec.format(seed=seed) for spec in (config.web, config.clean))
  run = lambda stage, name, source: _once(
    folder / name, lambda path: _train(stage, path, seed, source)
  )
  run_results = {"none": run(config.pretrain, "none", web)}

  for name in ("captioner", "filter"):
    stage = config[name].copy_and_resolve_references()
    stage.init.weights = str(folder / "none")
    run(stage, f"{name}_model", clean)

  capfilt = config.capfilt.copy_and_resolve_references()
  capfilt.update(source=(web,), seed=seed, out=str(folder / "capfilt"))
  capfilt.captioner = str(folder / "captioner_model")
  capfilt.filter = str(folder / "filter_model")
  job.run(capfilt, capfilt.out)
  label_results = compare(capfilt.out)

  for name, (is_filtered, sources) in RUNS.items():
    if name == "none":
      continue
    training_set = folder / "sets" / name
    capfilt.merge.update(sources=sources, out=str(training_set))
    capfilt.merge.threshold = capfilt.threshold if is_filtered else 0.0
    if not files.exists(training_set):
      merge.merge(capfilt, capfilt.out)
    run_results[name] = run(config.pretrain, name, f"{training_set}/*.tar")
  return label_results | {
    f"{name}/{metric}": values[f"test/{metric}"]
    for name, values in run_results.items()
    for metric in METRICS
  }


def _once(
  folder: pathlib.PurePath,
  stage: Callable[[pathlib.PurePath], Mapping[str, float]],
) -> Results:
  """The results of a stage, which runs unless it was finished before."""
  path = folder / "results.json"
  if not files.exists(path):
    log.info("--- %s", folder)
    files.write_json(path, stage(folder))
  return files.read_json(path)


def _train(
  config: Config, folder: pathlib.PurePath, seed: int, source: str
) -> Results:
  config = config.copy_and_resolve_references()
  config.seed = seed
  config.data.train = (source,)
  return train.train(config, str(folder))


def compare(folder: str | os.PathLike) -> Results:
  """Compares the labels of a job with the truth.

  Args:
    folder: of a job whose records have `references`, all correct captions of
      the image.

  Returns:
    In percent of the texts: `filter/wrong_removed`, `filter/right_kept`,
    `captioner/right`, `captioner/right_of_kept` and `texts/noise`; and the
    numbers `texts/web_kept` and `texts/synthetic_kept`.

  Raises:
    ValueError: the labels of a work unit are missing or damaged.
  """
  capfilt = ledger.Ledger(folder)
  # Whether each text is kept, by its source and whether it is correct.
  kept: dict[tuple[str, bool], list[bool]] = {
    (source, is_right): []
    for source in (label.WEB, label.SYNTHETIC)
    for is_right in (False, True)
  }
  for work_unit in job.find_work_units(capfilt.settings):
    source, _ = work_unit.open()
    (done,) = merge.check_done(capfilt, [work_unit])
    path, sha256 = capfilt.rows_path(work_unit), done["output"]["sha256"]
    for row in rows.read(path, sha256):
      is_right = row["text"] in source[row["row"]]["references"]
      kept[row["source"], is_right].append(row["kept"])
  wrong, right = kept[label.WEB, False], kept[label.WEB, True]
  misses, hits = kept[label.SYNTHETIC, False], kept[label.SYNTHETIC, True]
  return {
    "filter/wrong_removed": 100.0 - _percent(sum(wrong), len(wrong)),
    "filter/right_kept": _percent(sum(right), len(right)),
    "captioner/right": _percent(len(hits), len(hits) + len(misses)),
    "captioner/right_of_kept": _percent(sum(hits), sum(hits) + sum(misses)),
    "texts/noise": _percent(len(wrong), len(wrong) + len(right)),
    "texts/web_kept": float(sum(right) + sum(wrong)),
    "texts/synthetic_kept": float(sum(hits) + sum(misses)),
  }


def _percent(part: int, total: int) -> float:
  return 100.0 * (part / total) if total else 0.0


def table(by_seed: Mapping[int, Results]) -> str:
  """Means over the seeds with their ranges, as Markdown."""

  def cell(name: str) -> str:
    values = [results[name] for results in by_seed.values()]
    return (
      f"{statistics.fmean(values):.1f} ({min(values):.1f}-{max(values):.1f})"
    )

  titles = {
    "none": "nothing",
    "filter": "filter only",
    "captioner": "captioner only",
    "both": "both",
  }
  run_metrics = {f"{run}/{metric}" for run in RUNS for metric in METRICS}
  names = next(iter(by_seed.values()))
  lines = [
    "| bootstrapped by | text R@1 | image R@1 | captions exactly right |",
    "|---|---|---|---|",
    *(
      f"| {titles[run]} | {cell(f'{run}/txt_r1')} | {cell(f'{run}/img_r1')} | "
      f"{cell(f'{run}/caption_exact')} |"
      for run in RUNS
    ),
    "",
    f"Means of {len(by_seed)} seeds, in percent (lowest to highest).",
    "",
    *(f"- {name}: {cell(name)}" for name in names if name not in run_metrics),
  ]
  return "\n".join(lines) + "\n"
