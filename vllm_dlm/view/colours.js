// Colours for steps and shares. Lightness changes evenly in one direction (OKLCH), and the hue goes from yellow to blue,
// which people with red-green colour blindness can distinguish.

const dark = window.matchMedia("(prefers-color-scheme: dark)");

const STEP_ENDS = {
  light: { from: [0.95, 0.075, 98], to: [0.72, 0.1, 264], dull: 0.3 },
  dark: { from: [0.51, 0.08, 92], to: [0.32, 0.11, 266], dull: 0.35 },
};
const SHARE_ENDS = {
  light: { from: [0.955, 0.01, 255], to: [0.42, 0.125, 262], dull: 0 },
  dark: { from: [0.26, 0.02, 262], to: [0.76, 0.1, 250], dull: 0 },
};

/** `dull`: reduction of chroma in the middle, as a share. */
function between({ from, to, dull }, share) {
  const [lightness, chroma, hue] = from.map((start, index) => start + (to[index] - start) * share);
  const muted = chroma * (1 - dull * Math.sin(Math.PI * share));
  return `oklch(${lightness.toFixed(3)} ${muted.toFixed(3)} ${hue.toFixed(1)})`;
}

function scheme(ends) {
  return dark.matches ? ends.dark : ends.light;
}

/** Colour of a token that was filled in `step` of `steps`. */
function stepColour(step, steps) {
  return between(scheme(STEP_ENDS), steps > 1 ? Math.min(1, Math.max(0, (step - 1) / (steps - 1))) : 0);
}

/** Colour of a share between 0 and 1. */
function shareColour(share) {
  return between(scheme(SHARE_ENDS), Math.min(1, Math.max(0, share)));
}

/** CSS gradient of a colour function for legends. */
function strip(colour) {
  return `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map(colour).join(", ")})`;
}
