"""Visual question answering on your own images, by flags alone.

  python -m blip_jax.main --config configs/vqa_custom.py --workdir W \
    --config.data.train=train.csv --config.data.image_root=images \
    --config.evals.val.source=val.csv --config.evals.val.image_root=images \
    --config.vqa.answer_list=answers.txt

`train` and `val` are CSV, JSON or JSON lines (docs/vqa.md) with the columns
`image`, `question`, `answer` and, if answers do not count equally, `weight`.
Answers are ranked from the list; without one, set
`--config.vqa.inference=generate`.  Starts from the released model for VQA;
`--config.init.weights=model_base_capfilt_large` takes a pre-trained one, a
workdir one of your own, and `--config.init.weights=` starts from scratch.

Made for one GPU (not measured on one): BLIP's base model at 480 pixels, 16
questions a step.  With less memory set `--config.model.vit_remat=full`.
"""

from blip_jax.tasks import vqa


def get_config():
  config = vqa.defaults()
  config.batch_size = 16
  config.num_epochs = 5.0
  config.log_every_steps = 20
  config.init.weights = "model_base_vqa_capfilt_large"

  config.checkpoint.every_steps = 500
  config.evals.every_steps = 500
  return config
