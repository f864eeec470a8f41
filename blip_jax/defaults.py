"""Keys of configs and their defaults, with BLIP's own value where it has one.

Here is what all training tasks share, and the jobs that use a trained model; a
task's own keys are in its file (`blip_jax/tasks`).  A recipe in `configs/`
starts from these and says what it changes.  The config is locked, so that a
misspelt key is an error and not a silent default.
"""

from ml_collections import config_dict

from blip_jax.models import card
from blip_jax.runtime.config import Config


def generation(family: str = "caption") -> Config:
  """How the original decodes captions, or answers. Lengths are in tokens, and
  count the prompt, [DEC] and [SEP]."""
  return Config(
    dict(
      **card.GENERATION[family],
      no_repeat_ngram_size=0,
      length_norm="full",  # full | generated
    )
  )


def caption_images() -> Config:
  """Defaults of captioning images with a trained model."""
  return Config(
    dict(
      job="caption",
      compilation_cache=True,  # keep compiled programs; docs/scale.md
      images="",  # a folder, tar shards, or any other source; docs/data.md
      image_root="",
      out="",  # unset: captions.jsonl in the workdir
      model="Salesforce/blip-image-captioning-base",  # what blip_jax.load takes
      tokenizer="",  # unset: the model's
      dtype="",  # of activations; unset: bfloat16, but float32 on a CPU
      batch_size=0,  # images, of all devices together; 0: as suit them
      mesh=dict(data=-1, fsdp=1, tensor=1),
      num_frames=0,  # taken of each video; 0: these are images
      sidecars=False,  # whether to also write a .txt next to every image
      num_threads=8,
      seed=0,  # of sampled captions
      prompt=config_dict.placeholder(str),  # unset: the model's
      # Unset: the model's defaults; with `sample`, those of the original.
      generation=dict(
        sample=False,  # whether to sample; not with beams
        num_return_sequences=1,  # captions of each image
        num_beams=config_dict.placeholder(int),  # 1: greedy
        max_length=config_dict.placeholder(int),  # tokens, with the prompt
        min_length=config_dict.placeholder(int),  # with the prompt
        max_new_tokens=config_dict.placeholder(int),  # without the prompt
        repetition_penalty=config_dict.placeholder(float),  # 1: none
        no_repeat_ngram_size=config_dict.placeholder(int),  # 0: any may repeat
        temperature=config_dict.placeholder(float),  # divides scores
        top_k=config_dict.placeholder(int),  # likeliest tokens; 0: all
        top_p=config_dict.placeholder(float),  # of probability; 1: all
        length_norm=config_dict.placeholder(str),  # full | generated
      ),
    )
  )


def answer_images() -> Config:
  """Defaults of answering questions about images with a trained model."""
  return Config(
    dict(
      job="answer",
      compilation_cache=True,  # keep compiled programs; docs/scale.md
      # A table of questions, or with `question` any source of images;
      # docs/vqa.md.
      images="",
      image_root="",
      question="",  # about every image; unset: each row has its own
      out="",  # unset: answers.jsonl in the workdir
      model="Salesforce/blip-vqa-base",  # what blip_jax.load takes
      tokenizer="",  # unset: the model's
      dtype="",  # of activations; unset: bfloat16, but float32 on a CPU
      batch_size=0,  # questions, of all devices together; 0: as suit them
      mesh=dict(data=-1, fsdp=1, tensor=1),
      num_threads=8,
      num_frames=0,  # taken of each video; 0: these are images
      # JSON, or a text file with an answer on each line; unset: any text.
      answer_list="",
      num_answers=1,  # of each question
      k_test=128,  # answers, by their first tokens, that are scored in full
      rank_score="blip",  # blip | albef; see `tasks.answers.Ranked.scores`
      abstain_below=0.0,  # the least probability of an answer
    )
  )


def search() -> Config:
  """Defaults of searching a gallery of images."""
  return Config(
    dict(
      job="search",
      compilation_cache=True,  # keep compiled programs; docs/scale.md
      images="",  # a folder, tar shards, or any other source; docs/data.md
      image_root="",
      # A text, an image, or a file of either: one per line, or a JSON list.
      queries="",
      out="",  # unset: search.json in the workdir; a .png goes next to it
      index="",  # folder of the embeddings; unset: in the workdir
      model="model_base_retrieval_coco",  # what blip_jax.load takes
      tokenizer="",  # unset: the model's
      dtype="",  # of activations; unset: bfloat16, but float32 on a CPU
      batch_size=0,  # images, of all devices together; 0: as suit them
      mesh=dict(data=-1, fsdp=1, tensor=1),
      num_threads=8,
      num_frames=0,  # frames of each video; 0: the gallery has images
      top=10,  # results per query
      rerank=64,  # images nearest to a text that ITM re-ranks
      faiss="",  # unset: compare with every image; else a FAISS factory
    )
  )


