"""Measure captioning, compared with `transformers` on the same machine.

  python tools/bench/caption.py                      BLIP-base, 384 px, beam 3
  python tools/bench/caption.py --variant tiny --image-size 32   a quick try

Both get the same random weights, images and settings in one process, and must
generate the same ids before anything is timed. `transformers` runs with each of
its attention implementations at each batch size, and its best result counts.
Needs torch (the extra [parity]). Prints a table, and writes JSON with --out.
"""

import argparse
import functools
import resource
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from blip_jax.inference import model as model_lib
from blip_jax.models import blip, decoding
from blip_jax.models import config as model_config
from blip_jax.runtime import command, files
from blip_jax.tasks import base
from blip_jax.tasks import caption as caption_lib

# "[DEC] a picture of"; sixteen tokens are generated after it.
PROMPT = (30522, 1037, 3861, 1997)
LENGTH = 20
SAMPLES = 10


@command.reports_errors
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
  parser.add_argument(
    "--out", type=command.local_path, help="write the results as JSON"
  )
  args = parser.parse_args(argv)

  on_gpu = jax.default_backend() == "gpu"
  dtype = "bfloat16" if on_gpu else "float32"
  device = "cuda" if on_gpu else "cpu"
  rng = np.random.default_rng(0)
  shape = (max(args.batch_sizes), args.image_size, args.image_size, 3)
  images = rng.integers(0, 256, shape, np.uint8)
  settings = decoding.Decoding(
    LENGTH, LENGTH, num_beams=args.num_beams, length_norm="generated"
  )
  with files.temporary_folder() as folder:
    make_external(args.variant, args.image_size).save_pretrained(folder)
    native = model_lib.load(folder, dtype=dtype)
    external = open_external(folder, device, dtype, "eager")
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
      "same_ids": same_ids(native, external, images[:2], settings),
    }
    del external
    row["native"] = time_native(native, images, settings, args)
    row["samples"] = time_samples(native, images[:1], args.repeats)
    row["transformers"] = time_external(folder, device, dtype, images, args)
  quickest = lambda rows: max(r["images_per_second"] for r in rows)
  row["ratio"] = quickest(row["native"]) / quickest(row["transformers"])
  row["peak_memory_gb"] = peak_memory_gb()
  print_table(row)
  if args.out:
    files.write_json(args.out, row)
  return 0 if row["same_ids"] else 1


def make_external(variant: str, image_size: int):
  """A `transformers` captioner with random weights."""
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
      # Larger, so that no two tokens have almost the same probability.
      if parameter.ndim == 2:
        parameter *= 3
  return model


def program(model: model_lib.Model, settings: decoding.Decoding):
  """A jitted function (params, images) -> generated texts."""
  module = model.module
  assert isinstance(module, blip.Blip)
  prompt = jnp.array(PROMPT, jnp.int32)
  num_positions = decoding.num_positions_for(
    LENGTH, model.card.config.med.max_positions
  )

  def generate(params, image):
    keys = jax.random.split(jax.random.key(0), len(image))
    return caption_lib.generate(
      module, params, image, prompt, settings, num_positions, keys
    )

  return jax.jit(generate)


def same_ids(native, external, images, settings) -> bool:
  generated = program(native, settings)(native.params, images).ids[
    :, 0, :LENGTH
  ]
  expected = external_ids(external, images, settings.num_beams)
  return bool((np.asarray(generated) == expected).all())


def external_ids(external, images, num_beams: int) -> np.ndarray:
  image = np.array(base.normalise(jax.numpy.asarray(images)))
  pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
  prompt = torch.tensor([[*PROMPT, 102]] * len(images))
  with torch.inference_mode():
    return (
      external.generate(
        pixel_values=pixels.to(external.device, external.dtype),
        input_ids=prompt.to(external.device),
        num_beams=num_beams,
        max_length=LENGTH,
        min_length=LENGTH,
        do_sample=False,
      )
      .cpu()
      .numpy()
    )


