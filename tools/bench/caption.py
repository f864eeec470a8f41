"""How quickly captions are written, beside `transformers` on the same machine.

  python tools/bench/caption.py                      BLIP-base, 384 px, beam 3
  python tools/bench/caption.py --variant tiny --image-size 32   a quick try

Both get the same random weights, pictures and settings in one process, and must
write the same ids before anything is timed.  `transformers` runs each of its
attention implementations at each batch size, and its best counts.  Needs torch
(the extra [parity]).  Prints a table, and writes JSON with --out.
"""

import argparse
import functools
import json
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers

from blip_jax.inference import model as model_lib
from blip_jax.models import config as model_config
from blip_jax.models import decoding
from blip_jax.tasks import base
from blip_jax.tasks import caption as caption_lib

# [DEC] a picture of, with sixteen tokens behind it, whatever they are.
PROMPT = (30522, 1037, 3861, 1997)
LENGTH = 20
SAMPLES = 10


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--variant", default="base", choices=model_config.VARIANTS
  )
  parser.add_argument("--image-size", type=int, default=384)
  parser.add_argument("--num-beams", type=int, default=3)
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", help="a JSON file for the numbers")
  args = parser.parse_args(argv)

  on_gpu = jax.default_backend() == "gpu"
  dtype = "bfloat16" if on_gpu else "float32"
  device = "cuda" if on_gpu else "cpu"
  rng = np.random.default_rng(0)
  shape = (max(args.batch_sizes), args.image_size, args.image_size, 3)
  pictures = rng.integers(0, 256, shape, np.uint8)
  settings = decoding.Decoding(
    LENGTH, LENGTH, num_beams=args.num_beams, length_norm="generated"
  )
  with tempfile.TemporaryDirectory() as folder:
    make_theirs(args.variant, args.image_size).save_pretrained(folder)
    ours = model_lib.load(folder, dtype=dtype)
    theirs = open_theirs(folder, device, dtype, "eager")
    row = {
      "device": str(jax.devices()[0].device_kind),
      "dtype": dtype,
      "variant": args.variant,
      "image_size": args.image_size,
      "num_beams": args.num_beams,
      "length": LENGTH,
      "threads": torch.get_num_threads(),
      "versions": {
        m.__name__: m.__version__ for m in (jax, torch, transformers)
      },
      "same_ids": same_ids(ours, theirs, pictures[:2], settings),
    }
    del theirs
    row["ours"] = time_ours(ours, pictures, settings, args)
    row["samples"] = time_samples(ours, pictures[:1], args.repeats)
    row["transformers"] = time_theirs(folder, device, dtype, pictures, args)
  quickest = lambda rows: max(r["images_per_second"] for r in rows)
  row["ratio"] = quickest(row["ours"]) / quickest(row["transformers"])
  row["peak_memory_gb"] = peak_memory_gb()
  print_table(row)
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(row, indent=2) + "\n")
  return 0 if row["same_ids"] else 1


def make_theirs(variant: str, image_size: int):
  """A captioner of `transformers` with random weights."""
  sizes = model_config.VARIANTS[variant]
  vision, text = sizes["vit"], sizes["med"]
  config = transformers.BlipConfig(
    vision_config=dict(
      image_size=image_size,
      patch_size=vision["patch_size"],
      hidden_size=vision["width"],
      num_hidden_layers=vision["depth"],
      num_attention_heads=vision["num_heads"],
      intermediate_size=vision["mlp_dim"],
      layer_norm_eps=1e-6,
    ),
    text_config=dict(
      vocab_size=30524,
      hidden_size=text["width"],
      encoder_hidden_size=vision["width"],
      num_hidden_layers=text["depth"],
      num_attention_heads=text["num_heads"],
      intermediate_size=text["mlp_dim"],
      max_position_embeddings=text.get("max_positions", 512),
      bos_token_id=30522,
      eos_token_id=102,
      sep_token_id=102,
      pad_token_id=0,
    ),
  )
  torch.manual_seed(0)
  model = transformers.BlipForConditionalGeneration(config)
  with torch.no_grad():
    for parameter in model.text_decoder.parameters():
      # Sharper, so that no two tokens are as good as each other.
      if parameter.ndim == 2:
        parameter *= 3
  return model


def program(model: model_lib.Model, settings: decoding.Decoding):
  """What writes texts about pictures, as a function of parameters and those."""
  prompt = np.array(PROMPT, np.int32)
  room = decoding.num_positions_for(LENGTH, model.card.config.med.max_positions)

  def write(params, image):
    keys = jax.random.split(jax.random.key(0), len(image))
    return caption_lib.generate(
      model.module, params, image, prompt, settings, room, keys
    )

  return jax.jit(write)


def same_ids(ours, theirs, pictures, settings) -> bool:
  found = program(ours, settings)(ours.params, pictures).ids[:, 0, :LENGTH]
  expected = their_ids(theirs, pictures, settings.num_beams)
  return bool((np.asarray(found) == expected).all())


def their_ids(theirs, pictures, num_beams: int) -> np.ndarray:
  image = np.array(base.normalise(jax.numpy.asarray(pictures)))
  pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
  prompt = torch.tensor([[*PROMPT, 102]] * len(pictures))
  with torch.inference_mode():
    return (
      theirs.generate(
        pixel_values=pixels.to(theirs.device, theirs.dtype),
        input_ids=prompt.to(theirs.device),
        num_beams=num_beams,
        max_length=LENGTH,
        min_length=LENGTH,
        do_sample=False,
      )
      .cpu()
      .numpy()
    )


