// The page itself: what is shown, what the visitor asks for, and in which order it is drawn.

const model = JSON.parse(document.getElementById("model").textContent);
const {imageSize, channels, latentDim, parts} = model;
const STEPS = imageSize > 128 ? 32 : 64; // of the walk
const SAMPLES = 12, NEIGHBOURS = 9, SLIDERS = 12;
const URGENT = 0, SOON = 1, IDLE = 2; // which of the waiting pictures is drawn next
const byId = id => document.getElementById(id);
const opened = performance.now();

// -- what lies in this file -----------------------------------------------------------------------

async function unpack(id) {
  const packed = await fetch("data:application/octet-stream;base64," + byId(id).textContent.trim());
  const stream = packed.body.pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpackNumbers(id) {
  return new Float32Array((await unpack(id)).buffer);
}

// -- the networks, in a worker --------------------------------------------------------------------

let ask = null, askReader = null;
const timings = [];

/** Start the worker whose script has this id => a function that hands it a job and promises its answer. */
function startWorker(id) {
  const worker = new Worker(script(byId(id).textContent)), answers = new Map();
  let lastJob = 0;
  const broken = new Promise((_, reject) => {
    worker.onerror = event => reject(new Error(event.message || "it allows no workers"));
  });
  worker.onmessage = ({data}) => {
    const {resolve, reject} = answers.get(data.id);
    answers.delete(data.id);
    if (data.error) reject(new Error(data.error));
    else resolve(data);
  };
  return job => Promise.race([broken, new Promise((resolve, reject) => {
    answers.set(++lastJob, {resolve, reject});
    worker.postMessage({...job, id: lastJob});
  })]);
}

function script(text) {
  return URL.createObjectURL(new Blob([text], {type: "text/javascript"}));
}

async function startNetworks() {
  ask = startWorker("worker");
  const networks = {generator: await unpack("generator")};
  if (model.hasEncoder) networks.encoder = await unpack("encoder");
  const runtime = {bundle: await unpack("bundle"), wasm: await unpack("wasm")};
  await ask({start: {...runtime, networks}});
}

/** Latent => pixels [size * size * channels] as bytes. */
async function generate(z) {
  const {values, milliseconds} = await ask({network: "generator", values: z, shape: [1, latentDim]});
  timings.push(milliseconds);
  byId("speed").textContent = `An image takes ${median(timings.slice(-20)).toFixed(0)} ms here.`;
  const pixels = new Uint8ClampedArray(values.length), area = imageSize ** 2;
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < channels; c++) pixels[i * channels + c] = (values[c * area + i] + 1) * 127.5;
  }
  return pixels;
}

/** Pixels => latent. */
async function encode(pixels) {
  const area = imageSize ** 2, values = new Float32Array(pixels.length);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < channels; c++) values[c * area + i] = pixels[i * channels + c] / 127.5 - 1;
  }
  const shape = [1, channels, imageSize, imageSize];
  return (await ask({network: "encoder", values, shape})).values;
}

function median(numbers) {
  return [...numbers].sort((a, b) => a - b)[numbers.length >> 1];
}

// Pictures that wait to be drawn. A new one of the same name replaces the one that waits.
const waiting = new Map();
let isDrawing = false;

function draw(name, priority, z, show) {
  waiting.set(name, {priority, z, show});
  drawNext();
}

async function drawNext() {
  document.body.toggleAttribute("data-drawing", isDrawing || waiting.size > 0);
  if (isDrawing || !waiting.size) return;
  isDrawing = true;
  const [name, {z, show}] = [...waiting].reduce((a, b) => (b[1].priority < a[1].priority ? b : a));
  waiting.delete(name);
  try {
    show(await generate(z));
  } catch (error) {
    say(`The picture could not be drawn: ${error.message}`);
  }
  isDrawing = false;
  drawNext();
}

function forget(prefix) {
  for (const name of [...waiting.keys()]) if (name.startsWith(prefix)) waiting.delete(name);
}