def demo() -> Config:
  """Defaults of the demo page."""
  return Config(
    dict(
      job="demo",
      compilation_cache=True,  # keep compiled programs; docs/scale.md
      # What blip_jax.load takes; several, so that every tab finds one that can.
      # Unset: the quick start's, which is trained if it is not there.
      model=("",),
      dtype="",  # of activations; unset: bfloat16, but float32 on a CPU
      images="scenes:val?num=100",  # what one can search; docs/data.md
      image_root="",
      index="",  # folder of their embeddings; unset: in the workdir
      host="127.0.0.1",  # 0.0.0.0: whoever reaches this machine
      port=7860,  # 0: any that is free
      max_mb=16,  # of an uploaded image
      queue=32,  # requests that wait; further ones are refused
      mcp=False,  # whether to serve the tabs as tools by MCP, too
    )
  )


def capfilt() -> Config:
  """Defaults of labelling and cleaning a collection (section 3.3)."""
  sampling = caption_images().generation
  sampling.sample = True
  sampling.top_p = 0.9
  return Config(
    dict(
      job="capfilt",  # then merge and report; also status and verify
      compilation_cache=True,  # keep compiled programs; docs/scale.md
      source=("",),  # shards, or any other source; see docs/data.md
      image_root="",
      web_texts=True,  # whether the source has texts
      out="",  # folder of the job; unset: the workdir
      captioner="model_base_caption_capfilt_large",  # "": no captions
      filter="model_base_retrieval_coco",
      tokenizer="",  # unset: the models'
      dtype="",  # of activations; unset: bfloat16, but float32 on a CPU
      seed=0,  # of the sampled captions
      prompt=config_dict.placeholder(str),  # unset: the captioner's
      generation=sampling,
      threshold=0.5,  # of itm_prob, for the column `kept`
      per_device_batch_size=0,  # images; 0: 8 on a CPU, 64 elsewhere
      mesh=dict(data=-1, fsdp=1, tensor=1),  # of the devices of one process
      num_threads=8,  # that read records, and images without workers
      num_workers=-1,  # processes that read images; -1: one per core, 0 on CPU
      scaled_jpeg=False,  # decode large JPEGs at a fraction of their size
      work_unit_rows=1024,  # for sources without shards
      engine="local",  # local | ray | array: who hands out work units
      lease_seconds=300.0,  # local: age at which a lease may be taken over
      array=dict(
        index=-1,  # of this task, from 0 on; -1: the scheduler says it
        count=0,  # of tasks; 0: the scheduler says it
      ),
      ray=dict(
        # Of the cluster, or "local"; unset: RAY_ADDRESS, else the one of this
        # machine, else a new one.
        address="",
        accelerator="",  # gpu | tpu | cpu; unset: GPUs, else TPUs
        actors=0,  # 0: one per GPU, TPU host, or, on CPUs, node
      ),
      force=False,  # whether to replace the results of other settings
      merge=dict(
        out="",  # a .json or .jsonl, or a folder of tar shards
        jobs=(),  # folders of more jobs to merge
        human=(),  # sources of human captions, which are added unfiltered
        by_source=False,  # whether to write each source of texts separately
        threshold=0.5,  # the least itm_prob of a text
        sources=("web", "synthetic"),  # of texts
        min_words=1,  # of a text
        max_words=0,  # of a text; 0: any number
        max_repeats=0,  # of a word in a row, or a pair of words; 0: any
        markup=True,  # whether texts may have remains of a web page
        near_duplicates=1.0,  # 1: equal texts are dropped; 0: none are
        max_per_image=0,  # texts with the highest itm_prob; 0: 1,000
      ),
    )
  )


def fine_tuning(task: str) -> Config:
  """What section 5 has in common: images cropped less, a low rate."""
  config = training(task)
  config.batch_size = 256
  config.data.min_scale = 0.5
  config.optim.schedule = "cosine_epoch"
  config.optim.lr = 1e-5
  config.optim.min_lr = 0.0
  return config


