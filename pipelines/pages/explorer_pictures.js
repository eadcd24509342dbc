// A picture of the visitor => the pixels that the model was trained on, as
// aegan.data.image_files.decode_image and Pillow make them: upright, in sRGB, on white, cropped or
// padded to a square, shrunk with Pillow's own arithmetic (whole numbers of 22 bits). Of tall pictures
// Pillow may take the rows before the columns, which rounds some bytes the other way.
//
// Runs in a worker: a telephone's picture takes seconds, in which the page stays responsive.

onmessage = async ({data: {id, blob, wanted}}) => {
  try {
    postMessage({id, picture: await readPicture(blob, wanted)});
  } catch (error) {
    postMessage({id, error: String(error?.message ?? error)});
  }
};

const STRIP_PIXELS = 4e6; // read at once from a large picture

/** Blob => {size, channels, data}: a square of bytes, rows of pixels of 1 or 3 channels. */
async function readPicture(blob, {imageSize, channels, fit}) {
  const bitmap = await createImageBitmap(blob, {imageOrientation: "from-image"});
  try {
    let picture = readReduced(bitmap, (await isJpeg(blob)) ? draftOf(bitmap, imageSize) : 1);
    picture = reduced(picture, timesLarger(picture, 4 * imageSize));
    const same = picture.width === imageSize && picture.height === imageSize;
    if (channels === 1) picture = toGray(picture);
    if (!same) picture = fit === "pad" ? padded(picture, imageSize) : cropped(picture, imageSize);
    return picture;
  } finally {
    bitmap.close();
  }
}

async function isJpeg(blob) {
  const start = new Uint8Array(await blob.slice(0, 3).arrayBuffer());
  return start[0] === 0xff && start[1] === 0xd8 && start[2] === 0xff;
}

/** By how much Pillow has a JPEG decoded smaller; what its decoder makes is nearly the mean. */
function draftOf(bitmap, imageSize) {
  return [8, 4, 2].find(factor => timesLarger(bitmap, 4 * imageSize) >= factor) ?? 1;
}

function timesLarger({width, height}, side) {
  return Math.max(1, Math.floor(Math.min(width, height) / side));
}

/** A picture on white, each block of factor x factor pixels its mean, strip by strip. */
function readReduced(bitmap, factor) {
  const {width, height} = bitmap;
  const columns = Math.ceil(width / factor), rows = Math.ceil(height / factor);
  const data = new Uint8Array(columns * rows * 3);
  const rowsAtOnce = Math.max(1, Math.floor(STRIP_PIXELS / width / factor));
  const canvas = new OffscreenCanvas(width, Math.min(height, rowsAtOnce * factor));
  const context = canvas.getContext("2d", {willReadFrequently: true});
  for (let row = 0; row < rows; row += rowsAtOnce) {
    const top = row * factor, high = Math.min(height - top, canvas.height);
    context.fillStyle = "white";
    context.fillRect(0, 0, width, high);
    context.drawImage(bitmap, 0, top, width, high, 0, 0, width, high);
    const strip = context.getImageData(0, 0, width, high).data;
    reduceInto(data, row, strip, 4, width, high, factor);
  }
  return {width: columns, height: rows, channels: 3, data};
}

/** Pillow's reduce. */
function reduced(picture, factor) {
  if (factor === 1) return picture;
  const {width, height} = picture;
  const columns = Math.ceil(width / factor), rows = Math.ceil(height / factor);
  const data = new Uint8Array(columns * rows * 3);
  reduceInto(data, 0, picture.data, 3, width, height, factor);
  return {width: columns, height: rows, channels: 3, data};
}

/** `strip` has pixels of `step` bytes, `data` of 3. */
function reduceInto(data, firstRow, strip, step, width, height, factor) {
  const columns = Math.ceil(width / factor);
  for (let top = 0; top < height; top += factor) {
    const high = Math.min(factor, height - top);
    for (let column = 0; column < columns; column++) {
      const left = column * factor, wide = Math.min(factor, width - left);
      const sums = [0, 0, 0], count = high * wide;
      for (let y = top; y < top + high; y++) {
        for (let x = left, at = step * (y * width + left); x < left + wide; x++, at += step) {
          for (let c = 0; c < 3; c++) sums[c] += strip[at + c];
        }
      }
      const at = 3 * ((firstRow + top / factor) * columns + column);
      const multiplier = Math.floor(2 ** 24 / count);
      for (let c = 0; c < 3; c++) {
        data[at + c] = Math.floor(((sums[c] + (count >> 1)) * multiplier) / 2 ** 24);
      }
    }
  }
}

