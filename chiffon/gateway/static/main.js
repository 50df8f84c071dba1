// The fleet page. Everything on it follows from the fleet and the address.

import * as address from "./address.js";
import { Capacity } from "./capacity.js";
import { Detail } from "./detail.js";
import { Fleet } from "./fleet.js";
import { age, element } from "./format.js";
import { COLUMNS, Table } from "./table.js";

const byId = (id) => document.getElementById(id);
const filters = byId("filters");
const FILTERS = ["search", "status", "pool", "type"];
const FIRST_SORT = "host";

const fleet = new Fleet();
const open = (id) => address.write({ agent: id }, { keep: true });
const detail = new Detail(byId("detail"), fleet, () => address.write({ agent: null }));
const table = new Table(byId("agents"), fleet, { onSort: sortBy, onOpen: open });
new Capacity(byId("capacity"), byId("needs"), byId("answer"), address, open);

function view() {
  const { search = "", status = "", pool = "", type = "", sort = FIRST_SORT } = address.read();
  return { search, status, pool, type, sort: sort.replace(/^-/, ""), isDown: sort.startsWith("-") };
}

// Numbers are first sorted from the most, texts from A; the same again turns it round.
function sortBy(name) {
  const now = view();
  const column = COLUMNS.find((one) => one.name === name);
  const isDown = now.sort === name ? !now.isDown : Boolean(column.isNumber);
  address.write({ sort: `${isDown ? "-" : ""}${name}` === FIRST_SORT ? null : `${isDown ? "-" : ""}${name}` });
}

function showTable(changed = null) {
  const now = view();
  const { shown, fitting } = table.show(now, changed);
  const all = fleet.agents.size;
  byId("shown").textContent = shown < fitting ? `the first ${shown} of ${fitting}: narrow it down` : `${fitting} of ${all}`;
  byId("nobody").hidden = all > 0 || fleet.summary === null;
}

function showHead() {
  const { summary, trouble, isLive } = fleet;
  byId("line-state").textContent = isLive && !trouble ? "● live" : isLive ? "△ no news" : "○ reconnecting";
  byId("line-age").textContent = fleet.age === null ? "" : `, data ${age(fleet.age)} old`;
  const banner = (id, text) => {
    const place = byId(id);
    if (place.textContent !== text) place.textContent = text;
    place.hidden = !text;
  };
  // What is wrong with us is said once, here; the rows keep what was last known of the agents.
  const words = trouble ?? (isLive || fleet.age === null ? null : "The gateway does not answer.");
  const known = fleet.age === null ? "" : ` What is shown is what was known ${age(fleet.age)} ago.`;
  banner("trouble", words ? `${words}${known}` : "");
  document.body.toggleAttribute("data-stale", !fleet.isTrusted);
  if (!summary) return;
  banner("degraded", summary.trouble && !words ? `We do not trust our own view now: ${summary.trouble}.` : "");
  const counts = [["●", "online"], ["◐", "busy"], ["○", "offline"], ["△", "silent"]];
  byId("counts").replaceChildren(
    ...counts
      .filter(([, name]) => name !== "silent" || (summary.silent && fleet.isTrusted))
      .map(([mark, name]) => element("li", { "data-state": name }, `${mark} ${summary[name]} ${name}`)),
  );
}

function showFilters() {
  const now = address.read();
  for (const [name, values] of [["pool", (one) => one.pool], ["type", (one) => one.type]]) {
    const select = filters.elements.namedItem(name);
    const wanted = [...new Set([...fleet.agents.values()].map(values).concat(now[name] ? [now[name]] : []))].sort();
    const there = [...select.options].slice(1).map((one) => one.value);
    if (wanted.join("\n") !== there.join("\n")) {
      select.replaceChildren(select.options[0], ...wanted.map((one) => element("option", { value: one }, one)));
    }
  }
  for (const name of FILTERS) {
    const field = filters.elements.namedItem(name);
    if (field !== document.activeElement || field.tagName === "SELECT") field.value = now[name] ?? "";
  }
  filters.elements.namedItem("sort").value = now.sort ?? FIRST_SORT;
}

// Where the table is shown as cards there are no heads to click.
filters.elements.namedItem("sort").append(
  ...COLUMNS.flatMap(({ name, title }) => [
    element("option", { value: name }, `${title}, rising`),
    element("option", { value: `-${name}` }, `${title}, falling`),
  ]),
);
filters.addEventListener("input", () => {
  const said = Object.fromEntries([...FILTERS, "sort"].map((name) => [name, filters.elements.namedItem(name).value]));
  address.write({ ...said, sort: said.sort === FIRST_SORT ? null : said.sort });
});
filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("reset", (event) => {
  event.preventDefault();
  filters.elements.namedItem("search").value = "";
  address.write(Object.fromEntries([...FILTERS, "sort"].map((name) => [name, null])));
});

address.onChange(() => {
  showFilters();
  showTable();
  detail.show(address.read().agent ?? null);
});
fleet.onChange((changed) => {
  if (changed === null || changed.size) {
    showFilters();
    showTable(changed);
    detail.changed(changed);
  }
  showHead();
});
setInterval(() => {
  fleet.watch();
  const { status, sort } = view();
  // A lease ends by itself, so who is shown, and where, may change without any news.
  if (status || sort === "status") showTable(new Set());
  table.tick();
  showHead();
}, 1000);

showFilters();
fleet.follow("stream");
detail.show(address.read().agent ?? null);
