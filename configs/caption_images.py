"""Captions of a folder of images or videos, or of tar shards.

  python -m blip_jax.main --config configs/caption_images.py \
    --config.images=FOLDER --config.out=captions.jsonl

Each image is a line of the result: {"row", "id", "caption", "log_prob",
"score"}, or {"row", "id", "error"} if it cannot be read. The same command
resumes a job that was stopped; other settings are refused.

Useful: `--config.model=WORKDIR` for your own model, `--config.sidecars` for a
.txt next to every image, `--config.num_frames=8` for videos,
`--config.generation.sample
--config.generation.num_return_sequences=5` for several different captions of
each.
"""

from blip_jax import defaults


def get_config():
  return defaults.caption_images()