function paint(canvas, pixels) {
  const image = new ImageData(imageSize, imageSize);
  for (let i = 0; i < imageSize ** 2; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = pixels[i * channels + (c % channels)];
    image.data[4 * i + 3] = 255;
  }
  canvas.width = canvas.height = imageSize;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function say(text) {
  byId("status").textContent = text;
}

// -- latents --------------------------------------------------------------------------------------

function normal() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

function pick(weights) {
  let rest = Math.random() * weights.reduce((a, b) => a + b, 0);
  const found = weights.findIndex(weight => (rest -= weight) < 0);
  return found < 0 ? weights.length - 1 : found;
}

const drawPart = {
  normal: size => Float32Array.from({length: size}, normal),
  uniform: size => Float32Array.from({length: size}, () => 2 * Math.random() - 1),
  sphere: size => onSphere(drawPart.normal(size)),
  bernoulli: size => Float32Array.from({length: size}, () => Number(Math.random() < 0.5)),
  categorical: size => oneHot(size, Math.floor(Math.random() * size)),
  label: size => oneHot(size, chosenClass() ?? Math.floor(Math.random() * size)),
};

function oneHot(size, index) {
  return Float32Array.from({length: size}, (_, i) => Number(i === index));
}

function onSphere(z) {
  const length = Math.hypot(...z) || 1;
  return z.map(value => (value * Math.sqrt(z.length)) / length);
}

function chosenClass() {
  const value = byId("class")?.value;
  return value ? Number(value) : null;
}

function drawLatent() {
  return byId("source").value === "fitted" ? drawFitted() : drawPrior();
}

function drawPrior() {
  const z = new Float32Array(latentDim);
  for (const {kind, start, size} of parts) z.set(drawPart[kind](size), start);
  return z;
}

/** A draw of the mixture that was fitted to the latents of the training images. */
function drawFitted() {
  const {weights, labels, means, scales} = model.fitted, wanted = chosenClass();
  const k = pick(weights.map((weight, i) => (wanted === null || labels[i] === wanted ? weight : 0)));
  const noise = drawPart.normal(latentDim), boldness = Number(byId("boldness").value);
  return Float32Array.from({length: latentDim}, (_, row) => {
    let value = 0;
    const at = (k * latentDim + row) * latentDim;
    for (let column = 0; column <= row; column++) value += scales[at + column] * noise[column];
    return means[k * latentDim + row] + boldness * value;
  });
}

/** What a latent of this prior is after a change: back on the sphere. */
function allowed(z) {
  for (const {kind, start, size} of parts) {
    if (kind === "sphere") z.set(onSphere(z.subarray(start, start + size)), start);
  }
  return z;
}

/** A little away from z in a random direction; a bit or a category changes now and then. */
function near(z, distance) {
  const moved = Float32Array.from(z);
  for (const {kind, start, size} of parts) {
    for (let i = start; i < start + size; i++) {
      if (kind === "normal" || kind === "sphere") moved[i] += distance * normal();
      if (kind === "uniform") moved[i] = Math.min(1, Math.max(-1, moved[i] + (distance * normal()) / 2));
      if (kind === "bernoulli" && Math.random() < distance / 4) moved[i] = 1 - moved[i];
    }
    if (kind === "categorical" && Math.random() < distance / 4) moved.set(drawPart[kind](size), start);
  }
  return allowed(moved);
}

function between(start, end, t) {
  const z = start.map((value, i) => value + t * (end[i] - value));
  if (byId("path").value === "straight") return z;
  for (const part of parts) {
    if (part.kind !== "normal" && part.kind !== "sphere") continue;
    const [a, b] = [start, end].map(of => of.subarray(part.start, part.start + part.size));
    z.set(curved(a, b, t), part.start);
  }
  return z;
}

/** Great-circle path (aegan.priors.slerp); straight where no great circle is singled out. */
function curved(a, b, t) {
  const lengths = (Math.hypot(...a) || 1) * (Math.hypot(...b) || 1);
  const cosine = a.reduce((sum, value, i) => sum + value * b[i], 0) / lengths;
  const angle = Math.acos(Math.min(1, Math.max(-1, cosine))), sine = Math.sin(angle);
  if (Math.abs(sine) < 1e-3) return a.map((value, i) => value + t * (b[i] - value));
  const first = Math.sin((1 - t) * angle) / sine, second = Math.sin(t * angle) / sine;
  return a.map((value, i) => first * value + second * b[i]);
}

// -- the current picture, and the two that the walk leads between ---------------------------------

const ends = {left: null, right: null}; // latents
let current = null, frames = [];

/** Show the picture of a latent, and everything about it. */
function show(z, {quickly = false} = {}) {
  current = z;
  byId("numbers").value = `[${[...z].map(value => Number(value.toPrecision(6))).join(", ")}]`;
  moveSliders();
  draw("current", URGENT, z, pixels => paint(byId("current"), pixels));
  if (!quickly) drawNeighbours();
}

function setEnd(side, z, picture = null) {
  ends[side] = z;
  const original = byId(`${side}-original`);
  original.hidden = !picture;
  if (picture) paint(original, picture.data);
  byId(`${side}-note`).textContent = picture
    ? "Small: your picture, as the model is given it. Large: what it makes of it."
    : "Made up by the model.";
  draw(side, URGENT, z, pixels => paint(byId(side), pixels));
  prepareWalk();
  walkTo(side === "left" ? 0 : STEPS);
}

/** Draw all frames of the walk, coarse to fine, while nothing else is to be drawn. */
function prepareWalk() {
  forget("frame");
  frames = new Array(STEPS + 1).fill(null);
  if (!ends.left || !ends.right) return;
  for (let stride = STEPS; stride >= 1; stride /= 2) {
    for (let step = 0; step <= STEPS; step += stride) {
      if (!waiting.has(`frame ${step}`)) requestFrame(step, IDLE);
    }
  }
}

function requestFrame(step, priority) {
  const walk = frames;
  draw(`frame ${step}`, priority, between(ends.left, ends.right, step / STEPS), pixels => {
    walk[step] = pixels;
    if (walk !== frames) return;
    if (Number(byId("walk").value) === step && isWalking) paint(byId("current"), pixels);
    byId("save-animation").disabled = frames.some(frame => !frame);
  });
}

let isWalking = false; // else the current picture is somewhere off the path

function walkTo(step) {
  if (!ends.left || !ends.right) return;
  byId("walk").value = step;
  byId("save-animation").disabled = frames.some(frame => !frame);
  isWalking = true;
  forget("current");
  for (const [name, frame] of waiting) if (name.startsWith("frame")) frame.priority = IDLE;
  current = between(ends.left, ends.right, step / STEPS);
  byId("numbers").value = `[${[...current].map(value => Number(value.toPrecision(6))).join(", ")}]`;
  moveSliders();
  settled();
  const ready = frames.flatMap((frame, i) => (frame ? [i] : []));
  if (ready.length) {
    const nearest = ready.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a));
    paint(byId("current"), frames[nearest]);
    if (nearest === step) return;
  }
  requestFrame(step, URGENT);
}

