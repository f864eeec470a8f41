"""From a config to the training loader and the list of bad samples."""

import logging
import os
from collections.abc import Callable, Sequence

from blip_jax.data import (
  datasets,
  examples,
  loader,
  order,
  randaugment,
  rejects,
  transforms,
)
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)


def train_loader(
  config: Config,
  make_example: Callable[[examples.ImageTransform], examples.Example],
  workdir: str,
  process_index: int = 0,
  process_count: int = 1,
) -> loader.TrainLoader:
  """Returns endless batches of this process's rows, from `config.data`.

  Args:
    config: of the run.
    make_example: returns the examples of a task for an image transform.
    workdir: folder for the list of unusable rows.
    process_index: of this process in a distributed run.
    process_count: of the distributed run.

  Raises:
    ValueError: a source cannot be opened, or there are no rows.
  """
  c = config.data
  size = config.model.image_size
  image = transforms.EvalImage(size)
  if c.augment:
    image = transforms.TrainImage(size, c.min_scale, randaugment.RandAugment())
  example = make_example(image)
  specs = [spec for spec in c.train if spec]
  # A source that is listed twice is one: ids of images are those of a source.
  opened = {spec: example.open_source(spec, c.image_root) for spec in specs}
  sources = [opened[spec] for spec in specs]
  for spec, source in zip(specs, sources, strict=True):
    log.info("Training data: %s rows of %s", f"{len(source):,}", spec)
  rotate = []
  if c.rotate:
    rotate = datasets.open_rotation(c.rotate, c.image_root)
    rows = " | ".join(f"{len(split):,}" for split in rotate)
    log.info("Training data, in turn: %s rows of %s", rows, c.rotate)
  _warn_of_repeats(config, order.epoch_lengths(sources, rotate))
  return loader.train_loader(
    sources,
    example,
    batch_size=config.batch_size // process_count,
    seed=config.seed,
    weights=tuple(c.weights),
    rotate=rotate,
    num_workers=c.num_workers,
    num_threads=c.num_threads,
    process_index=process_index,
    process_count=process_count,
    bad_samples=bad_samples(config, workdir, process_index),
  )


def _warn_of_repeats(config: Config, epoch_lengths: Sequence[int]) -> None:
  rows = min(epoch_lengths)
  if 0 < rows < config.batch_size:
    log.warning(
      "config.batch_size: there are only %d rows to train on, fewer than the "
      "%d examples of a batch. So every batch repeats rows, a contrastive loss "
      "sees copies of a pair as its negatives, and one batch counts as an "
      "epoch. Set --config.batch_size=%d or less, or add data",
      rows,
      config.batch_size,
      rows,
    )


def bad_samples(
  config: Config, workdir: str, process_index: int = 0
) -> rejects.BadSamples:
  """Returns the list of unusable rows; each process has a file of its own."""
  suffix = f"_process{process_index}" if process_index else ""
  path = os.path.join(workdir, f"bad_samples{suffix}.jsonl")
  return rejects.BadSamples(path, config.data.max_bad_fraction)
