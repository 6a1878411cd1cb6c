// The Vercel AI SDK with its provider for compatible servers. Its streams never
// throw: the finish reason is "error" then, and onError is told.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";
import { KEY, Left, MODEL, TOOL, failed, piece, serve } from "./protocol.mjs";

await serve(async (task, outcome) => {
  const leaving = new AbortController();
  const provider = createOpenAICompatible({
    name: "local",
    baseURL: task.base_url,
    apiKey: KEY,
  });
  const options = {
    model: provider(MODEL),
    prompt: task.prompt,
    maxOutputTokens: task.max_tokens,
    abortSignal: leaving.signal,
  };
  if (!task.retries) options.maxRetries = 0;
  if (task.tool)
    options.tools = {
      [TOOL.name]: tool({
        description: TOOL.description,
        inputSchema: jsonSchema(TOOL.parameters),
      }),
    };
  if (Object.keys(task.logit_bias).length)
    options.providerOptions = { local: { logit_bias: task.logit_bias } };
  if (!task.stream) {
    const answer = await generateText(options);
    piece(task, outcome, answer.text);
    outcome.finish = answer.finishReason;
    return;
  }
  let error;
  const answer = streamText({ ...options, onError: (e) => { error = e.error; } });
  try {
    for await (const text of answer.textStream) piece(task, outcome, text);
  } catch (e) {
    if (e instanceof Left) leaving.abort();
    throw e;
  }
  if (error !== undefined) failed(outcome, error, "told");
  // Rejected when nothing has come.
  outcome.finish = await answer.finishReason.then((x) => x, () => "error");
  const calls = await answer.toolCalls.then((x) => x, () => []);
  outcome.calls = calls.map((c) => [c.toolName, JSON.stringify(c.input)]);
});
