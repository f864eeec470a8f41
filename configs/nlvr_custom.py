"""Statements about your own pairs of images, by flags alone.

  python -m blip_jax.main --config configs/nlvr_custom.py --workdir W \
    --config.data.train=statements.csv --config.data.image_root=images \
    --config.evals.val.source=val_statements.csv \
    --config.evals.val.image_root=images

The two files are CSV, JSON or JSON lines (docs/nlvr.md) with the columns
`image_0`, `image_1`, `sentence` and `label` (true or false).  Starts from the
released pre-trained model; `--config.init.weights=model_base_nlvr` takes the
one for NLVR2, a workdir one of your own, and `--config.init.weights=` starts
from scratch.

Made for one GPU (not measured on one): BLIP's base model at 384 pixels, 16
pairs a step.  With less memory set `--config.model.vit_remat=full`.
"""

from blip_jax.tasks import nlvr


def get_config():
  config = nlvr.defaults()
  config.batch_size = 16
  config.num_epochs = 10.0
  config.log_every_steps = 20
  config.init.weights = "model_base"

  config.checkpoint.every_steps = 500
  config.evals.every_steps = 500
  return config
