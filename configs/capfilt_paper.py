"""CapFilt with the paper's settings (sections 3.3 and 4.2).

  python -m blip_jax.main --config configs/capfilt_paper.py \
    --config.source='cc12m/{00000..01242}.tar' --config.out=cleaned/cc12m

One synthetic caption per image, by nucleus sampling with p = 0.9; texts with a
matching probability of at least 0.5 are kept.  Captioner and filter are
fine-tuned on COCO separately, at 384 pixels.  The human captions of COCO and
Visual Genome are added unfiltered.

The paper does not give the length or the prompt of captions.  Here they are
those of its captioning: 5 to 20 tokens after "a picture of ".
"""

from blip_jax import defaults


def get_config():
  config = defaults.capfilt()
  config.captioner = "model_base_caption_capfilt_large"
  config.filter = "model_base_retrieval_coco"
  config.prompt = "a picture of "
  config.generation.min_length = 5
  config.generation.max_length = 20
  config.merge.human = ("data/coco_karpathy_train.json", "data/vg_caption.json")
  config.merge.by_source = True
  return config
