"""Default configs, key by key, against the original's numbers.

A number from the original's YAML files or code is marked so; the others are
this package's own, and docs/ or the key's comment says what they mean.
"""

import pytest

from blip_jax import defaults
from blip_jax.tasks import caption, pretrain, retrieval


def flat(config, prefix=""):
  """A config as {"optim.lr": 3e-4, ...}; unset keys are None."""
  values = {}
  for key, value in config.items():
    if hasattr(value, "items"):
      values |= flat(value, f"{prefix}{key}.")
    else:
      values[prefix + key] = value
  return values


UNSET = None
ONE_AXIS = {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": 1}

TRAINING = {
  "job": "train",
  "compilation_cache": True,
  "task": "mine",
  "seed": 42,  # original: --seed
  "batch_size": 600,  # pretrain.yaml: 75 on each of 8 GPUs
  "grad_accum_steps": 1,
  "num_steps": 0,
  "num_epochs": 0.0,
  "log_every_steps": 50,  # original: print_freq
  "profile": (),
  "scope": "global",
  "tokenizer": UNSET,
  **ONE_AXIS,
  "model.variant": UNSET,
  "model.image_size": UNSET,
  "model.patch_size": UNSET,
  "model.drop_path": UNSET,
  "model.dropout": 0.1,  # bert_config.json
  "model.dtype": "bfloat16",
  "model.attention": "",
  "model.vit_remat": "dots",  # pretrain.yaml: vit_grad_ckpt False
  "model.text_remat": "dots",
  "data.train": ("",),
  "data.image_root": "",
  "data.weights": (),
  "data.rotate": "",
  "data.augment": True,
  "data.min_scale": 0.2,  # original: create_dataset for pre-training
  "data.max_words": 30,  # original: pre_caption
  "data.max_length": 30,  # original: the tokenizer's max_length
  "data.num_threads": 8,
  "data.num_workers": 0,
  "data.max_bad_fraction": 0.05,
  # pretrain.yaml, and PyTorch's AdamW.
  "optim.schedule": "step",
  "optim.lr": 3e-4,
  "optim.min_lr": 1e-6,
  "optim.warmup_lr": 1e-6,
  "optim.warmup_steps": 3000,
  "optim.decay_rate": 0.9,
  "optim.steps_per_epoch": 0,
  "optim.weight_decay": 0.05,
  "optim.betas": (0.9, 0.999),
  "optim.clip": 0.0,
  "tracker": "",
  "optim.moment_dtype": "float32",
  "checkpoint.every_steps": 1000,
  "checkpoint.every_seconds": 45.0,
  "checkpoint.max_unsaved_steps": 2000,
  "checkpoint.keep": 2,
  "checkpoint.keep_every_steps": 0,
  "init.restore": "",
  "init.weights": "",
  "init.momentum_state": False,
  "init.allow_missing": (),
  "init.allow_unexpected": (),
  "evals.every_steps": 0,
  "evals.batch_size": 100,
  "evals.checkpoint": "latest",
  "evals.best": (),
}
# Both of retrieval_coco.yaml and caption_coco.yaml.
FINE_TUNING = {
  "batch_size": 256,  # 32 on each of 8 GPUs
  "data.min_scale": 0.5,
  "optim.schedule": "cosine_epoch",
  "optim.lr": 1e-5,
  "optim.min_lr": 0.0,
}
SPLIT = {"source": "", "image_root": "", "samples": 0}
RANKED = {**SPLIT, "k_test": 0, "num_frames": 0}
CAPTIONED = {**SPLIT, "references": "", "num_frames": 0}


def under(prefix, values):
  return {f"{prefix}.{key}": value for key, value in values.items()}


def test_training():
  assert flat(defaults.training("mine")) == TRAINING


def test_fine_tuning():
  assert flat(defaults.fine_tuning("mine")) == {**TRAINING, **FINE_TUNING}


def test_pre_training():
  assert flat(pretrain.defaults()) == {
    **TRAINING,
    "task": "pretrain",
    "pretrain.queue_size": 57600,
    "pretrain.ema_decay": 0.995,
    "pretrain.alpha": 0.4,
    "pretrain.alpha_ramp_epochs": 2.0,  # original: (2 * len(data_loader))
    "pretrain.label_smoothing": 0.1,
    "pretrain.loss_weights": (1.0, 1.0, 1.0),
    **under("evals.val", RANKED),
  }


def test_retrieval():
  assert flat(retrieval.defaults()) == {
    **TRAINING,
    **FINE_TUNING,
    "task": "retrieval",
    "num_epochs": 6.0,
    "data.max_length": 35,
    "init.momentum_state": True,
    "retrieval.queue_size": 57600,
    "retrieval.ema_decay": 0.995,
    "retrieval.alpha": 0.4,
    "retrieval.alpha_ramp_epochs": 1.0,
    "retrieval.itc_targets": "idx",
    "retrieval.negatives": "global",  # retrieval_coco.yaml: negative_all_rank
    "evals.batch_size": 64,
    "evals.best": ("val/r_mean",),
    **under("evals.val", RANKED),
    **under("evals.test", RANKED),
  }


# caption_coco.yaml; lengths count the prompt.
DECODING = {
  "num_beams": 3,
  "max_length": 20,
  "min_length": 5,
  "repetition_penalty": 1.0,
  "no_repeat_ngram_size": 0,
  "length_norm": "full",  # as transformers 4.15, which the original used
}


def test_generation():
  assert flat(defaults.generation()) == DECODING


def test_captioning():
  assert flat(caption.defaults()) == {
    **TRAINING,
    **FINE_TUNING,
    "task": "caption",
    "num_epochs": 5.0,
    "data.max_length": 40,
    "caption.prompt": UNSET,
    "caption.label_smoothing": 0.1,
    **under("generation", DECODING),
    "evals.batch_size": 32,
    "evals.best": ("val/CIDEr", "val/Bleu_4"),
    **under("evals.val", CAPTIONED),
    **under("evals.test", CAPTIONED),
  }


MODELS_OWN = {
  "sample": False,
  "num_return_sequences": 1,
  "num_beams": UNSET,
  "max_length": UNSET,
  "min_length": UNSET,
  "max_new_tokens": UNSET,
  "repetition_penalty": UNSET,
  "no_repeat_ngram_size": UNSET,
  "temperature": UNSET,
  "top_k": UNSET,
  "top_p": UNSET,
  "length_norm": UNSET,
}


def test_captions_of_images():
  assert flat(defaults.caption_images()) == {
    "job": "caption",
    "compilation_cache": True,
    "images": "",
    "image_root": "",
    "out": "",
    "model": "Salesforce/blip-image-captioning-base",
    "tokenizer": "",
    "dtype": "",
    "batch_size": 0,
    **ONE_AXIS,
    "num_frames": 0,
    "sidecars": False,
    "num_threads": 8,
    "seed": 0,
    "prompt": UNSET,
    **under("generation", MODELS_OWN),
  }


def test_search():
  assert flat(defaults.search()) == {
    "job": "search",
    "compilation_cache": True,
    "images": "",
    "image_root": "",
    "queries": "",
    "out": "",
    "index": "",
    "model": "model_base_retrieval_coco",
    "tokenizer": "",
    "dtype": "",
    "batch_size": 0,
    **ONE_AXIS,
    "num_threads": 8,
    "num_frames": 0,
    "top": 10,
    "rerank": 64,
    "faiss": "",
  }


def test_capfilt():
  assert flat(defaults.capfilt()) == {
    "job": "capfilt",
    "compilation_cache": True,
    "source": ("",),
    "image_root": "",
    "web_texts": True,
    "out": "",
    "captioner": "model_base_caption_capfilt_large",
    "filter": "model_base_retrieval_coco",
    "tokenizer": "",
    "dtype": "",
    "seed": 0,
    "prompt": UNSET,
    # The paper: nucleus sampling with p = 0.9.
    **under("generation", {**MODELS_OWN, "sample": True, "top_p": 0.9}),
    # A text is kept if its match is at least as probable as its mismatch.
    "threshold": 0.5,
    "per_device_batch_size": 0,
    **ONE_AXIS,
    "num_threads": 8,
    "num_workers": -1,
    "scaled_jpeg": False,
    "work_unit_rows": 1024,
    "engine": "local",
    "lease_seconds": 300.0,
    "array.index": -1,
    "array.count": 0,
    "ray.address": "",
    "ray.accelerator": "",
    "ray.actors": 0,
    "force": False,
    "merge.out": "",
    "merge.jobs": (),
    "merge.human": (),
    "merge.by_source": False,
    "merge.threshold": 0.5,
    "merge.sources": ("web", "synthetic"),
    "merge.min_words": 1,
    "merge.max_words": 0,
    "merge.max_repeats": 0,
    "merge.markup": True,
    "merge.near_duplicates": 1.0,
    "merge.max_per_image": 0,
  }


def test_sampling_is_off_unless_it_is_captioning_for_capfilt():
  defaults.capfilt()
  assert not defaults.caption_images().generation.sample


def test_the_papers_sources_of_pre_training():
  config = pretrain.defaults()
  defaults.use_paper_sources(config)
  assert len(config.data.train) == 5
  assert config.data.image_root == "data/images"
  assert config.data.num_workers == 8
  assert flat(config.evals.val) == {
    **RANKED,
    "source": "data/coco_karpathy_val.json",
    "image_root": "data/images",
  }


@pytest.mark.parametrize(
  "use, name, root, batch_size, steps",
  [
    # 566,747 captions of COCO, 145,000 of Flickr30k; the last, partial batch
    # of an epoch is dropped.
    (defaults.use_coco, "coco_karpathy", "data/images", 256, 2213),
    (defaults.use_coco, "coco_karpathy", "data/images", 128, 4427),
    (defaults.use_flickr, "flickr30k", "data/flickr30k", 256, 566),
    (defaults.use_flickr, "flickr30k", "data/flickr30k", 5000, 29),
  ],
)
def test_epochs_of_the_named_data_sets(use, name, root, batch_size, steps):
  config = retrieval.defaults()
  config.batch_size = batch_size
  use(config)
  assert config.optim.steps_per_epoch == config.evals.every_steps == steps
  assert config.data.train == (f"data/{name}_train.json",)
  assert config.data.image_root == root
  assert config.data.num_workers == 8
  for split, samples in (("val", 24), ("test", 0)):
    assert flat(config.evals[split]) == {
      **RANKED,
      "source": f"data/{name}_{split}.json",
      "image_root": root,
      "samples": samples,
    }
