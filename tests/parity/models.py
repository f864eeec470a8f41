"""Cases of whole models without a twin, and of Hugging Face's, which have [CLS]
where training had [ENC].
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.evaluators import ranking
from blip_jax.evaluators.scores import recall
from blip_jax.inference import scoring
from blip_jax.runtime import sharding
from blip_jax.tasks import align, losses
from blip_jax.tasks import caption as caption_lib
from blip_jax.tasks import nlvr as nlvr_lib
from blip_jax.tasks import vqa as vqa_lib
from tests.parity import generated, replay, verdicts
from tests.parity.goldens import Golden

# The original's, for texts of which the goldens did not keep the ids.
CAPTION_LENGTH = 40
TEXT_LENGTH = 35


def blip_base(golden: Golden) -> None:
  opened = replay.open_case(golden)
  image = golden.image("image")
  for i, text in enumerate(golden.fact("captions")):
    inputs = image[i : i + 1], *golden.tokens(f"caption{i}", [text])
    found = _features(opened.model, opened.params, *inputs)
    golden.compare(
      {f"{name}{i}": x for name, x in found.items()}, replay.MODULE
    )


@replay.jit_of_model
def _features(model, params, image, ids, mask):
  call = replay.bound(model, params)
  embeds = call("encode_image", image)
  return {
    "image_embeds": embeds,
    "text": call("encode_text", ids, mask),
    "multimodal": call("fuse", ids, mask, call("image_kv", embeds)),
  }


def blip_itm(golden: Golden) -> None:
  opened = replay.open_case(golden)
  text = golden.tokens("caption", golden.fact("captions"))
  for suffix in ("", "_one"):
    if f"image{suffix}" in golden:
      image = golden.image(f"image{suffix}")
      found = match(opened.model, opened.params, image, *text)
      ours = {f"{name}{suffix}": found[name] for name in ("itm", "itc")}
      golden.compare(ours, replay.MODEL)


@replay.jit_of_model
def match(model, params, image, ids, mask):
  """Both scores of the original's demo, and what they are made of."""
  call = replay.bound(model, params)
  image_embeds, image_feat = call("image_features", image)
  kv = call("image_kv", image_embeds)
  return {
    "itm": call("match", ids, mask, kv, legacy_cls=True),
    "itc": image_feat @ call("text_feat", ids, mask).T,
    "fused": call("fuse", ids, mask, kv, legacy_cls=True),
    "text": call("encode_text", ids, mask),
  }