def time_ours(ours, pictures, settings, args) -> list[dict]:
  """Images per second, and where the time goes, at each batch size."""
  rows = []
  for size in args.batch_sizes:
    image = jax.device_put(pictures[:size])
    write = program(ours, settings)
    start = time.perf_counter()
    compiled = write.lower(ours.params, image).compile()
    compile_seconds = time.perf_counter() - start
    encode = method_of(ours, "encode_image")
    project = method_of(ours, "decoder_kv")
    normal = base.normalise(image)
    states = encode(ours.params, normal)
    parts = (compiled, image), (encode, normal), (project, states)
    whole, vit, kv = (
      seconds(functools.partial(part, ours.params, x), args.repeats)
      for part, x in parts
    )
    cost = lambda f, x: f.lower(ours.params, x).compile().cost_analysis()
    flops = cost(encode, normal)["flops"] + cost(project, states)["flops"]
    rows.append(
      {
        "batch_size": size,
        "images_per_second": size / whole,
        "share_vit": vit / whole,
        "share_projection": kv / whole,
        "share_decode": 1 - (vit + kv) / whole,
        # XLA counts the body of a loop once: the decoder's is added by hand.
        "gflop_vit_and_projection": flops / size / 1e9,
        "gflop_decode": decode_gflop(ours.card.config, settings.num_beams),
        "compile_seconds": compile_seconds,
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
      }
    )
  return rows


def decode_gflop(config, num_beams: int) -> float:
  """Of one picture's beams: all matrix products of the decoder, per token, and
  the scores of the vocabulary."""
  med, vit = config.med, config.vit
  square = 4 + 2  # self-attention; query and output of cross-attention
  layer = square * med.width**2 + 2 * med.width * med.mlp_dim
  attention = 2 * med.width * (vit.num_tokens + LENGTH)
  head = med.width**2 + med.width * med.vocab_size
  steps = LENGTH - len(PROMPT)
  body = med.depth * (layer + attention)
  # The prompt is read once for all beams.
  tokens = len(PROMPT) + num_beams * (steps - 1)
  heads = 1 + num_beams * (steps - 1)
  return 2 * (tokens * body + heads * head) / 1e9


@functools.lru_cache
def _method(module, method):
  return jax.jit(
    lambda params, x: module.apply({"params": params}, x, method=method)
  )


def method_of(model, method: str):
  return _method(model.module, method)


def time_samples(ours, pictures, repeats: int) -> dict[str, float]:
  """How much more several samples of a picture cost than one."""
  times = {}
  for number in (1, SAMPLES):
    settings = decoding.Decoding(
      LENGTH,
      LENGTH,
      num_beams=1,
      num_return_sequences=number,
      sample=True,
      top_k=50,
      top_p=0.9,
    )
    write = program(ours, settings)
    run = functools.partial(write, ours.params, jax.device_put(pictures))
    times[number] = seconds(run, repeats)
  return {
    "number": SAMPLES,
    "seconds_one": times[1],
    "seconds_all": times[SAMPLES],
    "ratio": times[SAMPLES] / times[1],
  }


def time_theirs(folder, device, dtype, pictures, args) -> list[dict]:
  rows = []
  for attention in ("eager", "sdpa"):
    try:
      theirs = open_theirs(folder, device, dtype, attention)
    except ValueError as error:
      print(f"transformers has no {attention}: {error}", file=sys.stderr)
      continue
    for size in args.batch_sizes:
      some = pictures[:size]
      run = functools.partial(their_ids, theirs, some, args.num_beams)
      rows.append(
        {
          "attention": attention,
          "batch_size": size,
          "images_per_second": size / seconds(run, args.repeats),
        }
      )
  return rows


def open_theirs(folder, device, dtype, attention: str):
  return transformers.BlipForConditionalGeneration.from_pretrained(
    folder, attn_implementation=attention, dtype=getattr(torch, dtype)
  ).to(device)


def seconds(run: Callable, repeats: int) -> float:
  """The least of some times, after one that does not count."""
  jax.block_until_ready(run())
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return min(times)


def peak_memory_gb() -> float:
  """Of the process, both libraries together."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def print_table(row: dict) -> None:
  print(
    f"{row['variant']}, {row['image_size']} px, {row['num_beams']} beams, "
    f"{row['length']} tokens, {row['dtype']} on {row['device']}"
  )
  print(f"same ids: {row['same_ids']}")
  print("batch  img/s   ViT  K/V  decode  GFLOP/img  compile")
  for r in row["ours"]:
    gflop = r["gflop_vit_and_projection"] + r["gflop_decode"]
    print(
      f"{r['batch_size']:5d} {r['images_per_second']:6.2f} "
      f"{r['share_vit']:5.0%} {r['share_projection']:4.0%} "
      f"{r['share_decode']:7.0%} {gflop:10.0f} {r['compile_seconds']:7.1f} s"
    )
  for r in row["transformers"]:
    print(
      f"transformers, {r['attention']}, batch {r['batch_size']}: "
      f"{r['images_per_second']:.2f} img/s"
    )
  print(f"ratio to the best of transformers: {row['ratio']:.2f}")
  s = row["samples"]
  print(f"{s['number']} samples cost {s['ratio']:.2f} times one")
  print(f"peak memory of the process: {row['peak_memory_gb']:.1f} GB")


if __name__ == "__main__":
  sys.exit(main())
