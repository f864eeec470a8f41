"""Captions of a folder of pictures, or of tar shards.

  python -m blip_jax.main --config configs/caption_images.py \
    --config.images=FOLDER --config.out=captions.jsonl

A line of the result is one picture: {"row", "id", "caption", "log_prob",
"score"}, or {"row", "id", "error"} if it cannot be read.  A job that was
stopped goes on where it was when it is started again.

Useful: `--config.model=WORKDIR` for a model of your own, `--config.sidecars`
for a .txt beside every picture, `--config.generation.sample
--config.generation.num_return_sequences=5` for several different captions of
each.
"""

from blip_jax import defaults


def get_config():
  return defaults.caption_images()
