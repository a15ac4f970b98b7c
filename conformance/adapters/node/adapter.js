// The adapter of a client in Node.js: node adapter.js FOLDER HOST:PORT. FOLDER has the packages of examples/clients/node.
const { createRequire } = require("node:module");
const path = require("node:path");
const { createInterface } = require("node:readline");

const root = path.join(__dirname, "../../..");
const examples = path.join(root, "examples/clients");
const packages = createRequire(path.join(process.argv[2], "package.json"));
const grpc = packages("@grpc/grpc-js");
const protos = packages("@grpc/proto-loader").loadSync(
  ["llama2/v1/text_generation.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"],
  { includeDirs: [`${root}/protos`, `${examples}/protos`], keepCase: true, longs: String, enums: String, defaults: true },
);
const client = new (grpc.loadPackageDefinition(protos).llama2.v1.TextGenerationService)(
  process.argv[3],
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
  const delay = RetryInfo?.retry_delay;
  return {
    code: grpc.status[error.code] ?? "UNKNOWN", text, message: error.details ?? error.message, reason: ErrorInfo?.reason ?? "",
    fields: (BadRequest?.field_violations ?? []).map((one) => one.field).sort(),
    retry_after_ms: delay ? Number(delay.seconds) * 1000 + delay.nanos / 1e6 : null,
  };
}

function success(text, completion) { // the end of a stream alone proves nothing
  if (!completion) return { code: "INTERNAL", text, message: "the reply has no completion" };
  const finish_reason = String(completion.finish_reason).replace("FINISH_REASON_", "");
  return { code: "OK", text, finish_reason, seed: completion.seed, neurons: completion.usage?.neurons ?? "0" };
}

async function answer({ call, request, deadline_ms, cancel_after, key }) {
  const metadata = new grpc.Metadata();
  if (key) metadata.set("authorization", `Bearer ${key}`);
  const options = { deadline: Date.now() + (deadline_ms ?? 20000) };
  let text = "", completion, count = 0;
  try {
    if (call === "Generate") return await new Promise((resolve) => client.Generate(request, metadata, options,
      (error, reply) => resolve(error ? failure(error, "") : success(reply.response, reply.completion))));
    const stream = client.GenerateStream(request, metadata, options);
    for await (const part of stream) {
      text += part.response;
      completion = part.completion ?? completion;
      if (++count === cancel_after) return stream.cancel(), { code: "CANCELLED", text };
    }
    return success(text, completion);
  } catch (error) {
    return failure(error, text);
  }
}

(async () => {
  for await (const line of createInterface({ input: process.stdin })) console.log(JSON.stringify(await answer(JSON.parse(line))));
  client.close();
})();