function leaveWalk(z, options) {
  isWalking = false;
  show(z, options);
}

// The neighbours are drawn once the visitor has come to rest.
let resting = null;
function settled() {
  clearTimeout(resting);
  resting = setTimeout(drawNeighbours, 250);
}

function drawNeighbours() {
  clearTimeout(resting);
  forget("neighbour");
  const distance = Number(byId("distance").value);
  [...byId("neighbours").children].forEach((button, i) => {
    const z = i === NEIGHBOURS >> 1 ? current : near(current, distance);
    button.latent = z;
    draw(`neighbour ${i}`, SOON, z, pixels => paint(button.firstChild, pixels));
  });
}

function drawSamples() {
  forget("sample");
  [...byId("samples").children].forEach((button, i) => {
    button.latent = drawLatent();
    draw(`sample ${i}`, SOON, button.latent, pixels => paint(button.firstChild, pixels));
  });
}

// -- pictures of the visitor ----------------------------------------------------------------------

/** Blob => {size, channels, data}, the pixels that the model is given. */
async function readPicture(blob, {imageSize, channels, fit}) {
  askReader ??= startWorker("reader");
  return (await askReader({blob, wanted: {imageSize, channels, fit}})).picture;
}

async function take(side, file) {
  if (!file || !model.hasEncoder) return;
  const reading = `Reading ${file.name} …`;
  say(reading);
  let picture;
  try {
    picture = await readPicture(file, model);
  } catch {
    say(`This browser cannot read ${file.name}. Save it as JPEG or PNG and try again.`);
    return;
  }
  setEnd(side, await encode(picture.data), picture);
  if (byId("status").textContent === reading) say("");
}

// -- saving ---------------------------------------------------------------------------------------

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function saveAnimation() {
  download(await animatedPng([...frames, ...frames.slice(1, -1).reverse()], 40), "walk.png");
}

/** Pictures => one PNG file that plays for ever; `delay` in milliseconds. One picture stands still.
 *
 * Written here, since a canvas makes its PNG when the browser has nothing to do, which may take a
 * second for each, and makes none that plays.
 */
