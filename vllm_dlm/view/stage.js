// Shows runs: one column for each, with a common legend and replay.

const FIGURES = [
  ["speed", "tokens/s"],
  ["steps", "steps"],
  ["rows", "rows recomputed"],
  ["keys", "KV read"],
];

/** Only the beginning and end of prompts with more characters are shown. */
const LONG = 240;

/** A column with figures, canvas and heat maps. */
class RunView {
  constructor(host, letter) {
    this.article = make(host, "article", "run");
    const head = make(this.article, "header");
    this.title = make(head, "h2");
    if (letter) make(this.title, "b", "letter", letter);
    this.name = make(this.title, "span");
    this.facts = make(head, "p", "facts");
    const figures = make(this.article, "dl", "figures");
    this.figures = Object.fromEntries(FIGURES.map(([id, shown]) => {
      const pair = make(figures, "div", "", "", { "data-figure": id });
      const value = make(pair, "dd", "", "–");
      make(pair, "dt", "", shown);
      return [id, value];
    }));
    this.failure = make(this.article, "p", "failure");
    this.failure.hidden = true;
    this.canvas = new CanvasView(this.article, letter ? `run ${letter}` : "this run");
    const heats = make(this.article, "div", "heats");
    this.heats = [
      new HeatView(heats, "rows", "Rows recomputed", "of the layers"),
      new HeatView(heats, "pages", "Keys read by the selection", "of layers and key heads", "of layers × heads"),
    ];
  }

  draw(run, count, steps, marked) {
    this.name.textContent = policyName(run.asked, run.begin);
    this.facts.textContent = run.begin ? policyFacts(run.asked, run.begin) : "waits for its turn";
    this.failure.textContent = run.failed || "";
    this.failure.hidden = !run.failed;
    this.article.classList.toggle("waiting", !run.begin);
    if (!run.begin) return;
    const cells = cellsAt(run, count);
    this.canvas.draw(cells, steps, marked);
    for (const heat of this.heats) heat.draw(run, count, steps);
    this.drawFigures(run, count, cells);
  }

  drawFigures(run, count, cells) {
    const sums = sumsAt(run, count);
    const whole = run.end && count === run.frames.length;
    const tokens = whole ? run.end.tokens : cells.filter((cell) => cell.kind === "set").length;
    const seconds = whole ? run.end.seconds : sums.seconds;
    const share = (part, all) => (all ? percent(part / all) : "–");
    this.figures.speed.textContent = seconds ? (tokens / seconds).toFixed(tokens / seconds < 10 ? 1 : 0) : "–";
    this.figures.steps.textContent = String(sums.steps);
    this.figures.rows.textContent = share(sums.recomputed, sums.dense);
    this.figures.keys.textContent = share(sums.read, sums.of);
  }
}

class Stage {
  constructor() {
    for (const id of ["stage", "question", "legend", "runs", "play", "moment", "at", "unit", "speed"]) {
      this[id] = document.getElementById(id);
    }
    this.record = null;
    this.views = [];
    this.place = 0;
    this.playing = false;
    this.live = false;
    this.due = false;
    this.moment.addEventListener("input", () => this.go(Number(this.moment.value)));
    this.play.addEventListener("click", () => this.toggle());
    this.unit.addEventListener("change", () => this.changeUnit());
    dark.addEventListener("change", () => this.redraw());
  }

  /** Shows a record from its beginning; `live` if its runs have not ended. */
  show(record, live) {
    this.pause();
    Object.assign(this, { record, live, place: 0, held: false });
    this.stage.hidden = false;
    this.runs.replaceChildren();
    this.runs.classList.toggle("pair", record.runs.length > 1);
    const letters = record.runs.length > 1 ? ["A", "B"] : [""];
    this.views = record.runs.map((run, index) => new RunView(this.runs, letters[index]));
    this.redraw();
  }

  /** Draws new frames at the browser's next repaint. */
  came() {
    if (this.due) return;
    this.due = true;
    requestAnimationFrame(() => {
      this.due = false;
      this.redraw();
    });
  }

  over() {
    if (!this.held) this.place = Infinity; // the end, including frames that have not been drawn
    this.live = false;
    this.redraw();
  }

  redraw() {
    if (!this.record) return;
    const { runs } = this.record;
    this.stops = stopsOf(runs, this.unit.value);
    // The prompt of another client's request is only known as tokens.
    this.drawQuestion(this.record.prompt || [runs[0].begin?.prompt ?? []].flat(2).join(""));
    const last = this.stops.length - 1;
    if (this.live && !this.held) this.place = last;
    this.place = Math.min(this.place, last);
    const { at, counts } = this.stops[this.place];
    const steps = stepsShown(runs);
    const begun = runs.every((run) => run.begin);
    const marked = runs.length > 1 && begun ? differing(cellsAt(runs[0], counts[0]), cellsAt(runs[1], counts[1])) : new Set();
    runs.forEach((run, index) => this.views[index].draw(run, counts[index], steps, marked));
    this.drawLegend(steps, marked.size, runs);
    this.drawReplay(at, last);
  }

