// The conversations, kept in this browser only.

const PREFIX = "trio-llm/conversation/";

// { id, changed, settings: {name: text}, messages: [{role, content, ...}] }
const known = new Map(load().map((one) => [one.id, one]));

function load() {
  const found = [];
  for (const name of Object.keys(localStorage).filter((name) => name.startsWith(PREFIX))) {
    try {
      found.push(JSON.parse(localStorage.getItem(name)));
    } catch {
      localStorage.removeItem(name);
    }
  }
  return found;
}

// An answer does not go on after the page is loaded again.
const withoutState = (name, value) => (name === "streaming" ? undefined : value);

// All of them, the newest first.
export const all = () => [...known.values()].sort((one, other) => other.changed - one.changed);

export function create(settings) {
  const made = { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), changed: Date.now(), settings, messages: [] };
  known.set(made.id, made);
  return made;
}

// Stores a conversation; where the browser's space is used up, the oldest others make room.
export function save(conversation) {
  if (!known.has(conversation.id)) return; // Deleted while its answer came.
  conversation.changed = Date.now();
  for (;;) {
    try {
      localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation, withoutState));
      return;
    } catch {
      const oldest = all().filter((one) => one !== conversation && localStorage.getItem(PREFIX + one.id) !== null).at(-1);
      if (oldest === undefined) return; // It stays until the page is closed.
      localStorage.removeItem(PREFIX + oldest.id);
    }
  }
}

export function remove(conversation) {
  known.delete(conversation.id);
  localStorage.removeItem(PREFIX + conversation.id);
}

export function title(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  return first ? first.content.slice(0, 60) : "New conversation";
}