async function animatedPng(pictures, delay = 0) {
  const scale = Math.max(1, Math.floor(320 / imageSize)); // pixels are enlarged as they are
  const size = words(scale * imageSize, scale * imageSize), isFilm = pictures.length > 1;
  const out = [Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10)];
  let sequence = 0;
  out.push(chunk("IHDR", [...size, 8, 2, 0, 0, 0])); // 8 bits, RGB
  if (isFilm) out.push(chunk("acTL", words(pictures.length, 0)));
  for (const [i, pixels] of pictures.entries()) {
    const place = [...size, ...words(0, 0), delay >> 8, delay & 255, 3, 232, 0, 0];
    if (isFilm) out.push(chunk("fcTL", [...words(sequence++), ...place]));
    const data = await deflated(scanlines(pixels, scale));
    out.push(i ? chunk("fdAT", [...words(sequence++), ...data]) : chunk("IDAT", data));
  }
  out.push(chunk("IEND", []));
  return new Blob(out, {type: "image/png"});
}

/** A picture's rows as PNG has them: a zero, for no filter, before each. */
function scanlines(pixels, scale) {
  const width = scale * imageSize, lines = new Uint8Array(width * (3 * width + 1));
  let at = 0;
  for (let y = 0; y < width; y++) {
    const row = imageSize * Math.floor(y / scale);
    at++;
    for (let x = 0; x < width; x++) {
      const place = channels * (row + Math.floor(x / scale));
      for (let c = 0; c < 3; c++) lines[at++] = pixels[place + (c % channels)];
    }
  }
  return lines;
}

async function deflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function words(...numbers) {
  return numbers.flatMap(n => [n >>> 24, (n >>> 16) & 255, (n >>> 8) & 255, n & 255]);
}

function chunk(type, data) {
  const body = Uint8Array.from([...type].map(letter => letter.charCodeAt()).concat(...[[...data]]));
  return Uint8Array.from([...words(data.length), ...body, ...words(crc(body))]);
}

function crc(bytes) {
  let value = -1;
  for (const byte of bytes) {
    value ^= byte;
    for (let bit = 0; bit < 8; bit++) value = (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0);
  }
  return ~value >>> 0;
}

// -- the controls ---------------------------------------------------------------------------------

function tile(label, onClick) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "tile";
  button.setAttribute("aria-label", label);
  button.append(document.createElement("canvas"));
  button.onclick = () => button.latent && onClick(button.latent);
  return button;
}

const sliders = []; // {input, index}
const choices = []; // {select, part}

/** A slider for each number that can be slid, those that change most first. */
function makeSliders() {
  const ranges = {normal: [-3, 3, 0.01], sphere: [-3, 3, 0.01], uniform: [-1, 1, 0.01], bernoulli: [0, 1, 1]};
  const slid = parts.filter(({kind}) => kind in ranges);
  const indices = slid.flatMap(({kind, start, size}) =>
    Array.from({length: size}, (_, i) => ({kind, index: start + i})));
  indices.sort((a, b) => model.effects[b.index] - model.effects[a.index]);
  const strongest = Math.max(...indices.map(({index}) => model.effects[index]));
  indices.forEach(({kind, index}, rank) => {
    const label = document.createElement("label"), input = document.createElement("input");
    const bar = document.createElement("span");
    [input.min, input.max, input.step] = ranges[kind];
    input.type = "range";
    bar.className = "effect";
    bar.style.setProperty("--share", strongest ? model.effects[index] / strongest : 0);
    label.append(`Number ${index + 1}`, bar, input);
    input.oninput = () => {
      const z = Float32Array.from(current);
      z[index] = Number(input.value);
      leaveWalk(allowed(z), {quickly: true});
      settled();
    };
    sliders.push({input, index});
    byId(rank < SLIDERS ? "sliders" : "more-sliders").append(label);
  });
  byId("more").hidden = indices.length <= SLIDERS;
  parts.filter(({kind}) => kind === "categorical" || kind === "label").forEach(makeChoice);
}

/** A list for numbers of which exactly one is 1: a class, or another kind that was learned. */
function makeChoice(part) {
  const label = document.createElement("label"), select = document.createElement("select");
  for (let i = 0; i < part.size; i++) {
    select.add(new Option(part.kind === "label" ? model.classes[i] : `${i + 1}`, i));
  }
  label.append(part.kind === "label" ? "Class" : "Kind", select);
  select.onchange = () => {
    const z = Float32Array.from(current);
    z.set(oneHot(part.size, Number(select.value)), part.start);
    leaveWalk(z);
  };
  choices.push({select, part});
  byId("sliders").append(label);
}

