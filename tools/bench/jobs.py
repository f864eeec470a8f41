"""Rows that read files: the loader alone, and CapFilt as a user runs it.

They need grain and all that jobs need. The images are noise, smooth enough for
the JPEG size of a photograph.
"""

import concurrent.futures
import contextlib
import io
import itertools
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import jax
import numpy as np
from PIL import Image

from blip_jax.capfilt import label, ledger, loop, progress, work_units
from blip_jax.capfilt.engines import handout
from blip_jax.data import examples, scenes, transforms
from blip_jax.data import loader as loader_lib
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.inference import model as model_lib
from blip_jax.models import card, families, flops
from blip_jax.models import config as model_config
from blip_jax.runtime import files, host, sharding

from . import contest, measure, programs
from .programs import Setup

# With random weights every caption gets to the maximal length.
GENERATION = {"sample": True, "top_p": 0.9, "max_length": 20, "min_length": 5}
# Of an image in pixels, as in COCO.
HEIGHT, WIDTH = 480, 640
NUM_SHARDS = 3
# Device batches of a shard.
BATCHES = 4
# Relative to the norm: the pixels of a decoder that scales while it decodes.
MAX_DIFFERENCE = 0.05


def cores() -> int:
  return len(os.sched_getaffinity(0))


def jpegs(number: int) -> Iterator[bytes]:
  rng = np.random.default_rng(0)
  for _ in range(number):
    coarse = rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), np.uint8)
    _, encoded = cv2.imencode(".jpg", cv2.resize(coarse, (WIDTH, HEIGHT)))
    yield encoded.tobytes()


def loader(
  setup: Setup, batch_sizes: list[int], options: Any
) -> dict[str, Any]:
  """Our loader, in turns with bare decoding by PIL in as many threads."""
  host.keep_freed_memory()
  batch_size, number = batch_sizes[-1], 64 * cores()
  records = [
    {"image": image, "id": str(i)} for i, image in enumerate(jpegs(number))
  ]
  batches = loader_lib.eval_loader(
    records,
    examples.ImageExample(transforms.EvalImage(setup.image_size)),
    batch_size,
    num_threads=cores(),
  )
  pool = concurrent.futures.ThreadPoolExecutor(cores())
  native = measure.Program(number, lambda: [len(ids) for _, ids in batches])
  bare = measure.Program(number, lambda: sum(pool.map(_decode, records)))
  side = setup.image_size
  resized = Image.open(io.BytesIO(records[0]["image"])).resize(
    (side, side), Image.Resampling.BICUBIC
  )
  first, _ = next(iter(batches))
  difference = contest.difference(first["image"][:1], np.asarray(resized)[None])
  for program in (native, bare):
    program.run()
  seconds = measure.in_turns({"native": native, "bare": bare}, options.repeats)
  numbers = _per_core(native, seconds["native"])
  peer = _per_core(bare, seconds["bare"]) | {"difference": difference}
  if difference > MAX_DIFFERENCE:
    peer["note"] = f"outputs differ ({difference:.1e})"
  else:
    peer["ratio"] = numbers["per_second"] / peer["per_second"]
  numbers["batch_size"] = batch_size
  return {
    "unit": "images",
    "native": numbers,
    "peers": {"bare decoding by PIL": peer},
  }


def _decode(record: dict[str, Any]) -> bool:
  image = Image.open(io.BytesIO(record["image"]))
  return image.convert("RGB").size == (WIDTH, HEIGHT)


def _per_core(program: measure.Program, seconds: list[float]) -> dict[str, Any]:
  numbers = measure.summary(program, seconds)
  per_core = numbers["per_second"] / cores()
  return numbers | {"cores": cores(), "per_second_and_core": per_core}


