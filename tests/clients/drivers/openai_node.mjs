// openai-node, as its README uses it.
import OpenAI from "openai";
import { KEY, MODEL, TOOL, piece, serve } from "./protocol.mjs";

const clients = new Map();

function client(baseURL) {
  if (!clients.has(baseURL)) clients.set(baseURL, new OpenAI({ baseURL, apiKey: KEY }));
  return clients.get(baseURL);
}

await serve(async (task, outcome) => {
  const body = {
    model: MODEL,
    messages: [{ role: "user", content: task.prompt }],
    max_tokens: task.max_tokens,
    stream: task.stream,
  };
  if (task.tool) body.tools = [{ type: "function", function: TOOL }];
  if (Object.keys(task.logit_bias).length) body.logit_bias = task.logit_bias;
  const options = task.retries ? {} : { maxRetries: 0 };
  const answer = await client(task.base_url).chat.completions.create(body, options);
  if (!task.stream) {
    const choice = answer.choices[0];
    piece(task, outcome, choice.message.content);
    outcome.finish = choice.finish_reason;
    return;
  }
  // Leaving the loop ends the connection.
  for await (const chunk of answer) {
    for (const choice of chunk.choices) {
      outcome.finish = choice.finish_reason ?? outcome.finish;
      for (const call of choice.delta.tool_calls ?? [])
        outcome.calls.push([call.function.name, call.function.arguments]);
      piece(task, outcome, choice.delta.content);
    }
  }
});
