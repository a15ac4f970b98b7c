// Verify receipts of llama2-grpc with Node.js and nothing else.
//
//   node verify.mjs story.receipt receipts.key.pub    a document of `llama2 generate --save-receipt`
//   node verify.mjs --vectors vectors.json            every test vector
import { createHash, createPublicKey, verify } from "node:crypto";
import { readFileSync } from "node:fs";

const PREFIX = Buffer.from("llama2-receipt-v1\0");
const UNSIGNED = ["idempotency_key", "resume_after_characters", "stream", "no_cache"];
const SPKI = Buffer.from("302a300506032b6570032100", "hex"); // precedes the 32 bytes of an Ed25519 key

const sha256 = (data) => createHash("sha256").update(data).digest("hex");

// RFC 8785: JSON.stringify writes numbers and texts in its form; members are sorted by UTF-16 code units.
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const members = Object.keys(value).sort();
  return `{${members.map((name) => `${JSON.stringify(name)}:${canonical(value[name])}`).join(",")}}`;
}

// Returns the statement of a valid receipt, otherwise throws an Error with the reason.
export function verifyReceipt({ request, response, receipt }, rawKeys) {
  const rawKey = rawKeys.find((key) => sha256(key).slice(0, 16) === receipt.key_id);
  if (!rawKey) throw new Error(`no key has the id ${receipt.key_id}`);
  const key = createPublicKey({ key: Buffer.concat([SPKI, rawKey]), format: "der", type: "spki" });
  const payload = Buffer.from(receipt.payload, "base64");
  const signature = Buffer.from(receipt.signature, "base64");
  if (!verify(null, Buffer.concat([PREFIX, payload]), key, signature)) throw new Error("the signature is wrong");
  const statement = JSON.parse(payload);
  if (statement.version !== 1) throw new Error(`the version ${statement.version} is unknown`);
  if (UNSIGNED.some((name) => name in request)) throw new Error("the request has a field that no receipt covers");
  if (statement.request_sha256 !== sha256(canonical(request))) throw new Error("the request is another one");
  if (statement.response_sha256 !== sha256(response)) throw new Error("the text is another one");
  return statement;
}

function verifyVectors({ public_keys, vectors }) {
  const keys = public_keys.map((key) => Buffer.from(key, "base64"));
  for (const { name, valid, document } of vectors) {
    let found = true;
    try {
      verifyReceipt(document, keys);
    } catch {
      found = false;
    }
    if (found !== valid) throw new Error(`vector "${name}": valid is ${found}, expected ${valid}`);
  }
  return `${vectors.length} vectors are as expected`;
}

const [first, second] = process.argv.slice(2);
try {
  if (first === "--vectors") {
    console.log(verifyVectors(JSON.parse(readFileSync(second))));
  } else {
    const rawKey = createPublicKey(readFileSync(second)).export({ format: "der", type: "spki" }).subarray(SPKI.length);
    console.log(verifyReceipt(JSON.parse(readFileSync(first)), [rawKey]));
  }
} catch (error) {
  console.error(`not valid: ${error.message}`);
  process.exit(1);
}