function toGray({width, height, data}) {
  const gray = new Uint8Array(width * height);
  for (let i = 0; i < gray.length; i++) {
    const [r, g, b] = data.subarray(3 * i, 3 * i + 3);
    gray[i] = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
  }
  return {width, height, channels: 1, data: gray};
}

/** ImageOps.fit: the largest square in the middle. */
function cropped(picture, size) {
  const side = Math.min(picture.width, picture.height);
  const left = (picture.width - side) * 0.5, top = (picture.height - side) * 0.5;
  return resized(picture, [left, top, left + side, top + side], size, size);
}

/** ImageOps.pad: the whole picture in the middle of white. */
function padded(picture, size) {
  const {width, height, channels} = picture;
  const wide = width > height ? size : roundHalfEven((width / height) * size);
  const high = width > height ? roundHalfEven((height / width) * size) : size;
  const data = new Uint8Array(size * size * channels).fill(255);
  if (wide && high) {
    const inner = resized(picture, [0, 0, width, height], wide, high);
    const left = roundHalfEven((size - wide) * 0.5), top = roundHalfEven((size - high) * 0.5);
    for (let y = 0; y < high; y++) {
      const row = inner.data.subarray(y * wide * channels, (y + 1) * wide * channels);
      data.set(row, ((top + y) * size + left) * channels);
    }
  }
  return {width: size, height: size, channels, data};
}

function roundHalfEven(value) {
  const whole = Math.floor(value), rest = value - whole;
  return rest > 0.5 || (rest === 0.5 && whole % 2) ? whole + 1 : whole;
}

/** Image.resize with LANCZOS of a box: columns first, then rows, each rounded to bytes. */
function resized({width, height, channels, data}, box, wide, high) {
  const [left, top, right, bottom] = box.map(Math.fround);
  const across = weights(width, left, right, wide), down = weights(height, top, bottom, high);
  const narrow = new Uint8ClampedArray(wide * height * channels);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < wide; x++) {
      const {start, taps} = across[x];
      for (let c = 0; c < channels; c++) {
        const from = (y * width + start) * channels + c;
        narrow[(y * wide + x) * channels + c] = weighted(data, from, channels, taps);
      }
    }
  }
  const out = new Uint8ClampedArray(wide * high * channels), step = wide * channels;
  for (let y = 0; y < high; y++) {
    const {start, taps} = down[y];
    for (let i = 0; i < step; i++) out[y * step + i] = weighted(narrow, start * step + i, step, taps);
  }
  return {width: wide, height: high, channels, data: out};
}

function weighted(data, from, step, taps) {
  let sum = 2 ** 21;
  for (let i = 0; i < taps.length; i++) sum += data[from + i * step] * taps[i];
  return Math.floor(sum / 2 ** 22);
}

/** For each pixel of the result: where the pixels it is made of start, and their weights. */
function weights(inSize, from, to, outSize) {
  const scale = Math.fround(to - from) / outSize, stretch = Math.max(scale, 1);
  const support = 3 * stretch;
  return Array.from({length: outSize}, (_, index) => {
    const centre = from + (index + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(inSize, Math.trunc(centre + support + 0.5));
    const taps = new Float64Array(end - start);
    let total = 0;
    for (let i = 0; i < taps.length; i++) {
      taps[i] = lanczos((i + start - centre + 0.5) * (1 / stretch));
      total += taps[i];
    }
    for (let i = 0; i < taps.length; i++) {
      const exact = (total ? taps[i] / total : taps[i]) * 2 ** 22;
      taps[i] = Math.trunc(exact + (exact < 0 ? -0.5 : 0.5));
    }
    return {start, taps};
  });
}

function lanczos(x) {
  return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}
