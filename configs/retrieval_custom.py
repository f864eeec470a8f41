"""Retrieval on your own images, by flags alone.

  python -m blip_jax.main --config configs/retrieval_custom.py --workdir W \
    --config.data.train=train.json --config.data.image_root=images \
    --config.evals.val.source=val.json --config.evals.val.image_root=images

`train` and `val` are any source that docs/data.md lists; an image may have
several captions, in one row or in several with the same image or `image_id`.
Starts from the released model for COCO; `--config.init.weights=WORKDIR` takes
one of your own, and `--config.init.weights=` starts from scratch.

Made for one GPU (not measured on one): BLIP's base model at 384 pixels, 16
pairs a step.  With less memory set `--config.model.vit_remat=full`; on a CPU
take the tiny model after your own pre-training.  The best parameters by
`r_mean` on `val` are in WORKDIR/best.
"""

from blip_jax.tasks import retrieval


def get_config():
  config = retrieval.defaults()
  config.batch_size = 16
  config.log_every_steps = 20
  config.init.weights = "model_base_retrieval_coco"
  config.optim.lr = 1e-5

  # A queue longer than the data would hold each image more than once.
  config.retrieval.queue_size = 4096

  config.checkpoint.every_steps = 500
  config.evals.every_steps = 500
  config.evals.batch_size = 32
  config.evals.val.k_test = config.evals.test.k_test = 64
  config.evals.val.samples = 24
  return config
