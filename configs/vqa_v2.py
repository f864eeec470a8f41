"""VQA v2, from a pre-trained model, with the original's numbers.

  python -m blip_jax.main --config configs/vqa_v2.py --workdir W

Section 5.3 of arXiv 2201.12086; `configs/vqa.yaml` of the original: ViT-B at
480 pixels, 256 questions a step (16 GPUs of 16), 10 epochs of the train and val
splits and Visual Genome, whose answers weigh 0.2, cosine from 2e-5 that changes
with the epoch.

Data: the official files of VQA v2 and COCO's images, and `vg_qa.json` and
`answer_list.json` of the original; its `vqa_train.json` and `vqa_val.json` can
take the place of the official files.  `test_answers.json` is what the server
reads.  Expect 78.25 on test-dev (Table 8; salesforce/BLIP issue 59 measured
77.44).  An accuracy on val would be too high, since val is trained on.  Not run
here to the end.
"""

from blip_jax import defaults
from blip_jax.tasks import vqa


def get_config():
  config = vqa.defaults()
  config.batch_size = 256
  config.num_epochs = 10.0
  config.init.weights = "model_base_capfilt_large"

  config.model.variant = "base"
  config.model.image_size = 480

  config.data.train = (
    defaults.vqa_questions("v2_", "train2014"),
    defaults.vqa_questions("v2_", "val2014"),
    "data/vg_qa.json",
  )
  config.data.image_root = "data/images"
  config.data.num_workers = 8
  config.vqa.answer_list = "data/answer_list.json"
  config.evals.test.source = defaults.vqa_questions("v2_", "test2015")
  config.evals.test.image_root = "data/images"
  return config
