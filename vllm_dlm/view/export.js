// The page as a file of its own: this page as it was before it did anything, with what it shows written into it.

const PRISTINE = `<!doctype html>\n${document.documentElement.outerHTML}`;

/** Cannot end the element it stands in, whatever a model wrote. */
function embeddable(data) {
  return JSON.stringify(data).replace(/[<>&\u2028\u2029]/g, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function exported(record) {
  const empty = '<script type="application/json" id="record"></' + "script>";
  const at = PRISTINE.lastIndexOf(empty) + empty.indexOf("</"); // the last one is the element, see page.html
  return PRISTINE.slice(0, at) + embeddable(record) + PRISTINE.slice(at);
}

function download(name, text) {
  const link = make(null, "a", "", "", { download: name });
  link.href = URL.createObjectURL(new Blob([text], { type: "text/html" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** What the file holds that this page was opened from, if it was exported. */
function recorded() {
  const text = document.getElementById("record").textContent;
  return text ? JSON.parse(text) : null;
}
