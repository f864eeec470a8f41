"""What a config asks of the data: a tokenizer, and loaders."""

import os

from ml_collections import ConfigDict

from blip_jax.data import (
  datasets,
  loader,
  randaugment,
  rejects,
  scenes,
  transforms,
)
from blip_jax.data import tokenizer as tokenizer_lib


def load_tokenizer(name: str) -> tokenizer_lib.Tokenizer:
  """From `config.tokenizer`: a directory, a hub id, or "scenes"."""
  path = scenes.vocab_dir() if name == "scenes" else name
  return tokenizer_lib.Tokenizer.load(path)


def prompt(config: ConfigDict) -> str:
  """What every text of a task starts with; "" where there is no such thing."""
  return config[config.task].get("prompt", "")


def train_loader(
  config: ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  workdir: str,
  process_index: int = 0,
  process_count: int = 1,
) -> loader.TrainLoader:
  """Endless batches of this process's rows, from `config.data`."""
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
    pair_example(config, tokenizer, image),
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


def pair_example(
  config: ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  image: transforms.TrainImage | transforms.EvalImage,
) -> datasets.PairExample:
  return datasets.PairExample(
    tokenizer,
    image,
    config.data.max_words,
    config.data.max_length,
    prompt=prompt(config),
    with_image_id=config.task == "retrieval",
  )


def bad_samples(
  config: ConfigDict, workdir: str, process_index: int = 0
) -> rejects.BadSamples:
  """The list of what this process could not read; each has its own file."""
  suffix = f"_process{process_index}" if process_index else ""
  path = os.path.join(workdir, f"bad_samples{suffix}.jsonl")
  return rejects.BadSamples(path, config.data.max_bad_fraction)
