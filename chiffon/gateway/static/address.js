// What is shown is in the address, so that a view can be kept and passed on.

const listeners = [];

export const read = () => Object.fromEntries(new URLSearchParams(location.search));

export function write(changes, { keep = false } = {}) {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) {
    if (value === "" || value === null || value === undefined) query.delete(name);
    else query.set(name, value);
  }
  const text = query.toString();
  const url = text ? `?${text}` : location.pathname;
  // Typing makes no history, opening an agent does.
  if (keep) history.pushState(null, "", url);
  else history.replaceState(null, "", url);
  for (const listener of listeners) listener();
}

export function onChange(listener) {
  listeners.push(listener);
  addEventListener("popstate", listener);
}
