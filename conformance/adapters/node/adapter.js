// The adapter of a client in Node.js: node adapter.js HOST:PORT. NODE_PATH has the packages of examples/clients/node.
const grpc = require("@grpc/grpc-js");
const { createInterface } = require("node:readline");

const examples = `${__dirname}/../../../examples/clients`;
const protos = require("@grpc/proto-loader").loadSync(
  ["llama2/v1/text_generation.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"],
  { includeDirs: [`${examples}/../../protos`, `${examples}/protos`], keepCase: true, longs: String, defaults: true },
);
const client = new (grpc.loadPackageDefinition(protos).llama2.v1.TextGenerationService)(
  process.argv[2],
  grpc.credentials.createInsecure(),
  { "grpc.service_config": JSON.stringify(require(`${examples}/service_config.json`)) },
);

function details(error) { // by type; none if the trailer is not a google.rpc.Status
  const found = {};
  try {
    const [bytes] = error.metadata?.get("grpc-status-details-bin") ?? [];
    for (const any of bytes ? protos["google.rpc.Status"].deserialize(bytes).details : []) {
      const name = any.type_url.split("/").pop();
      if (protos[name]) found[name.split(".").pop()] = protos[name].deserialize(any.value);
    }
  } catch {}
  return found;
}

function failure(error, text) {
  const { ErrorInfo, BadRequest, RetryInfo } = details(error);
  const fields = (BadRequest?.field_violations ?? []).map((violation) => violation.field);
  const delay = RetryInfo?.retry_delay;
  const retry_after_ms = delay ? delay.seconds * 1000 + delay.nanos / 1e6 : null;
  return { code: error.code, text, message: error.details, reason: ErrorInfo?.reason, fields, retry_after_ms };
}

function success(text, completion) { // the end of a stream alone proves nothing
  if (!completion) return { code: grpc.status.INTERNAL, text, message: "the reply has no completion" };
  return { code: grpc.status.OK, text, ...completion, neurons: completion.usage?.neurons };
}

async function answer({ call, request, deadline_ms, cancel_after, key }) {
  const metadata = new grpc.Metadata();
  if (key) metadata.set("authorization", `Bearer ${key}`);
  const options = { deadline: Date.now() + deadline_ms };
  let text = "", completion, count = 0;
  try {
    if (call === "Generate") return await new Promise((resolve) => client.Generate(request, metadata, options,
      (error, reply) => resolve(error ? failure(error, "") : success(reply.response, reply.completion))));
    const stream = client.GenerateStream(request, metadata, options);
    for await (const part of stream) {
      text += part.response;
      completion = part.completion ?? completion;
      if (++count === cancel_after) return stream.cancel(), { code: grpc.status.CANCELLED, text };
    }
    return success(text, completion);
  } catch (error) {
    return failure(error, text);
  }
}

(async () => {
  for await (const line of createInterface({ input: process.stdin }))
    console.log(JSON.stringify(await answer(JSON.parse(line))));
  client.close();
})();
