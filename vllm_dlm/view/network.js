// Talks to the server the page came from, and to nobody else.

/** Kept here alone: neither stored nor exported. */
let key = "";

/** What to tell people when the server did not do what was asked. */
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
    // A late refusal of a key that has been replaced meanwhile asks nobody again.
    if (answer.status === 401 && (key !== used || (await askForKey()))) continue;
    throw new Refused(await reason(answer));
  }
}

/** vLLM's message if there is one. */
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

/** True once there is a key to try; one dialog for all who ask at once. */
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

/** Data of server-sent events, parsed, until the stream ends. */
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

/** Sends a chat; `told(frame)` is called with each frame of its canvas. */
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

/** Follows one choice of another client's request. */
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

/** What the server lets people choose; nothing where it does not say. */
async function offered() {
  try {
    return await (await send("dlm/options")).json();
  } catch {
    return {};
  }
}
