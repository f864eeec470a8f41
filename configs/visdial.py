"""VisDial v1.0, from a pre-trained model, with the paper's numbers.

  python -m blip_jax.main --config configs/visdial.py --workdir W

Section 5.5 of arXiv 2201.12086; the original never released its code or its
weights.  From the paper: ViT-B at 384 pixels, 20 epochs with cosine from 2e-5,
240 a step, one text encoder for the caption and for the dialog, whose
cross-attention sees image tokens and caption states as one sequence, a 2-way
head with cross-entropy, and candidates ranked by it.

The paper leaves open, and this recipe chooses (docs/visual_dialog.md):
  what one of the 240 is: a dialog with one of its rounds, sampled anew in every
    epoch (`dialog.rounds`)
  the number of wrong candidates: 3 for the right one, sampled from the round's
    100 (`dialog.negatives`)
  how texts are joined: history, question, candidate, with [SEP] after each
  the length of texts: 192 tokens (`data.max_length`), 40 of the caption
    (`dialog.context_length`); the newest history is kept, oldest rounds are
    left out, and a candidate is never cut
  the weights to start from: those that the original's VQA starts from
    (`init.weights`); and drop-path: none

Data: VisDial's official files, the dense annotations next to that of the
validation split, and the images: VisDial's `VisualDialog_val2018` and
`VisualDialog_test2018`, and COCO's `train2014` and `val2014` for training.
`test_ranks.json` is what the evaluation server reads.  The paper reports on val
MRR 69.41, R@1 56.44, R@5 85.90, R@10 93.30, mean rank 2.90.  Not run here to
the end.
"""

from blip_jax.tasks import dialog

# Dialogs of the training set.
_ROWS = 123_287


def get_config():
  config = dialog.defaults()
  config.batch_size = 240
  config.num_epochs = 20.0
  config.init.weights = "model_base_capfilt_large"

  config.model.variant = "base"  # ViT-L is wider than its text tower
  config.model.image_size = 384

  config.optim.steps_per_epoch = _ROWS // config.batch_size
  config.data.train = ("data/visdial_1.0_train.json",)
  config.data.image_root = "data/images"
  config.data.num_workers = 8
  config.evals.every_steps = config.optim.steps_per_epoch
  config.evals.val.source = "data/visdial_1.0_val.json"
  config.evals.test.source = "data/visdial_1.0_test.json"
  for split in (config.evals.val, config.evals.test):
    split.image_root = "data/images"
  return config
