"""Fine-tuning a captioner on your own images, by flags alone.

  python -m blip_jax.main --config configs/caption_folder.py --workdir W \
    --config.data.train=FOLDER --config.evals.val.source=ANOTHER_FOLDER

A folder has text files next to its images (a.jpg, a.txt) or a `metadata.jsonl`.
A CSV, JSONL or Parquet file or a TFDS name works as well: see docs/data.md.
Without a split to evaluate on, leave that flag out.

Made for one GPU (not measured on one): BLIP's base model at 384 pixels, 16
pairs a step.  With less memory set `--config.model.vit_remat=full`; on a CPU
try `--config.model.dtype=float32 --config.batch_size=4` and some dozen
images.
The prompt is part of the model; another style of captions may need another one,
`--config.caption.prompt`.
"""

from blip_jax.tasks import caption


def get_config():
  config = caption.defaults()
  config.batch_size = 16
  config.num_epochs = 5.0
  config.log_every_steps = 10
  config.init.weights = "Salesforce/blip-image-captioning-base"
  config.optim.lr = 1e-5

  config.checkpoint.every_steps = 500
  config.evals.every_steps = 500
  config.evals.batch_size = 16
  config.evals.val.samples = 24
  return config
