// The host's official SDK for JavaScript.
import Cloudflare from "cloudflare";

const [baseURL, account_id, apiToken, model] = process.argv.slice(2);
const client = new Cloudflare({ apiToken, baseURL, maxRetries: 0 });
const prompt = "Tell me a story.";

async function error(prompt) {
  try {
    await client.ai.run(model, { account_id, prompt });
  } catch (error) {
    return { status: error.status, ...error.errors[0] };
  }
}

const reply = await client.ai.run(model, { account_id, prompt });
const response = await client.ai.run(model, { account_id, prompt, stream: true }).asResponse();
const data = (await response.text()).split("\n").filter(Boolean).map((line) => line.slice("data: ".length));
const done = data.pop();
const events = data.map((event) => JSON.parse(event));
console.log(
  JSON.stringify({
    unary: { text: reply.response, usage: reply.usage },
    stream: { pieces: events.map((event) => event.response), usage: events.at(-1).usage, done },
    invalid: await error("x".repeat(4097)),
    quota: await error(prompt),
  }),
);