def retrieval_eval(golden: Golden) -> None:
  """Short lists by cosine, scores by ITM, and the recall of them."""
  opened, mesh = replay.open_case(golden), sharding.one_device()
  texts = scoring.Texts(*golden.tokens("caption", golden.fact("captions")))
  scorer = scoring.Scorer(align.predict_fns(opened.model), mesh)
  image = jnp.asarray(golden.image("image"))
  embeds, image_feat = scorer.image_features(opened.params, image)
  text_feat = scorer.text_feat(opened.params, *map(jnp.asarray, texts))
  sim = np.asarray(image_feat @ text_feat.T)
  lists = ranking.ShortLists.nearest(sim, golden.config["k_test"])
  candidates = [np.flatnonzero(row) for row in lists.pairs]
  scores = sim.copy()
  logits = scorer.itm_logits(opened.params, embeds, texts, candidates)
  for row, own, logit in zip(scores, candidates, logits, strict=True):
    row[own] += logit[:, 1]
  i2t, t2i = lists.ranked(scores)
  golden.compare(
    {"score_i2t": i2t, "score_t2i": t2i},
    replay.MODEL,
    scale=lambda x: np.abs(x[x > ranking.NOT_LISTED]).max(),
  )
  image_of = {
    text: int(image)
    for image, texts_of in golden.fact("img2txt").items()
    for text in texts_of
  }
  _compare_recall(golden, "metrics", i2t, t2i, image_of)
  if "rand_i2t" in golden:
    i2t, t2i = golden.input("rand_i2t"), golden.input("rand_t2i")
    image_of = {text: text // 2 for text in range(len(t2i))}
    _compare_recall(golden, "rand_metrics", i2t, t2i, image_of)


def _compare_recall(golden, name, i2t, t2i, image_of) -> None:
  # By the original's places: its argsort decides between equals, which we let
  # count by chance.
  places = (np.argsort(np.argsort(x)).astype(np.float32) for x in (i2t, t2i))
  text_to_image = np.array([image_of[text] for text in range(len(t2i))])
  ours = recall.recall(*places, text_to_image)
  theirs = golden.fact(name)
  errors = {
    key: verdicts.difference(ours.get(key, np.nan), theirs.get(key, np.nan))
    for key in ours.keys() | theirs.keys()
  }
  golden.judge(f"fact {name}", errors, replay.FLOAT64)


def blip_decoder(golden: Golden) -> None:
  opened = replay.open_case(golden)
  prompt, texts = golden.config["prompt"], golden.fact("captions")
  tokenizer = opened.checkpoint.tokenizer
  golden.compare_fact("prompt_length", len(tokenizer.prompt_ids(prompt)))
  ids, mask = golden.tokens("caption", texts)
  image = golden.image("image")
  batch = {"image": image, "input_ids": ids, "attention_mask": mask}
  head = "text_decoder/lm_head"
  task = caption_lib.Caption(opened.model, golden.fact("prompt_length"))
  seen = replay.compare_loss(
    golden, opened, task, batch, "visual_encoder", head
  )
  logits, embeds = seen[head][0], seen["visual_encoder"][0]
  golden.compare({"logits": logits, "image_embeds": embeds}, replay.MODEL)
  started = ids.copy()
  started[:, 0] = opened.model.config.med.tokens.dec
  golden.compare({"decoder_input_ids": started}, replay.EXACT)
  if "labels" in golden:
    lm = logits, jnp.asarray(golden.input("labels")), task.label_smoothing
    golden.compare(
      {"loss": losses.lm_loss(*lm)}, replay.MODEL, "loss of labels"
    )
  if "loss.prompt2" in golden:
    other = golden.fact("gen.prompt2.prompt")
    length = len(tokenizer.prompt_ids(other))
    golden.compare_fact("gen.prompt2.prompt_length", length)
    texts = [other + text.removeprefix(prompt) for text in texts]
    loss = caption_loss(opened, image, texts, length)
    golden.compare({"loss.prompt2": loss}, replay.MODEL)
  if "gen_image" in golden:
    facts = golden.matches(r"(gen\..+)\.beam3\.sequences")
    prompts = {m[1]: golden.fact(f"{m[1]}.prompt") for m in facts}
    if "gen.noprompt" in prompts:
      length = len(tokenizer.prompt_ids(prompts["gen.noprompt"]))
      golden.compare_fact("gen.noprompt.prompt_length", length)
    states = functools.partial(encode_image, opened.model, opened.params)
    written = generated.compare_written(
      golden, opened, states, golden.image("gen_image"), {"": prompt, **prompts}
    )
    sep = opened.model.config.med.tokens.sep
    # Of those that it names.
    names = [name for name, _ in golden.fact("eos_positions", [])]
    ends = [[x, _first(written[f"gen.{x}"] == sep)] for x in names]
    golden.compare_fact("eos_positions", ends)


def _first(found: np.ndarray) -> list[int]:
  """Where the first is in each row; -1 if there is none."""
  return np.where(found.any(1), found.argmax(1), -1).tolist()


@replay.jit_of_model
def encode_image(model, params, image):
  return replay.bound(model, params)("encode_image", image)


def caption_loss(opened: replay.Opened, image, texts, prompt_length: int):
  length = min(CAPTION_LENGTH, opened.model.config.med.max_positions)
  ids, mask = opened.checkpoint.tokenizer.encode(texts, length)
  batch = {"image": image, "input_ids": ids, "attention_mask": mask}
  task = caption_lib.Caption(opened.model, prompt_length)
  return replay.jit(replay.loss_fn(task))(opened.params, batch)[0]


def blip_vqa(golden: Golden) -> None:
  opened = replay.open_case(golden)
  question = golden.tokens("question", golden.fact("questions"))
  answer = golden.tokens("answer", golden.fact("answers"))
  head = "text_decoder/lm_head"
  seen = replay.compare_loss(
    golden,
    opened,
    vqa_lib.Vqa(opened.model),
    {
      "image": golden.image("image"),
      **answers(question, answer, golden.fact("n"), golden.input("weights")),
    },
    head,
  )
  golden.compare({"answer_logits": seen[head][0]}, replay.MODEL)
  # Without the mask of the questions, which theirs does not use here.
  if "generate.sequences" in golden:
    states = lambda image: read(opened.model, opened.params, image, *question)
    generated.compare_written(
      golden, opened, states, golden.image("image"), {"": ""}
    )


@replay.jit_of_model
def read(model, params, image, ids, mask):
  """States of questions that have looked at their images."""
  call = replay.bound(model, params)
  kv = call("image_kv", call("encode_image", image))
  return call("fuse", ids, mask, kv)


def answers(question, answer, numbers, weight) -> dict[str, np.ndarray]:
  """Some answers to each question, as the task takes them."""
  return {
    "question_ids": question[0],
    "question_mask": question[1],
    "answer_ids": answer[0],
    "answer_mask": answer[1],
    "answer_weight": weight,
    "answer_question": np.repeat(np.arange(len(numbers)), numbers),
  }


def blip_nlvr(golden: Golden) -> None:
  opened = replay.open_case(golden)
  ids, mask = golden.tokens("text", golden.fact("texts"))
  first, second = np.split(golden.image("image"), 2)
  batch = {
    "image_0": first,
    "image_1": second,
    "input_ids": ids,
    "attention_mask": mask,
    "label": golden.input("targets"),
  }
  task, layer = nlvr_lib.Nlvr(opened.model), "text_encoder/layer_0"
  paths = {
    "prediction": "cls_head",
    "layer0_crossattn": f"{layer}/crossattention",
  }
  seen = replay.compare_loss(golden, opened, task, batch, *paths.values())
  golden.compare(
    {name: seen[path][0] for name, path in paths.items()}, replay.MODEL
  )


def hf_caption(golden: Golden) -> None:
  opened = replay.Opened.of(golden.open(*golden.checkpoints))
  names = "input_ids", "attention_mask"
  inputs = golden.image("pixel_values"), *map(golden.input, names)
  found = _hf_decode(opened.model, opened.params, *inputs)
  golden.compare(found, replay.MODEL)
  golden.compare({"loss": _hf_loss(golden, found["logits"])}, replay.MODEL)
  if "gen_pixel_values" in golden:
    _hf_written(golden, opened)


def _hf_written(golden: Golden, opened: replay.Opened) -> None:
  """With and without a prompt, whose [CLS] and [SEP] theirs leaves out."""
  image = golden.image("gen_pixel_values")
  states = encode_image(opened.model, opened.params, image)
  dec = opened.model.config.med.tokens.dec
  prompt = [dec, *golden.input("prompt_ids")[1:-1].tolist()]
  for match in golden.matches(r"gen\.(noprompt_)?.+"):
    settings = generated.settings_of(golden, match[0], generated.HF_DEFAULTS)
    start = [dec] if match[1] else prompt
    found = generated.write(opened, states, start, settings)
    theirs = golden.input(match[0])
    # Theirs fills beams up with [SEP] where [PAD] is 0.
    ends = opened.model.config.med.tokens.sep == theirs
    behind = np.cumsum(ends, axis=1) - ends > 0
    ours = generated.like(found.ids[:, 0], theirs)
    ours = np.where(behind & ends, theirs, ours)
    golden.compare({match[0]: ours}, replay.EXACT)


@replay.jit_of_model
def _hf_decode(model, params, image, ids, mask):
  call = replay.bound(model, params)
  embeds = call("encode_image", image)
  kv = call("decoder_kv", embeds)
  return {"image_embeds": embeds, "logits": call("decode", ids, mask, kv)}


def _hf_loss(golden: Golden, logits: jax.Array) -> jax.Array:
  file = golden.folder.path / golden.checkpoints[0] / "config.json"
  smoothing = json.loads(file.read_text())["text_config"]["label_smoothing"]
  return losses.lm_loss(logits, jnp.asarray(golden.input("labels")), smoothing)


def hf_retrieval(golden: Golden) -> None:
  opened = replay.Opened.of(golden.open(*golden.checkpoints))
  names = "input_ids", "attention_mask"
  inputs = golden.image("pixel_values"), *map(golden.input, names)
  found = match(opened.model, opened.params, *inputs)
  theirs = {
    "itm_score": "itm",
    "itc_score": "itc",
    "question_embeds": "fused",
    "text_embeds": "text",
  }
  golden.compare({name: found[x] for name, x in theirs.items()}, replay.MODEL)


def hf_vqa(golden: Golden) -> None:
  opened = replay.Opened.of(golden.open(*golden.checkpoints))
  names = "input_ids", "attention_mask"
  names = *names, *(f"decoder_{name}" for name in names)
  inputs = golden.image("pixel_values"), *map(golden.input, names)
  found = _hf_answer(opened.model, opened.params, *inputs)
  golden.compare(found, replay.MODEL)
  golden.compare(
    {"loss": _hf_loss(golden, found["answer_logits"])}, replay.MODEL
  )


@replay.jit_of_model
def _hf_answer(model, params, image, ids, mask, answer_ids, answer_mask):
  call = replay.bound(model, params)
  embeds = call("encode_image", image)
  kv = call("image_kv", embeds)
  question = call("fuse", ids, mask, kv, legacy_cls=True)
  # No `encoder_mask`: transformers 5 loses it on the way to its layers.
  kv = call("decoder_kv", question)
  return {
    "image_embeds": embeds,
    "question_embeds": question,
    "answer_logits": call("decode", answer_ids, answer_mask, kv),
  }
