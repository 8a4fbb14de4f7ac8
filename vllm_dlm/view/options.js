// The form for policies and the options of a request that it sets.

const KINDS = [
  { kind: "decoding", name: "Decoding", key: "dlm_decoding" },
  { kind: "reuse", name: "Reuse", key: "dlm_reuse" },
  { kind: "selection", name: "Selection", key: "dlm_selection" },
  { kind: "extent", name: "Extent", key: "dlm_extent" },
];
const NUMBERS = [
  { name: "Block length", key: "dlm_block_length", field: "block_length", step: "1", min: "1" },
  { name: "Threshold", key: "dlm_threshold", field: "threshold", step: "any", min: "0", max: "1" },
];

/** Invalid input in a field. */
class Unreadable extends Error {}

/** The fields of one policy; empty ones use the server's options. */
class PolicyFields {
  constructor(host, name) {
    this.name = name;
    this.set = make(host, "fieldset", "policy");
    this.legend = make(this.set, "legend", "", name);
    const grid = make(this.set, "div", "grid");
    this.fields = {};
    for (const { kind, name: shown, key } of KINDS) this.fields[key] = this.field(grid, shown, "select", kind);
    for (const { name: shown, key, step, min, max } of NUMBERS) {
      const field = this.field(grid, shown, "input", key);
      Object.assign(field, { type: "number", step, min, max: max ?? "", inputMode: "decimal" });
      this.fields[key] = field;
    }
    const further = make(grid, "label", "field wide", "Further vllm_xargs ");
    this.further = make(further, "input", "", "", { type: "text", spellcheck: "false", autocomplete: "off", placeholder: '{"dlm_steps": 32}' });
    this.offer({});
  }

  field(grid, shown, tag, name) {
    const label = make(grid, "label", "field", `${shown} `);
    return make(label, tag, "", "", { "data-option": name });
  }

  /** Fills the fields with the policies that the server offers. */
  offer(offers) {
    for (const { kind, key } of KINDS) {
      const select = this.fields[key];
      const kept = select.value;
      const own = offers.server?.[kind]?.name;
      select.replaceChildren();
      make(select, "option", "", own ?? "default", { value: "" });
      for (const name of offers[kind] || []) if (name !== own) make(select, "option", "", name, { value: name });
      select.value = kept;
      if (select.selectedIndex < 0) select.value = "";
      select.parentElement.hidden = offers[kind]?.length === 1;
    }
    for (const { key, field } of NUMBERS) {
      this.fields[key].placeholder = offers.server?.decoding?.[field] ?? "off";
    }
  }

  /** The request's `vllm_xargs`. */
  chosen() {
    const said = {};
    for (const { key } of KINDS) if (this.fields[key].value) said[key] = this.fields[key].value;
    for (const { key, name } of NUMBERS) {
      const field = this.fields[key];
      if (!field.checkValidity()) return this.refuse(field, `${name}: ${field.validationMessage}`);
      if (field.value !== "") said[key] = Number(field.value);
    }
    return { ...said, ...this.typed() };
  }

  typed() {
    const text = this.further.value.trim();
    if (!text) return {};
    let given;
    try {
      given = JSON.parse(text);
    } catch (error) {
      return this.refuse(this.further, `Further vllm_xargs: not JSON (${error.message})`);
    }
    if (given === null || typeof given !== "object" || Array.isArray(given)) {
      return this.refuse(this.further, 'Further vllm_xargs: must be an object such as {"dlm_steps": 32}');
    }
    return given;
  }

  refuse(field, why) {
    field.focus();
    throw new Unreadable(why);
  }
}

/** A short name of a policy. */
function policyName(asked, begin) {
  const parts = [];
  if (asked.dlm_decoding) parts.push(asked.dlm_decoding);
  const reuse = asked.dlm_reuse ?? begin?.reuse;
  const selection = asked.dlm_selection ?? begin?.selection;
  if (reuse && reuse !== "none") parts.push(reuse);
  if (selection && selection !== "none") parts.push(selection);
  if (!parts.length) parts.push("no reuse");
  if (asked.dlm_threshold !== undefined && asked.dlm_threshold !== "none") parts.push(`threshold ${asked.dlm_threshold}`);
  return parts.join(" + ");
}

/** The policy's other options, in small print. */
function policyFacts(asked, begin) {
  const facts = [];
  if (begin?.decoding && begin.decoding !== asked.dlm_decoding) facts.push(begin.decoding);
  if (begin?.block_length) facts.push(`blocks of ${begin.block_length}`);
  if (begin?.extent && begin.extent !== "full") facts.push(begin.extent);
  if (begin?.page_size > 1) facts.push(`pages of ${begin.page_size}`);
  if (begin?.layers) facts.push(`${begin.layers} layers`);
  const named = [...KINDS.map(({ key }) => key), "dlm_threshold", "dlm_block_length"];
  for (const [key, value] of Object.entries(asked)) if (!named.includes(key)) facts.push(`${key} ${value}`);
  return facts.join(" · ");
}
