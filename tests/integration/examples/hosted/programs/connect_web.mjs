// connect-web: its default transport, which is not supported, and its gRPC-Web transport.
import { readFileSync } from "node:fs";
import { createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { createClient } from "@connectrpc/connect";
import { createConnectTransport, createGrpcWebTransport } from "@connectrpc/connect-web";

const [baseUrl, descriptors] = process.argv.slice(2);
const files = fromBinary(FileDescriptorSetSchema, readFileSync(descriptors));
const service = createFileRegistry(files).getService("llama2.v1.TextGenerationService");
const request = { prompt: "Tell me a story." };

async function result(call) {
  try {
    return { text: await call() };
  } catch (error) {
    return { code: error.code, message: error.rawMessage };
  }
}

async function calls(transport) {
  const client = createClient(service, transport);
  return {
    unary: await result(async () => (await client.generate(request)).response),
    stream: await result(async () => {
      let text = "";
      for await (const message of client.generateStream(request)) text += message.response;
      return text;
    }),
  };
}

console.log(
  JSON.stringify({
    connect: await calls(createConnectTransport({ baseUrl })),
    connectBinary: await calls(createConnectTransport({ baseUrl, useBinaryFormat: true })),
    grpcWeb: await calls(createGrpcWebTransport({ baseUrl })),
  }),
);
