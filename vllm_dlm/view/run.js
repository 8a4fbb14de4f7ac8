// A run is a request and the frames of its answer. The page shows its state after some of them.

function newRun(name, asked) {
  return { name, asked, begin: null, frames: [], end: null, failed: null };
}

/** Adds one frame of the stream, which may contain the begin, steps and end of a run. */
function take(run, frame) {
  if (frame.choice) return; // only the first of several choices is shown
  if (frame.begin) run.begin = frame.begin;
  if (typeof frame.step === "number") run.frames.push(...apart(frame));
  if (frame.end) run.end = frame.end;
}

/** Splits a frame of several merged steps into one per step: entries have a step, sums are divided evenly, and guesses
 * belong to the last one. */
function apart(frame) {
  const steps = Math.max(1, frame.steps || 1);
  if (steps === 1) return [frame];
  const first = frame.step - steps + 1;
  const shared = (sums) => Object.fromEntries(Object.entries(sums || {}).map(([name, sum]) => [name, sum / steps]));
  return Array.from({ length: steps }, (_, index) => {
    const step = first + index;
    const own = (entries, at) => (entries || []).filter((entry) => Math.max(first, entry[at]) === step);
    const single = { step, steps: 1, ms: (frame.ms || 0) / steps, block: frame.block, heat: frame.heat };
    Object.assign(single, { set: own(frame.set, 4), unset: own(frame.unset, 1), edited: own(frame.edited, 4) });
    Object.assign(single, { rows: shared(frame.rows), keys: shared(frame.keys) });
    return step === frame.step ? { ...single, guesses: frame.guesses } : single;
  });
}

function isOver(run) {
  return Boolean(run.end || run.failed);
}

function lastStep(run) {
  return run.frames.length ? run.frames.at(-1).step : 0;
}

/** Number of steps for axes and colours: a power of two during a run, so that they rarely change. */
function stepsShown(runs) {
  const steps = Math.max(1, ...runs.map(lastStep));
  return runs.every(isOver) ? steps : Math.max(8, 2 ** Math.ceil(Math.log2(steps)));
}

/** Stops of a replay in order: `at` in steps or milliseconds, and the number of frames of each run. */
function stopsOf(runs, unit) {
  const times = runs.map((run) => {
    let sum = 0;
    return run.frames.map((frame) => (unit === "step" ? frame.step : (sum += frame.ms || 0)));
  });
  const stops = [{ at: 0, counts: runs.map(() => 0) }];
  for (const at of [...new Set(times.flat())].sort((one, other) => one - other)) {
    const counts = [...stops.at(-1).counts];
    times.forEach((own, index) => {
      while (counts[index] < own.length && own[counts[index]] <= at) counts[index] += 1;
    });
    stops.push({ at, counts });
  }
  return stops;
}

/** State of each run after its last drawn frame, so that later frames continue from it. */
const known = new WeakMap();

function knownOf(run) {
  if (!known.has(run)) known.set(run, { holes: new Set(), looked: 0, cells: null, count: 0 });
  return known.get(run);
}

/** Positions of masks in the prompt: those with entries in any frame. */
function holesOf(run) {
  const own = knownOf(run);
  for (; own.looked < run.frames.length; own.looked += 1) {
    const { guesses = [], set = [] } = run.frames[own.looked];
    for (const entries of [guesses, set]) {
      for (const [position] of entries) if (position < 0) own.holes.add(position);
    }
  }
  return own.holes;
}

/** Cells of the canvas after `count` frames, after those of the prompt if it has masks. */
function cellsAt(run, count) {
  const own = knownOf(run);
  const before = run.begin.prompt && holesOf(run).size ? run.begin.prompt.length : 0;
  if (!own.cells || own.count > count || own.before !== before) {
    Object.assign(own, { before, count: 0, cells: cellsAtFirst(run, before) });
  }
  const { cells } = own;
  for (const frame of run.frames.slice(own.count, count)) {
    for (const event of eventsOf(frame)) {
      const cell = cells[event.position + before];
      if (cell) happen(cell, event);
    }
    for (const [position, text, probability, alternatives] of frame.guesses || []) {
      const cell = cells[position + before];
      if (cell) cell.guess = { text, probability, alternatives: alternatives || [], step: frame.step };
    }
  }
  own.count = count;
  const now = run.frames.slice(0, count).findLast((frame) => frame.guesses)?.step;
  const end = run.end && count === run.frames.length ? run.end.tokens : Infinity;
  for (const cell of cells) {
    cell.fresh = Boolean(cell.guess) && cell.guess.step === now;
    cell.beyond = cell.position >= end;
  }
  return cells;
}

/** Masks and given tokens. */
function cellsAtFirst(run, before) {
  const { canvas = 0, prompt, given } = run.begin;
  const holes = holesOf(run);
  const cells = Array.from({ length: before + canvas }, (_, index) => ({ position: index - before, kind: "mask" }));
  for (let index = 0; index < before; index += 1) {
    if (!holes.has(index - before)) Object.assign(cells[index], { kind: "given", text: [prompt[index]].flat()[0] });
  }
  for (const [position, , text] of given || []) {
    const cell = cells[position + before];
    if (cell) Object.assign(cell, { kind: "given", text });
  }
  return cells;
}

/** Changes of positions by a frame, in the order of its steps if several were merged. */
function eventsOf(frame) {
  const events = [];
  for (const [position, step] of frame.unset || []) events.push({ kind: "unset", position, step });
  for (const kind of ["set", "edited"]) {
    for (const [position, token, text, probability, step] of frame[kind] || []) {
      events.push({ kind, position, token, text, probability, step: step ?? frame.step });
    }
  }
  return events.sort((one, other) => one.step - other.step);
}

function happen(cell, event) {
  if (event.kind === "unset") {
    Object.assign(cell, { kind: "mask", taken: { text: cell.text, step: event.step }, edited: undefined });
    return;
  }
  if (event.kind === "edited") cell.edited = { text: cell.text, step: cell.step };
  const { token, text, probability, step } = event;
  Object.assign(cell, { kind: "set", token, text, probability, step });
}

/** Sums over the first `count` frames for the figures. */
function sumsAt(run, count) {
  const sums = { steps: 0, seconds: 0, recomputed: 0, dense: 0, read: 0, of: 0 };
  for (const frame of run.frames.slice(0, count)) {
    sums.steps = frame.step;
    sums.seconds += (frame.ms || 0) / 1000;
    sums.recomputed += frame.rows?.recomputed || 0;
    sums.dense += frame.rows?.dense || 0;
    sums.read += frame.keys?.read || 0;
    sums.of += frame.keys?.of || 0;
  }
  return sums;
}

/** Positions at which two canvases have different tokens and neither has a mask. */
function differing(one, other) {
  const found = new Set();
  const there = new Map(other.map((cell) => [cell.position, cell]));
  for (const cell of one) {
    const twin = there.get(cell.position);
    if (cell.kind !== "mask" && twin && twin.kind !== "mask" && cell.text !== twin.text) found.add(cell.position);
  }
  return found;
}
