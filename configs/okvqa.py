"""OK-VQA: questions that need knowledge, from a model for VQA v2.

  python -m blip_jax.main --config configs/okvqa.py --workdir W

Data: the official files of OK-VQA, which are in the format of VQA, and COCO's
images.  Answers are generated; OK-VQA has no list of them, and
`--config.vqa.inference=rank --config.vqa.answer_list=FILE` ranks your own.  Not
run here; the rates are ours, not the paper's, which has no such experiment.
"""

from blip_jax import defaults
from blip_jax.tasks import vqa


def get_config():
  config = vqa.continued()
  config.data.train = (defaults.vqa_questions("", "train2014"),)
  config.data.image_root = "data/images"
  config.evals.val.source = defaults.vqa_questions("", "val2014")
  config.evals.val.image_root = "data/images"
  return config