def capfilt(
  setup: Setup, batch_sizes: list[int], options: Any
) -> dict[str, Any]:
  """The whole job, in turns with its models alone, on images in memory, and
  with reading alone."""
  host.keep_freed_memory()
  batch_size, mesh = batch_sizes[-1], sharding.one_device()
  number = BATCHES * batch_size
  labeller = label.Labeller(
    _model("caption", setup, mesh),
    _model("itm", setup, mesh),
    seed=0,
    per_device_batch_size=batch_size,
    generation=GENERATION,
    num_threads=cores(),
    num_workers=0 if jax.default_backend() == "cpu" else cores(),
  )
  with (
    measure.compiling() as stages,
    files.temporary_folder() as folder,
    contextlib.closing(labeller),
  ):
    for shard in range(NUM_SHARDS):
      _write_shard(folder / f"{shard:05d}.tar", number, shard * number)
    shards = work_units.find([str(folder / "*.tar")], "", True, 1)
    read = lambda: [
      *labeller.read((shard, shard.open()[0]) for shard in shards)
    ]
    batches = read()
    label_some = lambda some: sum(
      len(batch.labelled) for batch in labeller.label(some)
    )
    label_some(batches[:1])
    make = lambda run: measure.Program(NUM_SHARDS * number, run)
    parts = {
      "job": make(_job(labeller, shards, folder)),
      "models": make(lambda: label_some(batches)),
      "reading": make(read),
    }
    seconds = measure.in_turns(parts, options.repeats)
  rates = {name: measure.summary(parts[name], seconds[name]) for name in parts}
  slower = min(rates["models"]["per_second"], rates["reading"]["per_second"])
  numbers = rates["job"] | {"batch_size": batch_size}
  gflop = flops.captioning(setup.config, programs.LENGTH, 1)
  gflop += flops.filtering(
    setup.config, programs.TEXT_LENGTH, programs.TEXTS_PER_IMAGE
  )
  return {
    "unit": "images",
    "gflop": gflop / 1e9,
    "native": numbers
    | {f"{name}_seconds": each for name, each in stages.items()}
    | {"share": numbers["per_second"] / slower, "cores": cores()},
    "peers": {name: rates[name] for name in ("models", "reading")},
  }


def _job(
  labeller: label.Labeller, shards: Any, folder: pathlib.Path
) -> Callable[[], None]:
  """The job up to the files of its last shard, anew in every call."""
  count = itertools.count()

  def run() -> None:
    own = ledger.Ledger(folder / f"out{next(count)}")
    files.make_folder(own.folder)
    own.begin({}, force=False)
    constants = {"captioner": "random", "filter": "random", "seed": 0}
    share = handout.Share(shards, own)
    with progress.Progress(len(shards), own.folder) as shown:
      loop.label_all(share, labeller, own, 0.5, constants, shown)

  return run


def _write_shard(path: pathlib.Path, number: int, first: int) -> None:
  captions = scenes.Scenes("train")
  with (
    files.open_atomic(path) as file,
    tarfile.open(fileobj=file, mode="w") as tar,
  ):
    for i, image in enumerate(jpegs(number)):
      caption = captions[first + i]["caption"]
      for suffix, content in (("jpg", image), ("txt", caption.encode())):
        member = tarfile.TarInfo(f"{i:06d}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def _model(
  family: str, setup: Setup, mesh: jax.sharding.Mesh
) -> model_lib.Model:
  """Random weights of a size, with the vocabulary of Scenes."""
  words = tokenizer_lib.Tokenizer.load(scenes.vocab_dir())
  sizes = model_config.variant(
    setup.size,
    image_size=setup.image_size,
    vocab_size=words.vocab_size,
    tokens=model_config.SpecialTokens(**words.special_ids),
    dtype=setup.dtype,
    vit={"attention": setup.config.vit.attention},
  )
  params = jax.jit(lambda key: families.init(family, sizes, key))(
    jax.random.key(0)
  )
  params = jax.device_put(params, sharding.replicated(mesh))
  module = families.build(family, sizes)
  description = card.Card(family, sizes, "a picture of ", {})
  return model_lib.Model(description, module, params, words, mesh)
