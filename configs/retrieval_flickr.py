"""Retrieval on Flickr30k, from a pre-trained model, as the original.

  python -m blip_jax.main --config configs/retrieval_flickr.py --workdir W

Section 5.1 of arXiv 2201.12086; `configs/retrieval_flickr.yaml` of the
original: as COCO, but 128 candidates are re-ranked and ITM samples negatives
from the batch of the same GPU.

Data: `flickr30k_{train,val,test}.json` of the original, 29,000 images with
five captions each for training.  Expect 97.3 (text) and 87.3 (image) R@1 on
test (Table 5).  Not run here to the end.
"""

from blip_jax import defaults
from blip_jax.tasks import retrieval


def get_config():
  config = retrieval.defaults()
  config.init.weights = "model_base"
  config.scope = "local"
  config.retrieval.negatives = "local"
  config.optim.lr = 1e-5

  config.model.variant = "base"
  config.model.image_size = 384
  config.model.vit_remat = "dots"
  defaults.use_flickr(config)
  config.evals.val.k_test = config.evals.test.k_test = 128
  return config
