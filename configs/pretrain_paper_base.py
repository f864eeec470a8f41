"""Pre-training on 129M images as in the paper, with ViT-B.

  python -m blip_jax.main --config configs/pretrain_paper_base.py \
    --workdir W --distributed auto

Section 4.1 of arXiv 2201.12086: 2,880 pairs a step, 20 epochs, learning rate
warmed up to 3e-4 and decayed by 0.85 per epoch.  The code of the original
decays by 0.9 and exponentially; the paper writes "linearly".

Data: as `pretrain_14m.py`, and LAION in five splits of which each epoch uses
the next one: about 38M texts an epoch.

Hardware: made for 32 accelerators of 40 GB; any number that divides the batch.
Cost: the original needed 8 to 9 days on 32 A100 (salesforce/BLIP issue 2).
Not run here to the end.
"""

from blip_jax import defaults
from blip_jax.tasks import pretrain

TEXTS_PER_EPOCH = 15_300_000 + 115_000_000 // 5


def get_config():
  config = pretrain.defaults()
  config.batch_size = 2880
  config.optim.steps_per_epoch = TEXTS_PER_EPOCH // config.batch_size
  config.num_steps = 20 * config.optim.steps_per_epoch

  config.model.variant = "base"
  config.model.image_size = 224

  defaults.use_paper_sources(config)
  config.data.rotate = "data/laion/*.json"

  config.optim.schedule = "step"
  config.optim.lr = 3e-4
  config.optim.min_lr = 1e-6
  config.optim.warmup_lr = 1e-6
  config.optim.warmup_steps = 3000
  config.optim.decay_rate = 0.85
  config.optim.weight_decay = 0.05

  config.evals.every_steps = config.optim.steps_per_epoch
  return config
