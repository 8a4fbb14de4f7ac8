// Shows a canvas as text. Model output is only added to the page through textContent.

/** Creates an element with a class, text and attributes, and appends it to `parent`. */
function make(parent, tag, name = "", text = "", attributes = {}) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

/** Canvases can have thousands of positions: masks after this many positions are only counted. */
const MOST_MASKS = 512;
/** Special tokens. Other words in angle brackets, such as HTML tags, do not match. */
const SPECIAL = /^<([|｜][^<>|｜]{1,40}[|｜]|\/?s|eos|bos|pad|unk|mask)>$/;

/** Close to 0 % and 100 %, one decimal is shown. */
function percent(share) {
  if (!Number.isFinite(share)) return "?";
  const fine = (share > 0 && share < 0.0995) || (share > 0.9949 && share < 1);
  return `${(100 * share).toFixed(fine ? 1 : 0)} %`;
}

/** A token in quotation marks, which show its spaces. */
function quoted(text) {
  return `“${(text ?? "").replaceAll("\n", "↵")}”`;
}

/** Shows the text of a run in `host`, and the details of one token below it. */
class CanvasView {
  constructor(host, name) {
    this.text = make(host, "div", "canvas", "", {
      role: "listbox", tabindex: "0", "aria-label": `Canvas of ${name}. Arrow keys go from token to token.`,
    });
    this.rest = make(host, "p", "rest");
    this.token = make(host, "div", "token");
    this.cells = [];
    this.shapes = [];
    this.chosen = null;
    this.id = `${name.replace(/\W/g, "")}-${(CanvasView.count = (CanvasView.count || 0) + 1)}`;
    this.text.addEventListener("pointerover", (event) => this.look(event, false));
    this.text.addEventListener("pointerleave", () => this.tell(this.chosen));
    this.text.addEventListener("click", (event) => this.look(event, true));
    this.text.addEventListener("focus", () => this.choose(this.chosen ?? 0));
    this.text.addEventListener("blur", () => this.choose(null));
    this.text.addEventListener("keydown", (event) => this.move(event));
    this.tell(null);
  }

  draw(cells, steps, marked) {
    const filled = cells.findLastIndex((cell) => cell.kind !== "mask" || cell.fresh || cell.taken);
    const shown = cells.slice(0, Math.max(filled + 1 + 64, MOST_MASKS));
    const more = cells.length - shown.length;
    this.rest.textContent = more ? `… and ${more.toLocaleString("en")} more masks` : "";
    this.cells = shown;
    while (this.text.childElementCount > shown.length) this.text.lastElementChild.remove();
    shown.forEach((cell, index) => this.drawCell(cell, index, steps, marked.has(cell.position)));
    this.shapes.length = shown.length;
    if (this.told !== undefined) this.tell(this.told);
  }

  /** Updates the element of a cell if the cell has changed. */
  drawCell(cell, index, steps, marked) {
    const element = this.text.children[index] ?? make(this.text, "span", "", "", { role: "option", id: `${this.id}-${index}` });
    const guess = cell.kind === "mask" && cell.fresh ? cell.guess : null;
    const text = cell.kind === "mask" ? guess?.text ?? "" : cell.text;
    const special = SPECIAL.test(text.trim());
    const names = ["cell", guess ? "guess" : cell.kind];
    if (special) names.push("special");
    if (cell.beyond) names.push("beyond");
    if (cell.kind === "mask" && cell.taken) names.push("taken");
    if (cell.edited) names.push("edited");
    if (marked) names.push("differs");
    if (index === this.chosen) names.push("chosen");
    const colour = cell.kind === "set" ? stepColour(cell.step, steps) : "";
    const shape = JSON.stringify([names, text, colour, guess?.probability]);
    if (shape === this.shapes[index]) return;
    this.shapes[index] = shape;
    element.className = names.join(" ");
    element.textContent = special ? text.trim().replace(/^<[|｜]?|[|｜]?>$/g, "") : text.replaceAll("\n", "↵\n");
    element.style.backgroundColor = colour;
    element.style.setProperty("--sure", guess ? `${Math.round(100 * (guess.probability ?? 0))}%` : "");
    element.setAttribute("aria-label", describe(cell).join(", "));
    element.setAttribute("aria-selected", String(index === this.chosen));
  }

