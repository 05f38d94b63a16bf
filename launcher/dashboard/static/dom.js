// Elements from text. What a job wrote only ever becomes textContent.

// Sets what differs only: selected text, hover and what a screen reader has said stay as they are.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function element(tag, className, ...content) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...content); // strings become text nodes
  return made;
}

export const byId = (id) => document.getElementById(id);
export const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Replaces what a list shows when that has changed, so that nothing moves under a reader for nothing.
export function replaceIfNew(list, key, make) {
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...make());
}