def time_native(native, images, settings, args) -> list[dict]:
  """Images per second and the shares of the parts, at each batch size."""
  rows = []
  for size in args.batch_sizes:
    image = jax.device_put(images[:size])
    generate = program(native, settings)
    start = time.perf_counter()
    compiled = generate.lower(native.params, image).compile()
    compile_seconds = time.perf_counter() - start
    encode = method_of(native, "encode_image")
    project = method_of(native, "decoder_kv")
    pixels = base.normalise(image)
    states = encode(native.params, pixels)
    parts = (compiled, image), (encode, pixels), (project, states)
    total, vit, kv = (
      seconds(functools.partial(part, native.params, x), args.repeats)
      for part, x in parts
    )
    cost = lambda f, x: f.lower(native.params, x).compile().cost_analysis()
    flops = cost(encode, pixels)["flops"] + cost(project, states)["flops"]
    memory = compiled.memory_analysis()
    rows.append(
      {
        "batch_size": size,
        "images_per_second": size / total,
        "share_vit": vit / total,
        "share_projection": kv / total,
        "share_decode": 1 - (vit + kv) / total,
        # XLA counts the body of a loop once, so the decoder is computed here.
        "gflop_vit_and_projection": flops / size / 1e9,
        "gflop_decode": decode_gflop(native.card.config, settings.num_beams),
        "compile_seconds": compile_seconds,
        "temporary_mb": memory.temp_size_in_bytes / 1e6 if memory else None,
      }
    )
  return rows


def decode_gflop(config, num_beams: int) -> float:
  """GFLOP of one image's beams: the decoder's matrix products for all tokens,
  and the logits of the vocabulary."""
  med, vit = config.med, config.vit
  square = 4 + 2  # self-attention; query and output of cross-attention
  layer = square * med.width**2 + 2 * med.width * med.mlp_dim
  attention = 2 * med.width * (vit.num_tokens + LENGTH)
  head = med.width**2 + med.width * med.vocab_size
  steps = LENGTH - len(PROMPT)
  body = med.depth * (layer + attention)
  # The prompt is processed once for all beams.
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


def time_samples(native, images, repeats: int) -> dict[str, float]:
  """The cost of several samples of an image, relative to one."""
  times = {}
  for num_samples in (1, SAMPLES):
    settings = decoding.Decoding(
      LENGTH,
      LENGTH,
      num_beams=1,
      num_return_sequences=num_samples,
      sample=True,
      top_k=50,
      top_p=0.9,
    )
    generate = program(native, settings)
    run = functools.partial(generate, native.params, jax.device_put(images))
    times[num_samples] = seconds(run, repeats)
  return {
    "number": SAMPLES,
    "seconds_one": times[1],
    "seconds_all": times[SAMPLES],
    "ratio": times[SAMPLES] / times[1],
  }


def time_external(folder, device, dtype, images, args) -> list[dict]:
  rows = []
  for attention in ("eager", "sdpa"):
    try:
      external = open_external(folder, device, dtype, attention)
    except ValueError as error:
      print(
        f"transformers without {attention} attention: {error}", file=sys.stderr
      )
      continue
    for size in args.batch_sizes:
      batch = images[:size]
      run = functools.partial(external_ids, external, batch, args.num_beams)
      rows.append(
        {
          "attention": attention,
          "batch_size": size,
          "images_per_second": size / seconds(run, args.repeats),
        }
      )
  return rows


def open_external(folder, device, dtype, attention: str):
  return transformers.BlipForConditionalGeneration.from_pretrained(
    folder, attn_implementation=attention, dtype=getattr(torch, dtype)
  ).to(device)


def seconds(run: Callable, repeats: int) -> float:
  """The shortest of `repeats` runs, after one to warm up."""
  jax.block_until_ready(run())
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return min(times)


def peak_memory_gb() -> float:
  """Peak memory of the process, both libraries together."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def print_table(row: dict) -> None:
  print(
    f"{row['variant']}, {row['image_size']} px, {row['num_beams']} beams, "
    f"{row['length']} tokens, {row['dtype']} on {row['device']}"
  )
  print(f"same ids: {row['same_ids']}")
  print("batch  img/s   ViT  K/V  decode  GFLOP/img  compile")
  for r in row["native"]:
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