function moveSliders() {
  for (const {input, index} of sliders) input.value = current[index];
  for (const {select, part: {start, size}} of choices) {
    const own = current.subarray(start, start + size);
    select.value = own.indexOf(Math.max(...own));
  }
}

function readNumbers() {
  const numbers = byId("numbers").value.match(/[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?/gi)?.map(Number) ?? [];
  if (numbers.length !== latentDim || !numbers.every(Number.isFinite)) {
    say(`These are ${numbers.length} numbers; this model's pictures have ${latentDim}.`);
    return;
  }
  say("");
  leaveWalk(Float32Array.from(numbers));
}

async function copyNumbers() {
  byId("numbers").select();
  try {
    await navigator.clipboard.writeText(byId("numbers").value);
  } catch {
    document.execCommand("copy"); // where the page may not use the clipboard by itself
  }
  say("Copied.");
}

let player = null;
function play() {
  let direction = 1;
  const advance = () => {
    const step = Number(byId("walk").value);
    if (step >= STEPS) direction = -1;
    if (step <= 0) direction = 1;
    walkTo(step + direction);
  };
  clearInterval(player);
  player = player ? null : setInterval(advance, 50);
  byId("play").textContent = player ? "Stop" : "Play";
  byId("play").setAttribute("aria-pressed", String(Boolean(player)));
}

function connect() {
  byId("walk").max = STEPS;
  byId("walk").oninput = () => walkTo(Number(byId("walk").value));
  byId("play").onclick = play;
  byId("path").onchange = () => { prepareWalk(); walkTo(Number(byId("walk").value)); };
  byId("distance").onchange = drawNeighbours;
  byId("again").onclick = drawSamples;
  byId("source").onchange = drawSamples;
  byId("boldness").onchange = drawSamples;
  if (byId("class")) byId("class").onchange = drawSamples;
  byId("copy").onclick = copyNumbers;
  byId("use").onclick = readNumbers;
  byId("save").onclick = async () => download(await animatedPng([await generate(current)]), "picture.png");
  byId("save-animation").onclick = saveAnimation;
  for (const side of ["left", "right"]) {
    byId(`${side}-random`).onclick = () => setEnd(side, drawLatent());
    byId(`use-${side}`).onclick = () => setEnd(side, Float32Array.from(current));
    const chooser = byId(`${side}-file`), card = byId(`${side}-card`);
    if (!chooser) continue;
    chooser.onchange = () => { take(side, chooser.files[0]); };
    card.ondragover = event => { event.preventDefault(); card.classList.add("over"); };
    card.ondragleave = () => card.classList.remove("over");
    card.ondrop = event => {
      event.preventDefault();
      card.classList.remove("over");
      const [first, second] = event.dataTransfer.files;
      take(side, first);
      if (second) take(side === "left" ? "right" : "left", second);
    };
  }
  leaveSlidersToScrolling();
  // A picture that misses the cards must not replace this page.
  document.ondragover = document.ondrop = event => event.preventDefault();
  for (let i = 0; i < NEIGHBOURS; i++) {
    const isCentre = i === NEIGHBOURS >> 1;
    byId("neighbours").append(tile(isCentre ? "The picture itself" : `Neighbour ${i + 1}`, z => leaveWalk(z)));
  }
  for (let i = 0; i < SAMPLES; i++) byId("samples").append(tile(`Made-up picture ${i + 1}`, z => leaveWalk(z)));
  makeSliders();
}

/** A finger that scrolls the page may have begun on a slider, which browsers have moved by then. */
function leaveSlidersToScrolling() {
  let before = null;
  document.onpointerdown = ({target}) => { before = {value: target.value, current, isWalking}; };
  document.onpointercancel = ({target}) => {
    if (target.type !== "range") return;
    target.value = before.value;
    if (before.isWalking) walkTo(Number(byId("walk").value));
    else leaveWalk(before.current);
  };
}

async function main() {
  connect();
  try {
    if (model.fitted) {
      model.fitted.means = await unpackNumbers("means");
      model.fitted.scales = await unpackNumbers("scales");
    }
    await startNetworks();
  } catch (error) {
    say(`This browser cannot run the model (${error.message}). A current Chrome, Edge, Firefox or Safari can.`);
    return;
  }
  setEnd("left", drawLatent());
  setEnd("right", drawLatent());
  walkTo(STEPS / 2);
  drawSamples();
  say("");
  document.querySelector("main").inert = false;
  document.body.dataset.ready = Math.round(performance.now() - opened);
}

main();
