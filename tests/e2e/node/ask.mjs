// Asks one question with OpenAI's Node SDK and prints what an application would see, as JSON.
//
//   node ask.mjs BASE_URL '{"route": "chat", "stream": true, "conversation_id": "x", ...}'
import OpenAI from "openai";

const [baseURL, question] = process.argv.slice(2);
const { route, conversation_id: conversationId, ...body } = JSON.parse(question);
const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });
const headers = conversationId ? { "X-Conversation-Id": conversationId } : {};

const routes = {
  chat: () => client.chat.completions,
  completions: () => client.completions,
  responses: () => client.responses,
};

// The piece of text in a chunk of a stream or in a whole answer.
const pieces = {
  chat: ({ choices: [choice] }) => (choice.delta ?? choice.message).content ?? "",
  completions: ({ choices: [choice] }) => choice.text,
  responses: (part) =>
    part.output_text ?? (part.type === "response.output_text.delta" ? part.delta : ""),
};

const answer = await routes[route]().create(body, { headers });
let text = "";
let chunks = 0;
for await (const chunk of body.stream ? answer : [answer]) {
  text += pieces[route](chunk);
  chunks += 1;
}
console.log(JSON.stringify({ text, chunks }));
