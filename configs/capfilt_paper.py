"""CapFilt with the paper's settings (sections 3.3 and 4.2).

  python -m blip_jax.main --config configs/capfilt_paper.py \
    --config.source='cc12m/{00000..01242}.tar' --config.out=cleaned/cc12m

One synthetic caption a picture by nucleus sampling with p = 0.9, and texts
that the filter gives at least 0.5; captioner and filter are fine-tuned on COCO
apart from each other, and look at 384 pixels.  Of people's captions, which
join unfiltered, are COCO and Visual Genome.

The paper does not say how long captions may be, nor in which words they begin:
as in its captioning, 5 to 20 tokens behind "a picture of ".
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
