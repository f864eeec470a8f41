"""Retrieval on Flickr30k with ViT-L, from a pre-trained model.

  python -m blip_jax.main --config configs/retrieval_flickr_large.py --workdir W

`retrieval_flickr.py` with the numbers that its YAML has for ViT-L: 128 pairs a
step (8 GPUs of 16) and 5e-6.  Expect 97.4 (text) and 87.6 (image) R@1 on test
(Table 5).  Not run here to the end.
"""

from blip_jax import defaults
from blip_jax.tasks import retrieval


def get_config():
  config = retrieval.defaults()
  config.batch_size = 128
  config.init.weights = "model_large"
  config.scope = "local"
  config.retrieval.negatives = "local"
  config.optim.lr = 5e-6

  config.model.variant = "large"
  config.model.image_size = 384
  config.model.vit_remat = "full"
  defaults.use_flickr(config)
  config.evals.batch_size = 32
  config.evals.val.k_test = config.evals.test.k_test = 128
  return config
