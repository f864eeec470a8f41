"""What a config asks of the data: a training loader, and lists of bad rows."""

import os
from collections.abc import Callable

from blip_jax.config import Config
from blip_jax.data import (
  datasets,
  examples,
  loader,
  randaugment,
  rejects,
  transforms,
)


def train_loader(
  config: Config,
  make_example: Callable[[examples.ImageTransform], examples.Example],
  workdir: str,
  process_index: int = 0,
  process_count: int = 1,
) -> loader.TrainLoader:
  """Endless batches of this process's rows, from `config.data`.

  Args:
    make_example: from what is done to images to what is done to records.
    workdir: where rows that cannot be used are listed.
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
  """The list of what this process could not read; each has its own file."""
  suffix = f"_process{process_index}" if process_index else ""
  path = os.path.join(workdir, f"bad_samples{suffix}.jsonl")
  return rejects.BadSamples(path, config.data.max_bad_fraction)
