// A chat with llama2-grpc in a web page (index.html): gRPC-Web by connect-web, through Envoy.
import { durationMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { BadRequestSchema, RetryInfoSchema } from "./build/google/rpc/error_details_pb.js";
import { TextGenerationService } from "./build/llama2/v1/text_generation_pb.js";

const element = (id) => document.getElementById(id);
const messages = []; // the conversation so far
let interrupt; // aborts the reply in progress

function print(kind, text) {
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = text;
  element("transcript").append(span);
}

async function printReply(conversation, signal) { // returns its text, or null if it is not whole within 120 s
  const client = createClient(TextGenerationService, createGrpcWebTransport({ baseUrl: element("address").value }));
  const headers = element("key").value ? { authorization: `Bearer ${element("key").value}` } : {};
  let text = "";
  const request = { messages: conversation, idempotencyKey: crypto.randomUUID() }; // all attempts are one call
  for (const deadline = Date.now() + 120_000; ; ) {
    let completion, position = [...text].length; // the server continues after these characters
    try {
      const options = { headers, signal, timeoutMs: deadline - Date.now() };
      for await (const part of client.generateStream({ ...request, resumeAfterCharacters: position }, options)) {
        if (position && part.resumedAfterCharacters !== position) throw new ConnectError("no continued text");
        position = 0;
        print("reply", part.response);
        text += part.response;
        completion = part.completion;
      }
      if (!completion) throw new ConnectError("the stream ended without a completion"); // its end alone proves nothing
      print("reply", "\n");
      return text;
    } catch (failure) {
      const error = ConnectError.from(failure);
      const delay = error.findDetails(RetryInfoSchema)[0]?.retryDelay;
      const waitMs = delay ? durationMs(delay) : 1000; // without RetryInfo, a server that restarts gets one second
      const broken = error.code === Code.Unavailable || error.cause instanceof TypeError; // fetch lost the connection
      const retry = (delay || broken) && !signal.aborted && Date.now() + waitMs < deadline;
      const reason = `${text && (retry ? "\nbroken: " : "\nincomplete: ")}${error.rawMessage}`;
      print("error", `${reason}${retry ? `; retrying in ${waitMs / 1000} s` : ""}\n`);
      for (const violation of error.findDetails(BadRequestSchema).flatMap((request) => request.fieldViolations))
        print("error", `  ${violation.field}: ${violation.description}\n`);
      if (!retry) return null;
      await new Promise((resume) => (setTimeout(resume, waitMs), signal.addEventListener("abort", resume)));
    }
  }
}

document.forms[0].addEventListener("submit", async (event) => {
  event.preventDefault(); // does not reload the page
  interrupt = new AbortController();
  element("send").disabled = true;
  const system = element("system").value, user = { role: "user", content: element("message").value };
  print("user", `${user.content}\n`);
  element("message").value = "";
  const conversation = [...(system ? [{ role: "system", content: system }] : []), ...messages, user];
  const text = await printReply(conversation, interrupt.signal);
  if (text !== null) messages.push(user, { role: "assistant", content: text });
  element("send").disabled = false;
});
element("stop").addEventListener("click", () => interrupt?.abort());
