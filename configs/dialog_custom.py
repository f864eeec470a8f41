"""Dialogs about your own images, by flags alone.

  python -m blip_jax.main --config configs/dialog_custom.py --workdir W \
    --config.data.train=dialogs.jsonl --config.data.image_root=images \
    --config.evals.val.source=val_dialogs.jsonl \
    --config.evals.val.image_root=images

The two files have an object per line (docs/visual_dialog.md) with `image`,
`caption` and `dialog`, a list of rounds with `question`, `answer` and
`answer_options`.  Starts from the released pre-trained model;
`--config.init.weights=W` takes a workdir of your own, and
`--config.init.weights=` starts from scratch.

Made for one GPU (not measured on one): BLIP's base model at 384 pixels, 16
dialogs a step.  With less memory set `--config.model.vit_remat=full`.
"""

from blip_jax.tasks import dialog


def get_config():
  config = dialog.defaults()
  config.batch_size = 16
  config.num_epochs = 10.0
  config.log_every_steps = 20
  config.init.weights = "model_base_capfilt_large"

  config.checkpoint.every_steps = 500
  config.evals.every_steps = 500
  return config
