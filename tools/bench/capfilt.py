"""Measures the overhead of CapFilt over its models.

  python -m blip_jax.tools.bench.capfilt --variant base --image-size 384 \
    --shards 3 --images 16 --out bench.json

Writes tar shards of images as large as photographs, and makes a captioner and a
filter with random weights.  Then, with all programs compiled, measures images
per second of (1) the models alone, on images in memory; (2) reading alone: the
shards, decoding, resizing; (3) the whole job, up to the files of its last
shard.  The job should reach 90 % of the slower of the first two.
"""

import argparse
import io
import os
import pathlib
import sys
import tarfile
import time
from collections.abc import Callable, Sequence

import cv2
import jax
import numpy as np

from blip_jax.capfilt import job, label, ledger, work_units
from blip_jax.data import scenes
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.inference import model as model_lib
from blip_jax.models import card, families
from blip_jax.models import config as model_config
from blip_jax.runtime import command, files, host, sharding

# With random weights every caption gets to the maximal length.
GENERATION = {"sample": True, "top_p": 0.9, "max_length": 20, "min_length": 5}


def write_shards(
  folder: pathlib.Path, num_shards: int, num_images: int, side: int
) -> None:
  """Writes shards of noise, smooth enough for the JPEG size of a photograph.

  Args:
    folder: where to write.
    num_shards: how many.
    num_images: per shard.
    side: height of an image in pixels; the width is 4/3 of it.
  """
  rng, captions = np.random.default_rng(0), scenes.Scenes("train")
  for shard in range(num_shards):
    with (
      files.open_atomic(folder / f"{shard:05d}.tar") as file,
      tarfile.open(fileobj=file, mode="w") as tar,
    ):
      for number in range(num_images):
        coarse = rng.integers(0, 256, (side // 4, side // 3, 3), np.uint8)
        pixels = cv2.resize(coarse, (side * 4 // 3, side))
        _, encoded = cv2.imencode(".jpg", pixels)
        caption = captions[shard * num_images + number]["caption"]
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
  # On the host: a GPU takes a minute to compile what runs only once.
  with jax.default_device(jax.devices("cpu")[0]):
    params = jax.jit(lambda key: families.init(family, sizes, key))(
      jax.random.key(0)
    )
  params = jax.device_put(params, sharding.replicated(mesh))
  module = families.build(family, sizes)
  model_card = card.Card(family, sizes, "a picture of ", {})
  return model_lib.Model(model_card, module, params, words, mesh)


def rate(function: Callable[[], int]) -> float:
  """Images per second of a function that returns their number."""
  begin = time.monotonic()
  num_images = function()
  return num_images / (time.monotonic() - begin)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--variant", default="base")
  parser.add_argument("--image-size", type=int, default=384)
  parser.add_argument("--shards", type=int, default=3)
  parser.add_argument("--images", type=int, default=16, help="per shard")
  parser.add_argument("--side", type=int, default=480, help="height in pixels")
  parser.add_argument("--per-device-batch-size", type=int, default=8)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--out", type=command.local_path)
  args = parser.parse_args(argv)
  host.keep_freed_memory()

  mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
  make = lambda family: make_model(family, args.variant, args.image_size, mesh)
  labeller = label.Labeller(
    make("caption"),
    make("itm"),
    seed=0,
    per_device_batch_size=args.per_device_batch_size,
    generation=GENERATION,
    num_threads=args.threads,
  )
  with files.temporary_folder() as folder:
    write_shards(folder, args.shards, args.images, args.side)
    shards = work_units.find([str(folder / "*.tar")], "", True, 1)
    read = lambda: [
      batch for shard in shards for batch in labeller.read(shard.open()[0])
    ]
    batches = read()
    label_all = lambda: sum(len(images) for images in labeller.label(batches))
    label_all()  # compiles

    def run_job() -> int:
      job_ledger = ledger.Ledger(folder / f"out{time.monotonic_ns()}")
      files.make_folder(job_ledger.folder)
      job_ledger.begin({}, force=False)
      constants = {"captioner": "random", "filter": "random", "seed": 0}
      with job.Progress(len(shards), job_ledger.folder) as progress:
        for shard, num_done in job_ledger.claims(shards):
          progress.set_done(num_done)
          job.process(shard, labeller, job_ledger, 0.5, constants, progress)
      return args.shards * args.images

    results = {
      "models": rate(label_all),
      "reading": rate(lambda: sum(len(batch.images) for batch in read())),
      "job": rate(run_job),
    }
  results["share"] = results["job"] / min(results["models"], results["reading"])
  results["device"] = jax.devices()[0].device_kind
  results |= {name: v for name, v in vars(args).items() if name != "out"}
  for name, value in results.items():
    value = f"{value:.3f}" if isinstance(value, float) else value
    print(f"{name:12} {value}")
  if args.out:
    files.write_json(args.out, results)
  return 0


if __name__ == "__main__":
  sys.exit(main())
