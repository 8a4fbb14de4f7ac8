// Heat maps with steps as rows and positions as columns.

const GUTTER = { left: 38, right: 10, top: 18, bottom: 20 };
/** Largest share of the width for the prompt; positions of longer prompts are drawn narrower. */
const PROMPT_SHARE = 0.45;

/** Maps positions to x between `left` and `left + width`, and back. */
function across(prompt, canvas, left, width) {
  const share = prompt ? Math.min(prompt / (prompt + canvas), PROMPT_SHARE) : 0;
  const border = left + width * share;
  const narrow = prompt ? (border - left) / prompt : 0;
  const wide = (left + width - border) / Math.max(1, canvas);
  return {
    border, narrow, wide,
    x: (position) => (position < 0 ? border + position * narrow : border + position * wide),
    position: (x) => Math.floor(x < border && narrow ? (x - border) / narrow : (x - border) / wide),
  };
}

/** Smallest round distance with at most `most` ticks. */
function tickDistance(length, most) {
  const least = Math.max(1, length / Math.max(1, most));
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((factor) => factor * power).find((distance) => distance >= least && Number.isInteger(distance));
}

class HeatView {
  /** `kind`: "rows" or "pages" of a frame's heat; `words`: unit of a position's share; `short`: unit in the legend. */
  constructor(host, kind, title, words, short = words) {
    this.kind = kind;
    this.words = words;
    this.host = make(host, "figure", "heat");
    const caption = make(this.host, "figcaption");
    make(caption, "h4", "", title);
    this.readout = make(caption, "span", "readout");
    this.picture = make(this.host, "canvas", "", "", { role: "img" });
    this.scale = make(this.host, "div", "scale", "", { "aria-hidden": "true" });
    make(this.scale, "span", "", "0 %");
    this.bar = make(this.scale, "i");
    make(this.scale, "span", "", `100 % ${short}`);
    this.picture.addEventListener("pointermove", (event) => this.read(event));
    this.picture.addEventListener("pointerleave", () => (this.readout.textContent = ""));
    new ResizeObserver(() => this.again()).observe(this.picture);
  }

  draw(run, count, steps) {
    this.drawn = { run, count, steps };
    const any = run.frames.some((frame) => frame.heat?.[this.kind]?.length);
    this.host.hidden = !any && this.kind === "pages";
    if (!this.host.hidden) this.again();
  }

  again() {
    if (!this.drawn || !this.picture.clientWidth) return;
    const { run, count, steps } = this.drawn;
    const rowHeight = Math.min(9, Math.max(220 / steps, 1));
    const inner = Math.min(480, Math.max(40, Math.round(steps * rowHeight)));
    const width = this.picture.clientWidth;
    const height = inner + GUTTER.top + GUTTER.bottom;
    const ratio = window.devicePixelRatio || 1;
    this.picture.style.height = `${height}px`;
    if (this.picture.width !== Math.round(width * ratio)) this.picture.width = Math.round(width * ratio);
    if (this.picture.height !== Math.round(height * ratio)) this.picture.height = Math.round(height * ratio);
    const pen = this.picture.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const { prompt_tokens: prompt = 0, canvas = 0 } = run.begin;
    const plot = { top: GUTTER.top, inner, steps, ratio, row: inner / steps, width: width - GUTTER.left - GUTTER.right };
    plot.across = across(prompt, canvas, GUTTER.left, plot.width);
    this.plot = plot;
    this.drawFrames(run, plot);
    this.show(pen, count ? run.frames[count - 1].step : 0, plot);
    this.drawAxes(pen, prompt, canvas, count ? run.frames[count - 1].step : 0, plot);
    this.bar.style.background = strip(shareColour);
    this.picture.setAttribute("aria-label", this.summary(run, count));
  }

