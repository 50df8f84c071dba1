// How values are written for people. What is not a number is unknown, and says so.

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export const number = (value, digits = 0) => (isNumber(value) ? value.toFixed(digits) : "?");

export const gigabytes = (value) => (isNumber(value) ? `${value.toFixed(1)} GiB` : "?");

export const percent = (value) => (isNumber(value) ? `${value.toFixed(0)} %` : "?");

export function age(seconds) {
  if (!isNumber(seconds)) return "never";
  for (const [limit, unit, name] of [[120, 1, "s"], [7200, 60, "m"], [172800, 3600, "h"]]) {
    if (seconds < limit) return `${Math.floor(seconds / unit)} ${name}`;
  }
  return `${Math.floor(seconds / 86400)} d`;
}

// Whatever an agent calls itself is text, never markup.
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// A bar beside a text that says the same: the picture alone means nothing.
export function bar(share) {
  const fill = element("span", { className: "fill" });
  const made = element("span", { className: "bar", "aria-hidden": "true" }, fill);
  setBar(made, share);
  return made;
}

export function setBar(made, share) {
  made.hidden = share === undefined;
  made.classList.toggle("unknown", !isNumber(share));
  const width = isNumber(share) ? Math.min(Math.max(share, 0), 1) : 0;
  made.firstChild.style.width = `${(width * 100).toFixed(1)}%`;
}
