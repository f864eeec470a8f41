"""Captions of NoCaps, by a model that was fine-tuned on COCO only.

  python -m blip_jax.main --config configs/caption_nocaps.py --workdir W

Section 5.2 of the paper: evaluation alone, with a repetition penalty of 1.1.
Writes `val_captions.json` and `test_captions.json` in the format of NoCaps's
server, which alone has the human captions.  Expect 109.6 CIDEr and 14.7
SPICE on val (Table 7).  Not run here.
"""

from blip_jax.tasks import caption


def get_config():
  config = caption.defaults()
  config.job = "evaluate"
  config.init.weights = "model_base_caption_capfilt_large"
  config.generation.repetition_penalty = 1.1

  for name in ("val", "test"):
    split = config.evals[name]
    split.source = f"data/nocaps_{name}.json"
    split.image_root = "data/nocaps"
    split.references = "none"
  return config
