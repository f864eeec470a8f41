"""Every key of a pre-training config, with BLIP's own value where it has one.

A recipe in `configs/` starts from here and says what it changes.  The dict is
locked, so that a misspelt key is an error and not a silent default.
"""

from ml_collections import ConfigDict, config_dict

JOBS = ("train", "evaluate")
SCOPES = ("global", "local")


def pretrain() -> ConfigDict:
  """Defaults of pre-training (section 4.1 of the paper, and its code)."""
  return ConfigDict(
    dict(
      job="train",  # train | evaluate
      task="pretrain",
      seed=42,
      batch_size=600,  # of all devices together
      num_steps=0,  # every recipe says how long it trains
      log_every_steps=50,
      # Which rows may be ITC candidates and ITM negatives: those of the whole
      # batch, or those of the same data shard, as in the original.
      scope="global",
      # A directory with vocab.txt, a hub id, or "scenes".
      tokenizer="bert-base-uncased",
      # -1: all devices that the other two leave.
      mesh=dict(data=-1, fsdp=1, tensor=1),
      model=dict(
        variant="base",  # tiny | base | large
        image_size=224,
        patch_size=config_dict.placeholder(int),  # unset: the variant's
        drop_path=config_dict.placeholder(float),  # unset: the variant's
        dropout=0.1,  # of the text towers
        dtype="bfloat16",  # of activations; all state is float32
        vit_remat="none",  # none | dots | full
        text_remat="none",
      ),
      pretrain=dict(
        queue_size=57600,
        momentum=0.995,
        alpha=0.4,
        alpha_ramp_epochs=2.0,  # of optim.steps_per_epoch
        label_smoothing=0.1,
        loss_weights=(1.0, 1.0, 1.0),  # ITC, ITM, LM
      ),
      data=dict(
        train=("",),  # sources; see README, "Data"
        image_root="",
        weights=(),  # of the sources; empty: all rows alike
        rotate="",  # a pattern of sources of which each epoch uses one
        augment=True,  # random crop and flip, and RandAugment
        min_scale=0.2,  # of the crop, as a share of the picture
        max_words=30,
        max_length=30,  # tokens, [CLS] and [SEP] included
        num_threads=8,
        num_workers=0,  # processes beside them
        max_bad_fraction=0.05,  # of samples that cannot be read
      ),
      optim=dict(
        schedule="step",  # step | cosine_epoch | cosine
        lr=3e-4,
        min_lr=1e-6,
        warmup_lr=1e-6,
        warmup_steps=3000,
        decay_rate=0.9,  # per epoch
        steps_per_epoch=0,
        weight_decay=0.05,  # of every parameter
        betas=(0.9, 0.999),
        clip=0.0,  # of the global gradient norm; 0: off, as in the original
      ),
      checkpoint=dict(every_steps=1000, keep=2, keep_every_steps=0),
      init=dict(
        restore="",  # a workdir whose whole state to start from
        weights="",  # parameters to start from; what blip_jax.load takes
        allow_missing=(),  # patterns of parameters that stay fresh
        allow_unexpected=(),  # patterns of parameters that are dropped
      ),
      evals=dict(
        every_steps=0,  # 0: only at the end
        batch_size=100,
        # Held-out splits by name; an empty source is left out.
        val=held_out(""),
      ),
    )
  )


def held_out(source: str) -> ConfigDict:
  """A split to evaluate on, under the name that it has in `config.evals`."""
  return ConfigDict(
    dict(
      source=source,
      image_root="",
      samples=0,  # pictures on the contact sheet, for one split only
    )
  )


def use_paper_sources(config: ConfigDict) -> None:
  """The sets of section 4.1 but LAION, as JSON lists of {image, caption}."""
  config.data.train = (
    "data/coco_karpathy_train.json",
    "data/vg_caption.json",
    "data/sbu.json",
    "data/cc3m.json",
    "data/cc12m.json",
  )
  config.data.image_root = "data/images"
  config.data.num_workers = 8
  config.evals.val.source = "data/coco_karpathy_val.json"
  config.evals.val.image_root = "data/images"


def validate(config: ConfigDict) -> None:
  """Refuses what could not run, before anything is read or allocated.

  Raises:
    ValueError: names the key, what it may be, and what was found.
  """
  _one_of("config.job", config.job, JOBS)
  _one_of("config.task", config.task, ("pretrain",))
  _one_of("config.scope", config.scope, SCOPES)
  _one_of("config.model.dtype", config.model.dtype, ("float32", "bfloat16"))
  _positive(
    config,
    "batch_size",
    "log_every_steps",
    "checkpoint.every_steps",
    "evals.batch_size",
    "data.max_words",
    "pretrain.queue_size",
  )
  if config.job == "train":
    _positive(config, "num_steps", "optim.steps_per_epoch")
    if not any(config.data.train) and not config.data.rotate:
      raise ValueError(
        "config.data.train: no source to train on; for example "
        "--config.data.train=captions.json --config.data.image_root=images"
      )


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f"{key}: expected one of {choices}, found {value!r}")


def _positive(config: ConfigDict, *keys: str) -> None:
  for key in keys:
    value = config
    for part in key.split("."):
      value = value[part]
    if value < 1:
      raise ValueError(f"config.{key}: expected at least 1, found {value}")
