/*
 * PIL's bicubic resizing, bit for bit: antialiased, in fixed point, and rounded
 * after each direction. What a canvas does instead depends on the browser.
 */

const BITS = 22; // of fractions
const STRIP = 64; // rows that are read at once

/**
 * Resizes an image to RGB.
 *
 * @param {(top: number, count: number) => Uint8ClampedArray} rows reads some
 *   rows of the image as RGBA.
 * @param {number} width of the image, as all sizes in pixels.
 * @param {number} height of the image.
 * @param {number} newWidth of the result.
 * @param {number} newHeight of the result.
 * @returns {Uint8Array} pixels [newHeight, newWidth, 3].
 */
export function resize(rows, width, height, newWidth, newHeight) {
  const narrow = new Uint8Array(height * newWidth * 3);
  const columns = kernels(width, newWidth);
  for (let top = 0; top < height; top += STRIP) {
    const count = Math.min(STRIP, height - top);
    const strip = rows(top, count);
    for (let y = 0; y < count; y++) {
      const from = y * width * 4;
      const to = (top + y) * newWidth * 3;
      apply(columns, strip, from, 4, narrow, to, 3);
    }
  }
  if (height === newHeight) return narrow;
  const result = new Uint8Array(newHeight * newWidth * 3);
  const lines = kernels(height, newHeight);
  const step = newWidth * 3;
  for (let x = 0; x < newWidth; x++) {
    apply(lines, narrow, x * 3, step, result, x * 3, step);
  }
  return result;
}

/** For each new pixel, the first old one that counts, and the weights. */
function kernels(size, newSize) {
  if (size === newSize) {
    return Array.from({ length: size }, (_, i) => ({
      first: i,
      weights: [1 << BITS],
    }));
  }
  const scale = size / newSize;
  const stretch = Math.max(scale, 1); // of the filter, against aliasing
  const support = 2 * stretch;
  return Array.from({ length: newSize }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(size, Math.trunc(centre + support + 0.5));
    const weights = [];
    let sum = 0;
    for (let x = first; x < end; x++) {
      const weight = bicubic((x - centre + 0.5) * (1 / stretch));
      weights.push(weight);
      sum += weight;
    }
    const fixed = weights.map((weight) => {
      const value = (weight / sum) * 2 ** BITS;
      return Math.trunc(value < 0 ? value - 0.5 : value + 0.5);
    });
    return { first, weights: fixed };
  });
}

function bicubic(distance) {
  const a = -0.5;
  const x = Math.abs(distance);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/** One line of pixels, in either direction: steps are from pixel to pixel. */
function apply(filters, source, from, step, target, to, newStep) {
  for (let i = 0; i < filters.length; i++) {
    const { first, weights } = filters[i];
    let red = 1 << (BITS - 1);
    let green = red;
    let blue = red;
    let at = from + first * step;
    for (let k = 0; k < weights.length; k++, at += step) {
      red += source[at] * weights[k];
      green += source[at + 1] * weights[k];
      blue += source[at + 2] * weights[k];
    }
    const place = to + i * newStep;
    target[place] = clip(red >> BITS);
    target[place + 1] = clip(green >> BITS);
    target[place + 2] = clip(blue >> BITS);
  }
}

function clip(value) {
  return value < 0 ? 0 : value > 255 ? 255 : value;
}
