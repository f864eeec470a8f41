"""Retrieval on Flickr30k by a model that was fine-tuned on COCO alone.

  python -m blip_jax.main --config configs/retrieval_flickr_zero_shot.py \
    --workdir W

Section 5.1 of arXiv 2201.12086, Table 6: evaluation alone.  "Zero-shot"
refers to Flickr30k: the recipe takes the model that was fine-tuned on COCO,
not the pre-trained one (salesforce/BLIP issues 28 and 118).  Expect 96.0 (text)
and 85.0 (image) R@1 on test.  Not run here.
"""

from blip_jax.tasks import retrieval


def get_config():
  config = retrieval.defaults()
  config.job = "evaluate"
  config.init.weights = "model_base_retrieval_coco"
  config.evals.test.source = "data/flickr30k_test.json"
  config.evals.test.image_root = "data/flickr30k"
  config.evals.test.k_test = 128
  return config
