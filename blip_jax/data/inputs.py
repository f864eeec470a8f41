"""From a config to the training loader and the list of bad samples."""

import os
from collections.abc import Callable

from blip_jax.data import (
  datasets,
  examples,
  loader,
  randaugment,
  rejects,
  transforms,
)
from blip_jax.runtime.config import Config


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
  sources = [datasets.open_source(s, c.image_root) for s in c.train if s]
  rotate = []
  if c.rotate:
    rotate = datasets.open_rotation(c.rotate, c.image_root)
  return loader.train_loader(
    sources,
    make_example(image),
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


def bad_samples(
  config: Config, workdir: str, process_index: int = 0
) -> rejects.BadSamples:
  """Returns the list of unusable rows; each process has a file of its own."""
  suffix = f"_process{process_index}" if process_index else ""
  path = os.path.join(workdir, f"bad_samples{suffix}.jsonl")
  return rejects.BadSamples(path, config.data.max_bad_fraction)