  /** Draws new frames on a separate canvas that keeps the previous ones. */
  drawFrames(run, { top, row, width, ratio, across: { x } }) {
    const { width: wide, height: high } = this.picture;
    const shape = JSON.stringify([wide, high, ratio, row, dark.matches, run.begin.canvas]);
    if (this.sheetOf !== run || this.sheetShape !== shape) {
      this.sheet = Object.assign(make(null, "canvas"), { width: wide, height: high });
      Object.assign(this, { sheetOf: run, sheetShape: shape, sheetFrames: 0 });
    }
    const pen = this.sheet.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const whole = (length) => Math.round(length * ratio) / ratio; // whole pixels: no gaps between cells
    for (const frame of run.frames.slice(this.sheetFrames)) {
      const steps = Math.max(1, frame.steps || 1);
      const y = whole(top + (frame.step - steps) * row);
      const tall = whole(top + frame.step * row) - y;
      pen.fillStyle = shareColour(0);
      pen.fillRect(GUTTER.left, y, width, tall);
      for (const [first, last, share] of frame.heat?.[this.kind] || []) {
        pen.fillStyle = shareColour(share);
        const from = whole(x(first));
        pen.fillRect(from, y, Math.max(1 / ratio, whole(x(last + 1)) - from), tall);
      }
    }
    this.sheetFrames = run.frames.length;
  }

  /** Draws the steps until now, and later ones pale. */
  show(pen, now, { top, row, ratio }) {
    const { width, height } = this.sheet;
    const border = Math.round((top + now * row) * ratio);
    pen.setTransform(1, 0, 0, 1, 0, 0);
    if (border > 0) pen.drawImage(this.sheet, 0, 0, width, border, 0, 0, width, border);
    pen.globalAlpha = 0.22;
    if (border < height) pen.drawImage(this.sheet, 0, border, width, height - border, 0, border, width, height - border);
    pen.globalAlpha = 1;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  }

  drawAxes(pen, prompt, canvas, now, { top, inner, steps, row, width, across: { x, border } }) {
    const style = getComputedStyle(this.host);
    const ink = style.getPropertyValue("--soft-ink");
    pen.font = `11px ${style.fontFamily}`;
    pen.fillStyle = pen.strokeStyle = ink;
    pen.lineWidth = 1;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const down = tickDistance(steps, inner / 26);
    for (let step = down; step <= steps; step += down) pen.fillText(String(step), GUTTER.left - 6, top + (step - 0.5) * row);
    pen.textBaseline = "top";
    pen.textAlign = "center";
    const label = (position) => pen.fillText(String(position), x(position), top + inner + 6);
    const apart = tickDistance(canvas, (GUTTER.left + width - border) / 44);
    for (let position = 0; position <= canvas; position += apart) label(position);
    if (border - GUTTER.left > 56) label(-prompt);
    pen.textAlign = "right";
    pen.fillText("step", GUTTER.left - 6, 2);
    pen.textAlign = "left";
    pen.fillText("answer", border + 4, 2);
    if (border - GUTTER.left > 48) pen.fillText("prompt", GUTTER.left, 2);
    if (prompt) {
      pen.strokeStyle = style.getPropertyValue("--ink");
      pen.beginPath();
      pen.moveTo(border, 2);
      pen.lineTo(border, top + inner + 4);
      pen.stroke();
    }
    if (!now) return;
    pen.strokeStyle = style.getPropertyValue("--mark");
    pen.lineWidth = 1.5;
    pen.beginPath();
    pen.moveTo(GUTTER.left, top + now * row);
    pen.lineTo(GUTTER.left + width, top + now * row);
    pen.stroke();
  }

  /** Shows the share at the pointer. */
  read(event) {
    const { top, row, across: places } = this.plot;
    const { run } = this.drawn;
    const step = Math.floor((event.offsetY - top) / row) + 1;
    const position = places.position(event.offsetX);
    const frame = run.frames.find((one) => one.step >= step && one.step - (one.steps || 1) < step);
    const inside = position >= -(run.begin.prompt_tokens || 0) && position < run.begin.canvas;
    if (!frame || !inside) return void (this.readout.textContent = "");
    const [, , share] = (frame.heat?.[this.kind] || []).find(([first, last]) => first <= position && position <= last) || [0, 0, 0];
    this.readout.textContent = `step ${step}, position ${position}: ${percent(share)}`;
  }

  summary(run, count) {
    const shares = sumsAt(run, count);
    const share = this.kind === "rows" ? shares.recomputed / shares.dense : shares.read / shares.of;
    const sum = Number.isFinite(share) ? `, ${percent(share)} ${this.words} in all` : "";
    return `${this.words} by step and position, prompt left of the line: ${shares.steps} steps${sum}`;
  }
}
