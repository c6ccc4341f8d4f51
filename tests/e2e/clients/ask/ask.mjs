// Asks once with OpenAI's Node SDK, which tries again by itself, and prints the text or the error.
//
//   node ask.mjs BASE_URL BODY HEADERS
import OpenAI from "openai";

const [baseURL, body, headers] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "unused" });
let text = "";
let error = null;
try {
  const stream = await client.chat.completions.create(JSON.parse(body), {
    headers: JSON.parse(headers),
  });
  for await (const chunk of stream) text += chunk.choices[0].delta.content ?? "";
} catch (caught) {
  error = caught.constructor.name;
}
console.log(JSON.stringify({ text, error }));
