// Connects the form, the keyboard, the runs and messages to the user.

const part = (id) => document.getElementById(id);
const stage = new Stage();
let running = null;

function trouble(text) {
  part("trouble").textContent = text;
  part("trouble").hidden = !text;
}

/** Tells screen readers when runs start and end. */
function say(text) {
  part("said").textContent = text;
}

function busy(on) {
  part("start").disabled = on;
  part("stop").hidden = !on;
  part("export").disabled = on;
}

/** Follows the runs of a record one after another, so that their times are comparable. */
async function follow(record, follows) {
  running?.abort();
  const mine = (running = new AbortController());
  trouble("");
  busy(true);
  stage.show(record, true);
  part("stage").scrollIntoView({ block: "start", behavior: calm() ? "auto" : "smooth" });
  say("Started.");
  try {
    for (const run of record.runs) await followOne(run, follows, mine);
  } finally {
    if (running === mine) {
      running = null;
      busy(false);
      stage.over();
      say(record.runs.map(spoken).join(" "));
    }
  }
}

async function followOne(run, follows, mine) {
  if (mine.signal.aborted) {
    run.failed = "not run";
    return;
  }
  try {
    await follows(run, mine.signal, (frame) => {
      take(run, frame);
      stage.came();
    });
    if (!run.end) run.failed = "The stream ended early.";
  } catch (error) {
    run.failed = error.name === "AbortError" ? "stopped" : error.message;
    if (!(error instanceof Refused) && error.name !== "AbortError") run.failed = `The stream ended early: ${error.message}`;
  }
  if (run.failed && run.failed !== "stopped") trouble(run.name ? `${run.name}: ${run.failed}` : run.failed);
}

function spoken(run) {
  const whose = run.name ? `${run.name}: ` : "";
  if (run.failed) return `${whose}${run.failed}.`;
  return `${whose}${run.end.tokens} tokens in ${run.end.steps} steps and ${run.end.seconds.toFixed(1)} seconds.`;
}

function calm() {
  return window.matchMedia("(prefers-reduced-motion: reduce)").matches;
}

// -- requests ----------------------------------------------------------------------------------------

async function start(policies) {
  const prompt = part("prompt").value;
  trouble("");
  if (!prompt.trim()) {
    part("prompt").focus();
    return trouble("Type a prompt first.");
  }
  const length = part("max-tokens");
  let asked;
  try {
    if (!length.checkValidity()) throw new Unreadable(`Max tokens: ${length.validationMessage}`);
    asked = (part("compare").checked ? policies : policies.slice(0, 1)).map((policy) => policy.chosen());
  } catch (error) {
    if (!(error instanceof Unreadable)) throw error;
    return trouble(error.message);
  }
  const letters = asked.length > 1 ? ["A", "B"] : [""];
  const runs = asked.map((said, index) => newRun(letters[index], said));
  const body = { messages: [{ role: "user", content: prompt }], stream: true };
  if (length.value) body.max_tokens = Number(length.value);
  await follow({ prompt, runs }, async (run, signal, told) => {
    body.model ??= (await models())[0];
    await ask({ ...body, vllm_xargs: { ...run.asked, dlm_frames: 1 } }, signal, told);
  });
}

async function lookForWatched() {
  const list = part("watched");
  let requests;
  try {
    requests = await watched();
  } catch (error) {
    return trouble(error.message);
  }
  list.replaceChildren();
  if (!requests.length) make(list, "li", "note", "No request is running.");
  for (const one of requests) {
    const choice = requests.filter((other) => other.request === one.request).length > 1 && `choice ${one.choice}`;
    const facts = [choice, `${one.canvas} positions`, one.reuse, one.selection].filter((fact) => fact && fact !== "none");
    const item = make(list, "li");
    const button = make(item, "button", "", "Watch", { type: "button", "aria-label": `Watch ${one.request}` });
    make(item, "code", "", one.request);
    make(item, "span", "note", facts.join(" · "));
    button.addEventListener("click", () =>
      follow({ prompt: "", runs: [newRun("", {})] }, (run, signal, told) => watch(one, signal, told)));
  }
}

// -- keyboard ----------------------------------------------------------------------------------------

/** Space plays and pauses, arrows go one step, except in controls that use these keys. */
function pressed(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || part("key-dialog").open || part("stage").hidden) return;
  const on = event.target;
  const own = on.closest("input, textarea, select, button, summary, a") && on.id !== "moment";
  if (own) return;
  if (event.key === " ") stage.toggle();
  else if (event.key === "ArrowLeft") stage.step(-1);
  else if (event.key === "ArrowRight") stage.step(1);
  else return;
  event.preventDefault();
}

// -- start -------------------------------------------------------------------------------------------

function begin() {
  document.addEventListener("keydown", pressed);
  part("export").addEventListener("click", () => download("vllm_dlm-view.html", exported({ ...stage.record, version: 1 })));
  const record = recorded();
  if (record) {
    for (const id of ["ask", "watching", "export"]) part(id).remove();
    document.body.className = "exported";
    part("model").textContent = [...new Set(record.runs.map((run) => run.begin?.model).filter(Boolean))].join(", ");
    return stage.show(record, false);
  }
  const policies = ["A", "B"].map((letter) => new PolicyFields(part("policies"), `Policy ${letter}`));
  const compare = () => {
    policies[1].set.hidden = !part("compare").checked;
    policies[0].legend.textContent = part("compare").checked ? "Policy A" : "Policy";
    part("policies").classList.toggle("pair", part("compare").checked);
  };
  part("compare").addEventListener("change", compare);
  compare();
  part("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    start(policies);
  });
  part("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) part("ask").requestSubmit();
  });
  part("stop").addEventListener("click", () => running?.abort());
  part("look").addEventListener("click", lookForWatched);
  part("watching").addEventListener("toggle", () => part("watching").open && lookForWatched());
  models().then((names) => (part("model").textContent = names[0]), (error) => trouble(error.message));
  offered().then((offers) => policies.forEach((policy) => policy.offer(offers)));
}

begin();
