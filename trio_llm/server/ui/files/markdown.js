// Shows what a model wrote as Markdown. Its HTML stays text, and what is left passes DOMPurify.
import { copyButton } from "./dom.js";
import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";

// Longer texts are shown as they are: Markdown of a huge line takes seconds.
const MAX_CHARS = 50_000;
const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escaped = (text) => text.replace(/[&<>"']/g, (character) => ESCAPES[character]);

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ raw }) => escaped(raw), // A picture would be fetched from wherever the model says.
  },
});

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["href", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

// Returns the nodes to show.
export function rendered(text) {
  if (text.length > MAX_CHARS) return document.createTextNode(text);
  const fragment = DOMPurify.sanitize(marked.parse(text), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  }
  for (const block of fragment.querySelectorAll("pre")) {
    block.tabIndex = 0; // It scrolls, so the keyboard must reach it.
    block.prepend(copyButton(() => block.querySelector("code").textContent));
  }
  return fragment;
}
