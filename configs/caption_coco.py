"""Captioning COCO, from a pre-trained model, with the original's numbers.

  python -m blip_jax.main --config configs/caption_coco.py --workdir W

Section 5.2 of arXiv 2201.12086; `configs/caption_coco.yaml` of the original:
ViT-B at 384 pixels, 256 pairs a step (8 GPUs of 32), 5 epochs of 566,747
captions, cosine from 1e-5 that changes with the epoch.

Data: the Karpathy split, `coco_karpathy_{train,val,test}.json` of the original
and the images that they name.  Expect 39.7 BLEU-4 and 133.3 CIDEr on test
(Table 7; salesforce/BLIP issue 150 measured 39.7 and 133.3).  Not run here to
the end.
"""

from blip_jax import defaults
from blip_jax.tasks import caption


def get_config():
  config = caption.defaults()
  config.batch_size = 256
  config.num_epochs = 5.0
  # The original's loss is the mean over each GPU's captions.
  config.scope = "local"
  config.init.weights = "model_base_capfilt_large"
  config.optim.lr = 1e-5

  config.model.variant = "base"
  config.model.image_size = 384
  defaults.use_coco(config)
  return config
