"""Pre-training on your own images, by flags alone.

  python -m blip_jax.main --config configs/pretrain_custom.py --workdir W \
    --config.data.train=train.json --config.data.image_root=images \
    --config.evals.val.source=val.json --config.evals.val.image_root=images

`train` and `val` are any source that docs/data.md lists.  The defaults
train the tiny model on a laptop; with accelerators set
`--config.model.variant=base --config.model.image_size=224` and a larger batch.
From scratch BLIP needs millions of pairs. With few, expect retrieval above
chance and captions that name common things.  On some thousand images the
hardest negatives can be too hard for ITM to learn from (the log says so).  Then
begin without ITC, which leaves them random:

  --config.pretrain.loss_weights="(0.0,2.0,1.0)" --config.pretrain.alpha=0.0

The tokenizer is BERT's, from the hub; `--config.tokenizer=DIRECTORY` reads your
own `vocab.txt`, in any language that WordPiece suits.
"""

from blip_jax.tasks import pretrain


def get_config():
  config = pretrain.defaults()
  config.batch_size = 32
  config.num_steps = 1000
  config.log_every_steps = 20

  config.model.variant = "tiny"
  config.model.image_size = 64
  config.model.dtype = "float32"
  config.model.dropout = 0.0

  # A long queue spoils a short run: while the towers still change quickly, the
  # age of a feature is easier to learn than the content of the image, and ITC
  # falls without learning anything.  Runs of thousands of steps should use the
  # paper's 57600 and 0.995.
  config.pretrain.queue_size = 1
  config.pretrain.ema_decay = 0.9
  config.pretrain.alpha_ramp_epochs = 4.0
  # ITC has to tell images apart before ITM and LM can use them.
  config.pretrain.loss_weights = (4.0, 1.0, 1.0)

  # The paper's 0.2 leaves little of a small image.
  config.data.min_scale = 0.5
  config.data.max_words = 18
  config.data.max_length = 20

  config.optim.schedule = "cosine"
  config.optim.lr = 1e-3
  config.optim.min_lr = 1e-5
  config.optim.warmup_lr = 0.0
  config.optim.warmup_steps = 50
  config.optim.steps_per_epoch = 250
  config.optim.betas = (0.9, 0.98)

  config.checkpoint.every_steps = 500
  config.evals.every_steps = 500
  config.evals.val.samples = 24
  return config
