/* A captioner: the exported model next to this page, run by ONNX Runtime. */

import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { resize } from "./resize.js";
import { Vocabulary } from "./words.js";

const MAX_MEGABYTES = 64;
const MAX_MEGAPIXELS = 80;

// In a worker, so that the page stays alive.
ort.env.wasm.proxy = true;

export class Captioner {
  /** Reads the model. Throws an Error with a message for people. */
  static async load(folder = "model") {
    const [facts, words, model] = await Promise.all([
      read(`${folder}/caption.json`).then((response) => response.json()),
      read(`${folder}/vocab.txt`).then((response) => response.text()),
      read(`${folder}/caption.onnx`).then((response) => response.arrayBuffer()),
    ]);
    const session = await ort.InferenceSession.create(new Uint8Array(model), {
      executionProviders: ["wasm"],
      logSeverityLevel: 3, // it warns of each constant that is not used
    }).catch((error) => {
      throw new Error(`This browser cannot run the model: ${error.message}`);
    });
    return new Captioner(session, facts, new Vocabulary(words, facts.prompt_ids));
  }

  constructor(session, facts, vocabulary) {
    this.session = session;
    this.shape = facts.inputs.pixels.shape; // [1, height, width, 3]
    this.vocabulary = vocabulary;
  }

  /**
   * @param {Blob} file an image.
   * @returns {Promise<{text: string, probability: number}[]>} captions, best
   *   first.
   */
  async caption(file) {
    const pixels = await this.pixels(file);
    const outputs = await this.session.run({
      pixels: new ort.Tensor("uint8", pixels, this.shape),
    });
    const [, count, length] = outputs.ids.dims;
    const ids = Array.from(outputs.ids.data, Number);
    const logProbs = outputs.token_log_probs.data;
    return Array.from({ length: count }, (_, i) => {
      const [start, end] = [i * length, (i + 1) * length];
      const logProb = logProbs.slice(start, end).reduce((sum, x) => sum + x, 0);
      const text = this.vocabulary.decode(ids.slice(start, end));
      return { text, probability: Math.exp(logProb) };
    });
  }

  /** What the model sees of an image: uint8 RGB of its size. */
  async pixels(file) {
    const [, newHeight, newWidth] = this.shape;
    const image = await open(file);
    const { width, height } = image;
    try {
      return resize(reader(image), width, height, newWidth, newHeight);
    } finally {
      image.close();
    }
  }
}

async function read(path) {
  const response = await fetch(path).catch(() => ({ ok: false }));
  if (!response.ok) {
    throw new Error(`The model is missing: no ${path} next to this page.`);
  }
  return response;
}

async function open(file) {
  const name = file.name || "This";
  if (file.size > MAX_MEGABYTES * 2 ** 20) {
    throw new Error(
      `${name} is too large: ${Math.ceil(file.size / 2 ** 20)} MB, at most ` +
        `${MAX_MEGABYTES} MB.`,
    );
  }
  // Without colour profiles: models were trained on what is stored.
  const image = await createImageBitmap(file, {
    colorSpaceConversion: "none",
    premultiplyAlpha: "none",
  }).catch(() => {
    throw new Error(
      `${name} is not an image that this browser can read: expected JPEG, ` +
        "PNG, WebP, AVIF, GIF or BMP.",
    );
  });
  const { width, height } = image;
  if (width * height > MAX_MEGAPIXELS * 1e6) {
    image.close();
    throw new Error(
      `${name} is too large: ${width} x ${height} pixels, at most ` +
        `${MAX_MEGAPIXELS} million.`,
    );
  }
  return image;
}

/** A function that reads rows of an image as RGBA. */
function reader(image) {
  return (top, count) => {
    const canvas = new OffscreenCanvas(image.width, count);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, -top);
    return context.getImageData(0, 0, image.width, count).data;
  };
}
