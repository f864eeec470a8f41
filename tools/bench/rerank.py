"""Measure ITM re-ranking, with each image projected once or for every pair.

  python tools/bench/rerank.py                   BLIP-base, 384 px, 128 texts
  python tools/bench/rerank.py --variant tiny --image-size 32    a quick try

"per pair" is the original's way: the tokens of the image are repeated for each
text and projected again. "shared" projects each image once. Both use the same
random weights and texts of 35 tokens in one process, alternate, and must give
the same scores. "shared, captions" has texts of the lengths of COCO's captions,
which are trimmed. Prints a table and the planned blocks of a large evaluation,
and writes JSON with --out.
"""

import argparse
import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.inference import scoring
from blip_jax.models import blip, families, med
from blip_jax.models import config as model_config
from blip_jax.runtime import command, files, sharding
from blip_jax.tasks import align

LENGTH = 35
# Tokens of COCO's captions, [CLS] and [SEP] included: about 13 +- 2.5.
CAPTION_TOKENS = 13, 2.5
BERT = model_config.SpecialTokens(pad=0, cls=101, sep=102, dec=30522, enc=30523)


@command.reports_errors
def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--variant", default="base", choices=model_config.VARIANTS
  )
  parser.add_argument("--image-size", type=int, default=384)
  parser.add_argument("--k", type=int, default=128, help="texts per image")
  parser.add_argument("--images", type=int, default=1, help="images per batch")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument(
    "--plan",
    type=int,
    nargs=3,
    default=(5000, 25000, 256),
    metavar="N",
    help="images, texts and k_test of the evaluation to plan",
  )
  parser.add_argument(
    "--out", type=command.local_path, help="write the results as JSON"
  )
  args = parser.parse_args(argv)

  on_gpu = jax.default_backend() == "gpu"
  sizes = model_config.variant(
    args.variant,
    image_size=args.image_size,
    vocab_size=30524,
    tokens=BERT,
    dtype="bfloat16" if on_gpu else "float32",
  )
  model = blip.Blip(sizes)
  params = jax.jit(lambda key: families.init("itm", sizes, key))(
    jax.random.key(0)
  )
  pixels = np.random.default_rng(0).integers(
    0, 256, (args.images, args.image_size, args.image_size, 3), np.uint8
  )
  scorer = scoring.Scorer(align.predict_fns(model), sharding.one_device())
  embeds, _ = scorer.image_features(params, jnp.asarray(pixels))
  long = make_texts(args.k, np.full(args.k, LENGTH))
  rng = np.random.default_rng(1)
  lengths = rng.normal(*CAPTION_TOKENS, args.k).round().clip(5, LENGTH)
  candidates = [np.arange(args.k)] * args.images
  shared = functools.partial(
    scorer.itm_logits, params, embeds, candidates=candidates
  )
  methods = {
    "per pair": functools.partial(per_pair, model, params, embeds, long),
    "shared": lambda: np.stack(shared(texts=long)),
    "shared, captions": lambda: np.stack(
      shared(texts=make_texts(args.k, lengths.astype(int)))
    ),
  }
  # This compiles them too.
  scores = {name: run() for name, run in methods.items()}
  difference = np.abs(scores["per pair"] - scores["shared"]).max()
  # Scores of random weights are about 1; bfloat16 has three digits.
  same = bool(difference < (0.05 if on_gpu else 1e-4))
  seconds = alternate(methods, args.repeats)
  number = args.k * args.images
  row = {
    "device": str(jax.devices()[0].device_kind),
    "dtype": sizes.vit.dtype,
    "variant": args.variant,
    "image_size": args.image_size,
    "k": args.k,
    "images": args.images,
    "largest_difference": float(difference),
    "same_scores": same,
    "pairs_per_second": {n: number / s for n, s in seconds.items()},
    "ratio": {n: seconds["per pair"] / s for n, s in seconds.items()},
    "plan": plan(sizes, *args.plan),
    "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
  }
  print_table(row)
  if args.out:
    files.write_json(args.out, row)
  return 0 if same else 1


def make_texts(number: int, lengths: np.ndarray) -> scoring.Texts:
  mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
  rng = np.random.default_rng(2)
  ids = rng.integers(1000, 30000, (number, LENGTH)).astype(np.int32)
  return scoring.Texts(ids * mask, mask)


def per_pair(
  model: blip.Blip, params: med.Params, embeds: jax.Array, texts: scoring.Texts
) -> np.ndarray:
  """Logits of all texts with each image, projected again for every pair."""
  logits = []
  for image in embeds:
    for start in range(0, len(texts.input_ids), scoring.TEXTS_AT_ONCE):
      rows = np.arange(start, min(start + scoring.TEXTS_AT_ONCE, len(texts[0])))
      batch = texts.rows(rows, LENGTH)
      repeated = jnp.repeat(image[None], len(rows), axis=0)
      logits.append(_match(model, params, repeated, *batch.values()))
  return np.concatenate(logits).reshape(len(embeds), -1, 2)


@functools.partial(jax.jit, static_argnums=0)
def _match(model, params, image_embeds, ids, mask):
  call = functools.partial(model.apply, {"params": params})
  return call(ids, mask, call(image_embeds, method="image_kv"), method="match")


def alternate(
  methods: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
  """Runs the methods in turn; returns the median seconds of each."""
  seconds = {name: [] for name in methods}
  for _ in range(repeats):
    for name, run in methods.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(times) for name, times in seconds.items()}


def plan(
  sizes: model_config.BlipConfig, images: int, texts: int, k: int
) -> dict[str, Any]:
  """The memory that an evaluation needs on one device, and its blocks."""
  nbytes = lambda tree: sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  weights = nbytes(families.abstract("itm", sizes))
  block = scoring.block_size(sizes, sharding.one_device(), LENGTH)
  per_image = scoring.image_bytes(sizes, LENGTH)
  # An upper bound: a pair on both lists is scored once.
  num_pairs = images * min(k, texts) + texts * min(k, images)
  return {
    "images": images,
    "texts": texts,
    "k_test": k,
    "images_at_a_time": block,
    "texts_at_a_time": block * scoring.TEXTS_AT_ONCE,
    "blocks": -(-images // block),
    "pairs": num_pairs,
    "weights_gb": weights / 1e9,
    "block_gb": block * per_image / 1e9,
    "device_gb": (weights + block * per_image) / 1e9,
    "host_gb_of_scores": 3 * images * texts * 4 / 1e9,
    "host_gb_of_features": (images + texts) * sizes.embed_dim * 4 / 1e9,
  }


def print_table(row: dict[str, Any]) -> None:
  print(
    f"{row['variant']}, {row['image_size']} px, {row['dtype']}, "
    f"{row['images']} x {row['k']} pairs, {row['device']}"
  )
  print(f"largest difference of scores {row['largest_difference']:.1e}")
  for name, rate in row["pairs_per_second"].items():
    print(f"{name:20} {rate:9.1f} pairs/s  {row['ratio'][name]:5.2f}x")
  print(f"peak memory of this process {row['peak_memory_gb']:.1f} GB")
  print("The plan of an evaluation on one device:")
  for name, value in row["plan"].items():
    text = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
    print(f"  {name:22} {text:>14}")


if __name__ == "__main__":
  sys.exit(main())
