"""Pre-training on 129M images as in the paper, with ViT-L.

  python -m blip_jax.main --config configs/pretrain_paper_large.py \
    --workdir W --distributed auto

Section 4.1 of arXiv 2201.12086: 2,400 pairs a step and a peak learning rate of
2e-4; otherwise `pretrain_paper_base.py`.  The image tower always drops paths
with 0.1 (the variant's default) and is recomputed in the backward pass.

Hardware: made for 32 accelerators of 40 GB; the weights are split over 8.
Not run here to the end.
"""

from blip_jax import defaults
from blip_jax.tasks import pretrain

TEXTS_PER_EPOCH = 15_300_000 + 115_000_000 // 5


def get_config():
  config = pretrain.defaults()
  config.batch_size = 2400
  config.optim.steps_per_epoch = TEXTS_PER_EPOCH // config.batch_size
  config.num_steps = 20 * config.optim.steps_per_epoch
  config.mesh.fsdp = 8

  config.model.variant = "large"
  config.model.image_size = 224
  config.model.vit_remat = "full"

  defaults.use_paper_sources(config)
  config.data.rotate = "data/laion/*.json"

  config.optim.schedule = "step"
  config.optim.lr = 2e-4
  config.optim.min_lr = 1e-6
  config.optim.warmup_lr = 1e-6
  config.optim.warmup_steps = 3000
  config.optim.decay_rate = 0.85
  config.optim.weight_decay = 0.05

  config.evals.every_steps = config.optim.steps_per_epoch
  return config
