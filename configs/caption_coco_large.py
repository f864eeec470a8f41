"""Captioning COCO with ViT-L, from a pre-trained model.

  python -m blip_jax.main --config configs/caption_coco_large.py --workdir W

`caption_coco.py` with the numbers that its YAML has for ViT-L: 128 pairs a
step (8 GPUs of 16) and 2e-6.  Expect 40.4 BLEU-4 and 136.7 CIDEr on test
(Table 7).  Not run here to the end.
"""

from blip_jax import defaults
from blip_jax.tasks import caption


def get_config():
  config = caption.defaults()
  config.batch_size = 128
  config.num_epochs = 5.0
  config.scope = "local"
  config.init.weights = "model_large"
  config.optim.lr = 2e-6

  config.model.variant = "large"
  config.model.image_size = 384
  config.model.vit_remat = "dots"
  defaults.use_coco(config)
  return config
