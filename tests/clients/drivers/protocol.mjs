// The same as protocol.py, for clients that run in node.
import { createInterface } from "node:readline";

export const KEY = "-";
export const MODEL = "default_model";
export const TOOL = {
  name: "look",
  description: "Looks.",
  parameters: {
    type: "object",
    properties: { what: { type: "string" } },
    required: ["what"],
  },
};

const write = (what) => process.stdout.write(JSON.stringify(what) + "\n");
// What a client prints is no part of this.
for (const name of ["log", "info", "debug"]) console[name] = console.error;

export class Left extends Error {}

export function piece(task, outcome, text) {
  if (!text) return;
  const first = !outcome.text;
  outcome.text += text;
  if (!first) return;
  write({ begun: true });
  if (task.leave) throw new Left();
}

export function failed(outcome, error, told) {
  const chain = [];
  for (let e = error; e && !chain.includes(e); e = e.cause ?? e.lastError) chain.push(e);
  // The AI SDK gives an error event's object as it came, which is no Error.
  const names = chain.map((e) =>
    e instanceof Error ? (e.name === "Error" ? e.constructor.name : e.name) : "error object");
  outcome.told = told;
  outcome.error = names[0] ?? String(error);
  outcome.message = `${names.join(" <- ")}: ${error?.message ?? error}`.slice(0, 400);
  for (const e of chain) {
    outcome.status ??= e.status ?? e.statusCode ?? null;
    outcome.code ??= e.code ?? e.data?.error?.code ?? null;
  }
}

export async function serve(ask) {
  write({ ready: true });
  for await (const line of createInterface({ input: process.stdin })) {
    const task = JSON.parse(line);
    const outcome = {
      text: "", finish: null, calls: [], error: "", status: null, code: null,
      told: "", message: "", left: false, seconds: 0,
    };
    const started = performance.now();
    try {
      await ask(task, outcome);
    } catch (e) {
      if (e instanceof Left) outcome.left = true;
      else failed(outcome, e, "raised");
    }
    outcome.seconds = (performance.now() - started) / 1000;
    write(outcome);
  }
}