  /** Shows beginning and end of a long prompt, which often ends with the question; it can be opened. */
  drawQuestion(prompt) {
    if (prompt === this.asked) return;
    this.asked = prompt;
    this.question.hidden = !prompt;
    this.question.replaceChildren();
    if (prompt.length <= LONG) return void this.question.append(prompt);
    const whole = make(this.question, "details");
    make(whole, "summary", "", `${prompt.slice(0, LONG / 2).replace(/\S*$/, "")}… ${prompt.slice(-LONG / 2).replace(/^\S*\s*/, "")}`);
    make(whole, "div", "", prompt);
  }

  drawReplay(at, last) {
    const step = this.unit.value === "step";
    const end = this.stops[last].at;
    const said = step ? `step ${at} of ${end}` : `${(at / 1000).toFixed(2)} s of ${(end / 1000).toFixed(2)} s`;
    Object.assign(this.moment, { max: String(last), value: String(this.place) });
    this.moment.setAttribute("aria-valuetext", said);
    this.moment.style.setProperty("--done", last ? `${(100 * this.place) / last}%` : "0%");
    this.at.textContent = step ? `${at} / ${end}` : `${(at / 1000).toFixed(2)} / ${(end / 1000).toFixed(2)} s`;
    this.play.classList.toggle("on", this.playing);
    this.play.setAttribute("aria-label", this.playing ? "Pause" : "Play");
  }

  drawLegend(steps, differ, runs) {
    const kinds = new Set(runs.flatMap((run) => run.frames.flatMap((frame) => Object.keys(frame).filter((key) => frame[key]?.length))));
    const given = runs.some((run) => run.begin?.given?.length || holesOf(run).size);
    const signs = [["mask", "", "mask"], ["guess", "word", "guess, the line shows its probability"]];
    if (given) signs.push(["given", "word", "given"]);
    if (kinds.has("edited")) signs.push(["set edited", "word", "edited"]);
    if (kinds.has("unset")) signs.push(["mask taken", "", "taken back"]);
    if (runs.length > 1) signs.push(["set differs", "word", differ === 1 ? "1 position differs" : `${differ} positions differ`]);
    const shape = JSON.stringify([signs, steps, dark.matches]);
    if (shape === this.legendShape) return;
    this.legendShape = shape;
    this.legend.replaceChildren();
    const scale = make(this.legend, "span", "scale");
    make(scale, "span", "", "step 1");
    make(scale, "i").style.background = strip((share) => stepColour(1 + 999 * share, 1000));
    make(scale, "span", "", String(steps));
    for (const [names, text, meaning] of signs) {
      const sign = make(this.legend, "span", "sign");
      const cell = make(sign, "span", `cell ${names}`, text, { "aria-hidden": "true" });
      if (names === "guess") cell.style.setProperty("--sure", "70%");
      make(sign, "span", "", meaning);
    }
  }

  // -- the replay --------------------------------------------------------------------------------

  go(place) {
    this.place = Math.min(Math.max(place, 0), this.stops.length - 1);
    this.held = this.live && this.place < this.stops.length - 1;
    this.redraw();
  }

  /** Moves by stops and pauses the replay. */
  step(by) {
    if (!this.record) return;
    this.pause();
    this.go(this.place + by);
  }

  toggle() {
    if (!this.record) return;
    if (this.playing) return void this.pause();
    if (this.place >= this.stops.length - 1) this.place = 0;
    this.held = this.live;
    this.playing = true;
    this.redraw();
    this.next();
  }

  /** Time of a stop in milliseconds since the first one. */
  dueAt(place) {
    const pace = Math.min(160, Math.max(30, 8000 / (this.stops.length - 1)));
    return this.unit.value === "time" ? this.stops[place].at : place * pace;
  }

  /** Goes to the stop that is due, which may skip some if drawing is slow. */
  next(from = this.dueAt(this.place)) {
    const last = this.stops.length - 1;
    if (this.place >= last) return void this.pause();
    const [begun, speed] = [performance.now(), Number(this.speed.value)];
    this.timer = setTimeout(() => {
      const now = from + (performance.now() - begun) * speed;
      do this.place += 1;
      while (this.place < last && this.dueAt(this.place + 1) <= now);
      this.redraw();
      this.next(now);
    }, (this.dueAt(this.place + 1) - from) / speed);
  }

  pause() {
    clearTimeout(this.timer);
    this.playing = false;
    if (!this.record) return;
    this.held = this.live && this.place < this.stops.length - 1;
    this.redraw();
  }

  /** Keeps the first run's frame when the unit of the replay changes. */
  changeUnit() {
    const [count] = this.stops[this.place].counts;
    const end = this.place === this.stops.length - 1;
    this.stops = stopsOf(this.record.runs, this.unit.value);
    this.place = end ? this.stops.length - 1 : Math.max(0, this.stops.findIndex((stop) => stop.counts[0] >= count));
    this.redraw();
  }
}
