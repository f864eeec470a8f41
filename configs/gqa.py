"""GQA: compositional questions, from a pre-trained model.

  python -m blip_jax.main --config configs/gqa.py --workdir W

Data: the official `{train,val,testdev}_balanced_questions.json` and the images
of GQA in `data/gqa/images`.  A question has one answer, and accuracy is the
share of right ones.  `test_answers.json`, of testdev, is what GQA's program
reads.  Answers are generated.  Not run here; the rates are those of VQA v2, not
the paper's, which has no such experiment.
"""

from blip_jax.tasks import vqa


def get_config():
  config = vqa.defaults()
  config.batch_size = 256
  config.num_epochs = 5.0
  config.init.weights = "model_base_capfilt_large"

  config.model.variant = "base"
  config.model.image_size = 480

  config.data.train = ("data/gqa/train_balanced_questions.json",)
  config.data.image_root = "data/gqa/images"
  config.data.num_workers = 8
  config.vqa.max_answers = 1
  config.vqa.inference = "generate"
  for name, questions in (("val", "val"), ("test", "testdev")):
    split = config.evals[name]
    split.source = f"data/gqa/{questions}_balanced_questions.json"
    split.image_root = "data/gqa/images"
    split.format = "gqa"
  return config
