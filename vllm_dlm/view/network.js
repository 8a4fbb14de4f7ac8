// Requests to the server that served the page. The page contacts no other server.

/** API key, neither stored nor exported. */
let key = "";

/** An error with a message for the user. */
class Refused extends Error {}

async function send(path, body, signal) {
  for (;;) {
    const used = key;
    const headers = used ? { Authorization: `Bearer ${used}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    const asked = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
    let answer;
    try {
      answer = await fetch(path, asked);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The server cannot be reached.");
    }
    if (answer.ok) return answer;
    // If the key has changed since the request was sent, try again without another dialog.
    if (answer.status === 401 && (key !== used || (await askForKey()))) continue;
    throw new Refused(await reason(answer));
  }
}

/** vLLM's error message, or the status. */
async function reason(answer) {
  const text = await answer.text().catch(() => "");
  try {
    const told = JSON.parse(text);
    if (typeof told.error === "string") return told.error;
    return told.error?.message || told.message || told.detail || `The server answered ${answer.status}.`;
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

let asking = null;

/** Asks for a key in one dialog for concurrent requests. Returns false if it was cancelled. */
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      if (dialog.returnValue === "use") key = field.value.trim();
      field.value = "";
      asking = null;
      resolve(dialog.returnValue === "use");
    }, { once: true });
  });
  return asking;
}

/** Parsed data of server-sent events until the stream ends. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split(/\r?\n/);
    rest = done ? "" : lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
    if (done) return;
  }
}

/** Sends a chat request and calls `told(frame)` with each frame of its canvas. */
async function ask(body, signal, told) {
  const answer = await send("v1/chat/completions", body, signal);
  let frames = 0;
  for await (const chunk of events(answer)) {
    if (chunk.error) throw new Refused(chunk.error.message || "The server ended the stream early.");
    for (const frame of [chunk.dlm ?? []].flat()) {
      if (frame.error) throw new Refused(frame.error.message);
      frames += 1;
      told(frame);
    }
  }
  if (!frames) throw new Refused("The server sent no frames: is it one of vllm_dlm with a diffusion model, started with --dlm-view?");
}

/** Watches one choice of another client's request. */
async function watch({ request, choice }, signal, told) {
  const answer = await send(`dlm/watch/${encodeURIComponent(request)}?choice=${choice ?? 0}`, null, signal);
  for await (const frame of events(answer)) {
    if (frame.error) throw new Refused(frame.error.message || "The server ended the stream early.");
    told(frame);
  }
}

async function models() {
  return (await (await send("v1/models")).json()).data.map((model) => model.id);
}

async function watched() {
  const list = await (await send("dlm/requests")).json();
  return Array.isArray(list) ? list : list.requests ?? [];
}

/** Policies that the server offers; empty if it has no such route. */
async function offered() {
  try {
    return await (await send("dlm/options")).json();
  } catch {
    return {};
  }
}
