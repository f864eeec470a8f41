"""Retrieval on COCO, from a pre-trained model, with the original's numbers.

  python -m blip_jax.main --config configs/retrieval_coco.py --workdir W

Section 5.1 of arXiv 2201.12086; `configs/retrieval_coco.yaml` of the original:
ViT-B at 384 pixels, 256 pairs a step (8 GPUs of 32), 6 epochs of 566,747
captions, cosine from 1e-5 that changes with the epoch.  ITC compares with the
batch of the same GPU and the queue; ITM samples negatives from all GPUs.

Data: the Karpathy split, `coco_karpathy_{train,val,test}.json` of the original
and the images that they name.  Expect 81.9 (text) and 64.3 (image) R@1 on
test (Table 5).  Not run here to the end.
"""

from blip_jax import defaults
from blip_jax.tasks import retrieval


def get_config():
  config = retrieval.defaults()
  config.init.weights = "model_base"
  config.scope = "local"
  config.retrieval.negatives = "global"
  config.optim.lr = 1e-5

  config.model.variant = "base"
  config.model.image_size = 384
  config.model.vit_remat = "dots"
  defaults.use_coco(config)
  config.evals.val.k_test = config.evals.test.k_test = 256
  return config