def training(task: str) -> Config:
  """What every task's config has, with pre-training's values."""
  return Config(
    dict(
      job="train",  # train | evaluate
      compilation_cache=True,  # keep compiled programs; docs/scale.md
      task=task,
      seed=42,
      batch_size=600,  # of all devices together
      grad_accum_steps=1,  # micro-batches of a batch; docs/scale.md
      num_steps=0,  # 0: given by num_epochs
      num_epochs=0.0,
      log_every_steps=50,
      tracker="",  # wandb | trackio; beside metrics.jsonl and TensorBoard
      profile=(),  # the first and last step of a trace for XProf; empty: none
      # Which examples are ITC candidates and, in pre-training, ITM negatives,
      # and share the mean of LM: those of the global batch, or those of the
      # same data shard, as in the original.
      scope="global",
      # A directory with vocab.txt, a hub id, or "scenes"; unset: that of the
      # model to start from, else bert-base-uncased.
      tokenizer=config_dict.placeholder(str),
      # -1: all devices that the other two axes leave.
      mesh=dict(data=-1, fsdp=1, tensor=1),
      model=dict(
        # tiny | base | large; unset: that of the model to start from, else
        # base.
        variant=config_dict.placeholder(str),
        # Pixels; unset: those of the model to start from, else 224.
        image_size=config_dict.placeholder(int),
        # Pixels; unset: that of the model to start from, else the variant's.
        patch_size=config_dict.placeholder(int),
        drop_path=config_dict.placeholder(float),  # unset: the variant's
        dropout=0.1,  # of the text towers
        dtype="bfloat16",  # of activations; parameters are float32
        # Of the image tower: xla | cudnn | splash; empty: the fastest.
        attention="",
        vit_remat="dots",  # none | dots | full
        text_remat="dots",
      ),
      data=dict(
        train=("",),  # sources; see docs/data.md
        image_root="",
        weights=(),  # of the sources; empty: all rows have equal weight
        rotate="",  # a pattern of sources; each epoch uses the next one
        augment=True,  # random crop and flip, and RandAugment
        min_scale=0.2,  # of the crop, as a share of the image
        max_words=30,
        max_length=30,  # tokens, [CLS] and [SEP] included
        num_threads=8,
        num_workers=0,  # processes; 0: threads alone
        max_bad_fraction=0.05,  # of samples that cannot be used
      ),
      optim=dict(
        schedule="step",  # step | cosine_epoch | cosine
        lr=3e-4,
        min_lr=1e-6,
        warmup_lr=1e-6,
        warmup_steps=3000,
        decay_rate=0.9,  # per epoch
        steps_per_epoch=0,  # 0: given by the data
        weight_decay=0.05,  # of every parameter
        betas=(0.9, 0.999),
        moment_dtype="float32",  # | bfloat16; of the mean of gradients
        clip=0.0,  # of the global gradient norm; 0: off, as in the original
      ),
      checkpoint=dict(
        every_steps=1000,
        # Also when so much time has passed, which a kill would cost; 0: never.
        every_seconds=45.0,
        keep=2,  # latest checkpoints
        keep_every_steps=0,  # multiples of this are kept for ever; 0: none
        # Steps for which a run goes on when nothing can be written; every_steps
        # if that is more.
        max_unsaved_steps=2000,
      ),
      init=dict(
        restore="",  # a workdir; the run starts from its full state
        weights="",  # parameters to start from; what blip_jax.load takes
        # Whether to take their momentum encoders and queues along.
        momentum_state=False,
        allow_missing=(),  # patterns of parameters that stay fresh
        allow_unexpected=(),  # patterns of parameters that are dropped
      ),
      # Held-out splits by name; one without a source is skipped.
      evals=dict(
        every_steps=0,  # 0: only at the end
        batch_size=100,
        # What job=evaluate takes from the workdir: latest, best, or a step.
        checkpoint="latest",
        # `split/metric`s whose sum, the higher the better, selects
        # WORKDIR/best. Nothing is selected if one of the splits has no source.
        best=(),
      ),
    )
  )


def split(source: str) -> Config:
  """A held-out split, one entry of `config.evals`."""
  return Config(
    dict(
      source=source,
      image_root="",
      samples=0,  # images on the contact sheet, for one split only
    )
  )


def ranked_split(source: str) -> Config:
  """A split that measures retrieval between images and texts."""
  config = split(source)
  # Number of candidates, the nearest by ITC, that ITM re-ranks; 0: none.
  config.k_test = 0
  config.num_frames = 0  # sampled from each video; 0: images
  return config


def captioned_split(source: str) -> Config:
  """A split that measures captions against human ones."""
  config = split(source)
  # An annotation file in COCO's format; "": the captions of the source itself;
  # "none": there are none, and captions are generated but not scored.
  config.references = ""
  config.num_frames = 0  # sampled from each video; 0: images
  return config


def question_split(source: str) -> Config:
  """A split of questions, which are answered."""
  config = split(source)
  # Of the file of answers: vqa | aokvqa | gqa | vizwiz, as each server reads.
  config.format = "vqa"
  config.num_frames = 0  # sampled from each video; 0: images
  return config


def vqa_questions(prefix: str, split: str) -> str:
  """An official file of VQA or OK-VQA; its annotations are next to it.

  Args:
    prefix: "v2_" for VQA v2, "" for OK-VQA.
    split: "train2014", "val2014" or "test2015".
  """
  return f"data/{prefix}OpenEnded_mscoco_{split}_questions.json"


def use_paper_sources(config: Config) -> None:
  """The data sets of section 4.1 except LAION, as JSON lists of {image,
  caption}."""
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


def use_coco(config: Config) -> None:
  """The Karpathy split of COCO, 566,747 captions per epoch."""
  _use_split(config, "coco_karpathy", 566_747, "data/images")


def use_flickr(config: Config) -> None:
  """The Karpathy split of Flickr30k, 145,000 captions per epoch."""
  _use_split(config, "flickr30k", 145_000, "data/flickr30k")


def _use_split(
  config: Config, name: str, captions: int, image_root: str
) -> None:
  config.optim.steps_per_epoch = captions // config.batch_size
  config.data.train = (f"data/{name}_train.json",)
  config.data.image_root = image_root
  config.data.num_workers = 8
  config.evals.every_steps = config.optim.steps_per_epoch
  for split in ("val", "test"):
    config.evals[split].source = f"data/{name}_{split}.json"
    config.evals[split].image_root = image_root
  config.evals.val.samples = 24
