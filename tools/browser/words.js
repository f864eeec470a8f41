/* From token ids to text, as the tokenizer of BERT's vocabulary does. */

const SPECIAL = new Set([
  ..."[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] [ENC]".split(" "),
]);
// What follows a word without a space.
const JOINED = /^([.?!,]|n't|'(m|s|ve|re))/;

export class Vocabulary {
  /**
   * @param {string} text vocab.txt: a token on each line.
   * @param {number[]} promptIds the ids that every text begins with.
   */
  constructor(text, promptIds) {
    this.tokens = text.split("\n").map((line) => line.replace("\r", ""));
    const prompt = this.join(promptIds);
    this.start = prompt ? prompt.length + 1 : 0;
  }

  /**
   * @param {number[]} ids of a text with its prompt.
   * @returns {string} the text up to its first [SEP], without the prompt.
   */
  decode(ids) {
    return this.join(ids).slice(this.start);
  }

  join(ids) {
    const end = ids.findIndex((id) => this.tokens[id] === "[SEP]");
    let text = "";
    for (const id of end < 0 ? ids : ids.slice(0, end)) {
      const token = this.tokens[id]; // [DEC] and [ENC] may have none
      if (!token || SPECIAL.has(token)) continue;
      if (!text) text = token;
      else if (token.startsWith("##")) text += token.slice(2);
      else text += (JOINED.test(token) ? "" : " ") + token;
    }
    return text.replaceAll(" ' ", "'");
  }
}
