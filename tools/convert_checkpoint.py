"""Converts BLIP weights between the original, Hugging Face and this project.

  python tools/convert_checkpoint.py SRC DST [--task T] [--layout L]

SRC is a released name (model_base_retrieval_coco), a hub id
(Salesforce/blip-vqa-base), a .pth or .safetensors file, a Hugging Face folder,
or a run or checkpoint of this project. DST is a new folder with weights,
config, vocabulary and preprocessing. Prints what happened to every name.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from blip_jax.convert import companions, opening, write
from blip_jax.models import families
from blip_jax.runtime import command, host


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("source", metavar="SRC")
  parser.add_argument("target", metavar="DST", type=command.local_path)
  parser.add_argument(
    "--task",
    choices=families.FAMILIES,
    help="model family of DST; default: SRC's",
  )
  parser.add_argument(
    "--layout", choices=write.LAYOUTS, default="orbax", help="default: orbax"
  )
  parser.add_argument(
    "--model-config",
    metavar="FILE",
    type=command.local_path,
    help="a config with the number of attention heads, needed if the widths "
    "are not BERT's and ViT's: model.json, Hugging Face's config.json, or the "
    "original's med_config.json (with vit.json next to it)",
  )
  parser.add_argument(
    "--tokenizer",
    metavar="DIR",
    type=command.local_path,
    help="a folder with vocab.txt, or a hub id; default: the folder of SRC, "
    f"else {companions.BERT}",
  )
  parser.add_argument(
    "--image-size", type=int, help="side of images in pixels; default: SRC's"
  )
  parser.add_argument(
    "--no-momentum",
    action="store_true",
    help="leave out momentum encoders and queues",
  )
  parser.add_argument(
    "--drop",
    metavar="REGEX",
    nargs="+",
    default=(),
    help="names in SRC to leave out",
  )
  args = parser.parse_args(argv)
  checkpoint = opening.open_checkpoint(
    args.source,
    task=args.task,
    image_size=args.image_size,
    model_config=args.model_config,
    tokenizer=args.tokenizer,
    keep_momentum=not args.no_momentum,
    drop=args.drop,
  )
  path = write.write(checkpoint, args.target, args.layout)
  card = checkpoint.card
  height, width = card.config.vit.image_size
  print(f"{card.family} model for images of {height} x {width} pixels")
  print(checkpoint.report)
  print(f"written to {path}")
  return 0


if __name__ == "__main__":
  # Conversion copies bytes only, so it does not wait for an accelerator.
  jax.config.update("jax_platforms", "cpu")
  host.keep_freed_memory()
  sys.exit(main())
