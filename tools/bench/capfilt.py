"""Measures what CapFilt costs beside its models and its decoding.

  python tools/bench/capfilt.py --variant base --image-size 384 --shards 3 \
    --pictures 16 --out bench.json

Writes tar shards of pictures as cameras make them, and a captioner and a filter
of random weights.  Then, with all programs compiled, pictures per second of
(1) the models alone, on pictures that are in memory; (2) reading alone: the
shards, decoding, resizing; (3) the whole job, to the files of its last shard.
The job should reach 90 % of the lesser of the first two.
"""

import argparse
import io
import os
import pathlib
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence

import cv2
import jax
import numpy as np

from blip_jax.capfilt import (
  job,
  label,
  ledger,
  work_units,
)
from blip_jax.data import scenes
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.inference import model as model_lib
from blip_jax.models import card, families
from blip_jax.models import config as model_config
from blip_jax.runtime import (
  files,
  host,
  sharding,
)

# Of the generator; captions of random weights never end by themselves.
WRITES = {"sample": True, "top_p": 0.9, "max_length": 20, "min_length": 5}


def write_shards(
  folder: pathlib.Path, shards: int, pictures: int, side: int
) -> None:
  """Noise smooth enough to be as large a JPEG as a photograph is."""
  rng, captions = np.random.default_rng(0), scenes.Scenes("train")
  for shard in range(shards):
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
      for number in range(pictures):
        coarse = rng.integers(0, 256, (side // 4, side // 3, 3), np.uint8)
        pixels = cv2.resize(coarse, (side * 4 // 3, side))
        _, encoded = cv2.imencode(".jpg", pixels)
        caption = captions[shard * pictures + number]["caption"]
        for suffix, content in (
          ("jpg", encoded.tobytes()),
          ("txt", caption.encode()),
        ):
          member = tarfile.TarInfo(f"{number:06d}.{suffix}")
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))


def make_model(
  family: str, variant: str, image_size: int, mesh: jax.sharding.Mesh
) -> model_lib.Model:
  """Random weights of a size, with the vocabulary of Scenes."""
  words = tokenizer_lib.Tokenizer.load(scenes.vocab_dir())
  sizes = model_config.variant(
    variant,
    image_size=image_size,
    vocab_size=words.vocab_size,
    tokens=model_config.SpecialTokens(**words.special_ids),
    dtype=model_lib.quick_dtype(),
  )
  # On the host: a GPU's compiler takes a minute for draws that are made once.
  with jax.default_device(jax.devices("cpu")[0]):
    params = jax.jit(lambda key: families.init(family, sizes, key))(
      jax.random.key(0)
    )
  params = jax.device_put(params, sharding.replicated(mesh))
  module = families.build(family, sizes)
  described = card.Card(family, sizes, "a picture of ", {})
  return model_lib.Model(described, module, params, words, mesh)


def rate(do: Callable[[], int]) -> float:
  """Pictures per second of what returns their number."""
  begin = time.monotonic()
  number = do()
  return number / (time.monotonic() - begin)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--variant", default="base")
  parser.add_argument("--image-size", type=int, default=384)
  parser.add_argument("--shards", type=int, default=3)
  parser.add_argument("--pictures", type=int, default=16, help="of a shard")
  parser.add_argument("--side", type=int, default=480, help="of a picture")
  parser.add_argument(
    "--per-device-batch-size", type=int, default=8, help="of a device"
  )
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--out", type=pathlib.Path)
  args = parser.parse_args(argv)
  host.keep_freed_memory()

  mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
  make = lambda family: make_model(family, args.variant, args.image_size, mesh)
  labeller = label.Labeller(
    make("caption"),
    make("itm"),
    seed=0,
    per_device_batch_size=args.per_device_batch_size,
    generation=WRITES,
    num_threads=args.threads,
  )
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    write_shards(folder, args.shards, args.pictures, args.side)
    todo = work_units.find([str(folder / "*.tar")], "", True, 1)
    read = lambda: [b for unit in todo for b in labeller.read(unit.open()[0])]
    batches = read()
    models = lambda: sum(len(found) for found in labeller.label(batches))
    models()  # compiles

    def everything() -> int:
      book = ledger.Ledger(folder / f"out{time.monotonic_ns()}")
      book.folder.mkdir()
      book.begin({}, force=False)
      constant = {"captioner": "random", "filter": "random", "seed": 0}
      with job.Progress(len(todo), book.folder) as progress:
        for unit, number_done in book.claims(todo):
          progress.done(number_done)
          job.do(unit, labeller, book, 0.5, constant, progress)
      return args.shards * args.pictures

    found = {
      "models": rate(models),
      "reading": rate(lambda: sum(len(b.pictures) for b in read())),
      "job": rate(everything),
    }
  found["share"] = found["job"] / min(found["models"], found["reading"])
  found["device"] = jax.devices()[0].device_kind
  found |= {k: v for k, v in vars(args).items() if k != "out"}
  for name, value in found.items():
    value = f"{value:.3f}" if isinstance(value, float) else value
    print(f"{name:12} {value}")
  if args.out:
    files.write_json(args.out, found)
  return 0


if __name__ == "__main__":
  sys.exit(main())
