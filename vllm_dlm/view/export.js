// Exports the page as one file: its original HTML with the record that it shows.

const PRISTINE = `<!doctype html>\n${document.documentElement.outerHTML}`;

/** JSON in which no model output can close the script element. */
function embeddable(data) {
  return JSON.stringify(data).replace(/[<>&\u2028\u2029]/g, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function exported(record) {
  const empty = '<script type="application/json" id="record"></' + "script>";
  const at = PRISTINE.lastIndexOf(empty) + empty.indexOf("</"); // the last match is the element, see page.html
  return PRISTINE.slice(0, at) + embeddable(record) + PRISTINE.slice(at);
}

function download(name, text) {
  const link = make(null, "a", "", "", { download: name });
  link.href = URL.createObjectURL(new Blob([text], { type: "text/html" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** The record of an exported page. */
function recorded() {
  const text = document.getElementById("record").textContent;
  return text ? JSON.parse(text) : null;
}
