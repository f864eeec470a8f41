"""What `blip_jax.load` returns: a model with its weights and its vocabulary."""

import functools

from blip_jax.inference.abilities import (
  answer,
  caption,
  choose,
  compare,
  embed,
  match,
)


class Model(
  caption.CaptionMethods,
  answer.AnswerMethods,
  compare.CompareMethods,
  choose.ChooseMethods,
  match.MatchMethods,
  embed.EmbedMethods,
):
  """A pre-trained model, ready for inference; `blip_jax.load` returns one.

  Which methods work depends on the model's family (`model.card.family`):

    caption         `caption`: generates captions of images
    itm, retrieval  `match`: scores image-text pairs; `embed_images` and
                    `embed_texts`: unit vectors in a space shared by both;
                    `explain`: which patches a match rests on
    pretrain        all of these
    vqa             `answer`: answers questions about images
    nlvr            `compare`: whether statements about two images are true
    dialog          `choose`: ranks answers in a dialog about an image
    any             `features`: hidden states, where the family has the encoder

  A method that the family lacks raises `ValueError`. Images are given as paths,
  encoded bytes, uint8 arrays or PIL images; resizing and normalisation are done
  here. Methods that take `num_frames` take videos, too.

    model = blip_jax.load("Salesforce/blip-image-captioning-base")
    print(model.caption("dog.jpg")[0].text)

    model = blip_jax.load("Salesforce/blip-itm-base-coco")
    match = model.match(["dog.jpg", "cat.jpg"], ["a dog", "a cat"])
    print(match.itm_prob)  # [2, 2]: a row for each image

  Attributes:
    card: the model's family, sizes, dtype, prompt and generation defaults.
    module: the Flax module; `apply` calls its methods.
    params: the parameters, on the mesh.
    tokenizer: None if no vocabulary was found (`load` warns then).
    mesh: the devices that hold the parameters.
  """

  def lacks(self, ability: str) -> str | None:
    """Says why the model cannot do something; None if it can.

    Args:
      ability: "caption", "answer", "compare", "match" or "embed".
    """
    checks = {
      "caption": self.captioner,
      "answer": self.answerer,
      "compare": self.comparer,
      "match": functools.partial(self._require, "itm_head", "match texts"),
      "embed": functools.partial(self._require, "vision_proj", "search images"),
    }
    try:
      checks[ability]()
    except ValueError as error:
      return str(error)
    return None