  /** Shows the details of the token at the pointer; a click selects the token. */
  look(event, keep) {
    const index = [...this.text.children].indexOf(event.target.closest(".cell"));
    if (index < 0) return;
    if (keep) this.choose(index);
    else this.tell(index);
  }

  choose(index) {
    const bounded = index === null || !this.cells.length ? null : Math.min(Math.max(index, 0), this.cells.length - 1);
    for (const [at, on] of [[this.chosen, false], [bounded, true]]) {
      const element = at === null ? null : this.text.children[at];
      element?.classList.toggle("chosen", on);
      element?.setAttribute("aria-selected", String(on));
      if (at !== null) this.shapes[at] = null;
    }
    this.chosen = bounded;
    if (bounded === null) this.text.removeAttribute("aria-activedescendant");
    else this.text.setAttribute("aria-activedescendant", `${this.id}-${bounded}`);
    if (bounded !== null) this.tell(bounded);
  }

  move(event) {
    const ways = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -8, ArrowDown: 8, Home: -Infinity, End: Infinity };
    if (!(event.key in ways) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    this.choose((this.chosen ?? 0) + ways[event.key]);
    this.text.children[this.chosen]?.scrollIntoView({ block: "nearest" });
  }

  /** Shows the details of a token below the canvas. */
  tell(index) {
    this.told = index;
    const cell = index === null ? null : this.cells[index];
    const said = JSON.stringify(cell && [describe(cell), alternativesOf(cell)]);
    if (said === this.said) return;
    this.said = said;
    this.token.replaceChildren();
    if (!cell) {
      make(this.token, "span", "hint", "Point at a token, or go to the canvas with Tab and arrow keys, to see its details.");
      return;
    }
    const [what, ...facts] = describe(cell);
    make(this.token, "strong", "", what);
    for (const fact of facts) make(this.token, "span", "", fact);
    const alternatives = alternativesOf(cell);
    if (!alternatives.length) return;
    const list = make(this.token, "ul", "alternatives", "", { "aria-label": "Alternatives" });
    for (const [text, probability] of alternatives) {
      const item = make(list, "li");
      make(item, "code", "", quoted(text));
      make(item, "span", "", percent(probability));
    }
  }
}

/** The token of a cell, its position, step and probability, and its previous token. */
function describe(cell) {
  const place = `position ${cell.position}`;
  if (cell.kind === "given") return [quoted(cell.text), place, "given"];
  const said = [];
  if (cell.kind === "set") {
    said.push(quoted(cell.text), place, `step ${cell.step}`);
    if (typeof cell.probability === "number") said.push(percent(cell.probability));
    if (cell.edited) said.push(`was ${quoted(cell.edited.text)} from step ${cell.edited.step}`);
  } else if (cell.fresh) said.push(`guess ${quoted(cell.guess.text)}`, place, percent(cell.guess.probability));
  else said.push("mask", place);
  if (cell.beyond) said.push("after the end of the answer");
  if (cell.taken) said.push(`${cell.taken.text ? `${quoted(cell.taken.text)} ` : ""}taken back in step ${cell.taken.step}`);
  return said;
}

/** The most probable other tokens in the last step that computed the position. */
function alternativesOf(cell) {
  if (cell.kind === "given" || !cell.guess || (cell.kind === "mask" && !cell.fresh)) return [];
  const best = [[cell.guess.text, cell.guess.probability], ...cell.guess.alternatives];
  return best.filter(([text], index) => text !== (cell.kind === "set" ? cell.text : cell.guess.text) && index < 4);
}
