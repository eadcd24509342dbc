// Runs the networks, beside the page, which stays responsive however long an image takes.

let ort = null;
const sessions = {};

onmessage = async ({data: job}) => {
  try {
    postMessage({id: job.id, ...(job.start ? await start(job.start) : await run(job))});
  } catch (error) {
    postMessage({id: job.id, error: String(error?.message ?? error)});
  }
};

async function start({bundle, wasm, networks}) {
  // From file:// no module can be imported but from a blob; nor can a worker itself be a module.
  ort = await import(URL.createObjectURL(new Blob([bundle], {type: "text/javascript"})));
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.numThreads = 1;
  for (const [name, bytes] of Object.entries(networks)) {
    sessions[name] = await ort.InferenceSession.create(bytes);
  }
  return {};
}

async function run({network, values, shape}) {
  const session = sessions[network], began = performance.now();
  const given = {[session.inputNames[0]]: new ort.Tensor("float32", values, shape)};
  const result = (await session.run(given))[session.outputNames[0]];
  return {values: Float32Array.from(result.data), milliseconds: performance.now() - began};
}
