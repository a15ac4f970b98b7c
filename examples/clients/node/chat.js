// A chat with llama2-grpc. Each line of the input is one message of the user; Ctrl-C stops the reply in progress.
// Usage: node chat.js [SYSTEM_PROMPT]
const { randomUUID } = require("node:crypto");
const { createInterface } = require("node:readline");
const grpc = require("@grpc/grpc-js");
const { loadSync } = require("@grpc/proto-loader");

const protos = loadSync(["llama2/v1/text_generation.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"], {
  includeDirs: [`${__dirname}/../../../protos`, `${__dirname}/../protos`], keepCase: true, defaults: true,
});
const client = new (grpc.loadPackageDefinition(protos).llama2.v1.TextGenerationService)(
  process.env.LLAMA2_ADDRESS || "127.0.0.1:50051",
  grpc.credentials.createInsecure(), // with TLS: grpc.credentials.createSsl()
  { "grpc.service_config": JSON.stringify(require("../service_config.json")) },
);
const metadata = new grpc.Metadata();
if (process.env.LLAMA2_API_KEY) metadata.set("authorization", `Bearer ${process.env.LLAMA2_API_KEY}`);
let call; // the latest reply
process.on("SIGINT", () => (call && !call.destroyed ? call.cancel() : process.exit(130)));

function detail(error, name) { // the google.rpc detail with this name, or undefined
  const [bytes] = error.metadata?.get("grpc-status-details-bin") ?? [];
  const details = bytes ? protos["google.rpc.Status"].deserialize(bytes).details : [];
  const any = details.find((any) => any.type_url.endsWith(`/google.rpc.${name}`));
  return any && protos[`google.rpc.${name}`].deserialize(any.value);
}

async function printReply(messages) { // returns its text, or null if it is not whole within 120 s
  let text = "";
  const request = { messages, idempotency_key: randomUUID() }; // all attempts are one call, with one price
  for (const deadline = Date.now() + 120_000; ; ) {
    let completion, position = [...text].length; // the server continues after these characters
    try {
      call = client.GenerateStream({ ...request, resume_after_characters: position }, metadata, { deadline });
      for await (const part of call) {
        if (position && part.resumed_after_characters !== position) throw new Error("the server cannot resume");
        position = 0;
        process.stdout.write(part.response);
        text += part.response;
        completion = part.completion;
      }
      if (!completion) throw new Error("the stream ended without a completion"); // its end alone proves nothing
      console.log();
      return text;
    } catch (error) {
      const delay = detail(error, "RetryInfo")?.retry_delay; // without it, a server that restarts gets one second
      const waitMs = delay ? Number(delay.seconds) * 1000 + delay.nanos / 1e6 : 1000;
      const retry = (delay || error.code === grpc.status.UNAVAILABLE) && Date.now() + waitMs < deadline;
      const reason = `${text && (retry ? "\nbroken: " : "\nincomplete: ")}${error.message}`;
      console.error(`${reason}${retry ? `; retrying in ${waitMs / 1000} s` : ""}`);
      for (const violation of detail(error, "BadRequest")?.field_violations ?? [])
        console.error(`  ${violation.field}: ${violation.description}`);
      if (!retry) return null;
      await new Promise((resume) => setTimeout(resume, waitMs));
    }
  }
}

(async () => {
  const messages = process.argv[2] ? [{ role: "system", content: process.argv[2] }] : [];
  for await (const content of createInterface({ input: process.stdin })) {
    const text = await printReply([...messages, { role: "user", content }]);
    if (text !== null) messages.push({ role: "user", content }, { role: "assistant", content: text });
  }
  client.close();
})();
