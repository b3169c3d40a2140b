// The server as this page sees it: one settings call, streamed answers, feedback. The key lives in the tab.

const KEY = "vlm-key";
const MIB = 1 << 20;

// What the server says that it takes; until it does, what it says unless told otherwise. No model: not said yet.
export const config = {
  model: "", feedback: false, attention: false,
  max_images: 8, max_image_bytes: 20 * MIB, max_body: 32 * MIB, max_pixels: 16 * MIB, max_text: 32000,
};

export class ApiError extends Error {
  constructor(status, code, message, retryAfter) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

// Whether this can be a key at all: a header holds no other letters, and no request could be sent any more.
export function useKey(key) {
  const usable = /^[ -~]+$/.test(key);
  if (usable) sessionStorage.setItem(KEY, key);
  return usable;
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function call(path, { body, signal } = {}) {
  let response;
  try {
    const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
    response = await fetch(path, { ...options, headers: headers(), signal });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new ApiError(0, "unreachable", "The server cannot be reached.");
  }
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({ error: {} }));
    const message = error.message || `The server answered with status ${response.status}.`;
    throw new ApiError(response.status, error.code, message, Number(response.headers.get("Retry-After")) || 0);
  }
  return response;
}

export async function settings(signal) {
  Object.assign(config, await (await call("/v1/page", { signal })).json());
}

export async function sendOpinion(opinion) {
  return (await call("/v1/feedback", { body: opinion })).json();
}

export async function whereItLooked(body) {
  return (await call("/v1/attention", { body })).json();
}

// Hands the answer's text over as it comes; returns how it ended ("stop" or "length").
export async function ask(messages, signal, hear) {
  const body = { model: config.model, messages, stream: true };
  const response = await call("/v1/chat/completions", { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  let ended = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "cut", "The connection broke off before the answer was complete.");
    const frames = (waiting + value).split("\n\n");
    waiting = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ")) continue;
      if (frame === "data: [DONE]") return ended;
      const { error, choices } = JSON.parse(frame.slice(6));
      if (error) throw new ApiError(0, error.code, error.message);
      const choice = choices[0];
      if (choice?.delta.content) hear(choice.delta.content);
      ended = choice?.finish_reason ?? ended;
    }
  }
}
