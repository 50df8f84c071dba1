// The table of agents: a row is made once, and only what changed in it is written again.

import { bar, element, gigabytes, isNumber, number, percent, age, setBar } from "./format.js";
import { ageOf, problemsOf, stateOf } from "./fleet.js";

const MOST_ROWS = 2000;

// Made once: one that is made for each comparison takes most of the time of a sort.
const { compare } = new Intl.Collator("en", { numeric: true });

const share = (part, whole) => (isNumber(part) && isNumber(whole) && whole > 0 ? part / whole : null);
const hasNoGpu = (agent) => agent.gpu === "none";
const models = (agent) => (agent.gpus.length ? agent.gpus.join(", ") : hasNoGpu(agent) ? "none" : agent.gpu || "?");

// text: what the cell says. sort: what it is sorted by, null last. bar: a share to draw, null if
// that is unknown, undefined if there is none.
export const COLUMNS = [
  { name: "host", title: "Host", text: (one) => one.host ?? "?", sort: (one) => one.host },
  { name: "pool", title: "Pool", text: (one) => one.pool, sort: (one) => one.pool },
  { name: "type", title: "Type", text: (one) => one.type, sort: (one) => one.type },
  {
    name: "status",
    title: "Status",
    text: (one, fleet) => stateOf(one, fleet).text,
    sort: (one, fleet) => stateOf(one, fleet).name,
  },
  { name: "heard", title: "Heard", text: (one) => age(ageOf(one)), sort: ageOf, isNumber: true },
  {
    name: "cpu",
    title: "CPU busy",
    text: (one) => percent(one.cpu),
    sort: (one) => one.cpu,
    bar: (one) => (isNumber(one.cpu) ? one.cpu / 100 : null),
    isNumber: true,
  },
  {
    name: "cores",
    title: "Free cores",
    text: (one) => number(one.cores),
    sort: (one) => one.cores,
    isNumber: true,
  },
  {
    name: "memory",
    title: "Free memory",
    text: (one) => gigabytes(one.memory),
    sort: (one) => one.memory,
    bar: (one) => (isNumber(one.memory_used) ? 1 - one.memory_used / 100 : null),
    isNumber: true,
  },
  {
    name: "vram",
    title: "Free VRAM",
    text: (one) => (hasNoGpu(one) ? "–" : `${number(one.vram, 1)} / ${gigabytes(one.vram_total)}`),
    sort: (one) => one.vram,
    bar: (one) => (hasNoGpu(one) ? undefined : share(one.vram, one.vram_total)),
    isNumber: true,
  },
  { name: "gpu", title: "GPU", text: models, sort: models },
  {
    name: "unknown",
    title: "Unknown, and why",
    text: (one) => problemsOf(one).join("; "),
    sort: (one) => problemsOf(one).length,
  },
];

export class Table {
  #rows = new Map();
  #view = {};
  #fleet;
  #body;
  #heads = new Map();
  #open;

  constructor(table, fleet, { onSort, onOpen }) {
    this.#fleet = fleet;
    this.#body = table.tBodies[0];
    this.#open = onOpen;
    for (const column of COLUMNS) {
      const button = element("button", { type: "button" }, column.title);
      button.addEventListener("click", () => onSort(column.name));
      const head = element("th", { scope: "col", role: "columnheader", className: column.isNumber ? "number" : "" }, button);
      this.#heads.set(column.name, head);
      table.tHead.rows[0].append(head);
    }
  }

  // Shows agents as the view says; writes only rows in `changed` (null: all of them).
  show(view, changed = null) {
    this.#view = view;
    for (const [name, head] of this.#heads) {
      if (name === view.sort) head.setAttribute("aria-sort", view.isDown ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    const fitting = [...this.#fleet.agents.values()].filter((agent) => this.#fits(agent));
    fitting.sort(this.#order());
    const shown = fitting.slice(0, MOST_ROWS);
    const wanted = new Set(shown.map((agent) => agent.id));
    for (const [id, row] of this.#rows) {
      if (!wanted.has(id)) {
        row.made.remove();
        this.#rows.delete(id);
      }
    }
    let before = null;
    for (const agent of shown) {
      let row = this.#rows.get(agent.id);
      const isNew = row === undefined;
      if (isNew) {
        row = this.#make(agent.id);
        this.#rows.set(agent.id, row);
      }
      if (isNew || changed === null || changed.has(agent.id)) this.#write(row, agent);
      // Moves only what is out of place: the focus and the reader's place stay where they are.
      const place = before === null ? this.#body.firstChild : before.nextSibling;
      if (place !== row.made) this.#body.insertBefore(row.made, place);
      before = row.made;
    }
    return { shown: shown.length, fitting: fitting.length };
  }

  // Ages grow without anybody saying so, and a lease ends by itself.
  tick() {
    for (const [id, row] of this.#rows) {
      const agent = this.#fleet.agents.get(id);
      if (agent) this.#write(row, agent, ["heard", "status"]);
    }
  }

  #fits(agent) {
    const { search, status, pool, type } = this.#view;
    if (pool && agent.pool !== pool) return false;
    if (type && agent.type !== type) return false;
    if (status && stateOf(agent, this.#fleet).name !== status && agent.status !== status) return false;
    if (!search) return true;
    const text = `${agent.host ?? ""} ${agent.id} ${agent.pool} ${agent.type} ${models(agent)}`;
    return search.toLowerCase().split(/\s+/).every((word) => text.toLowerCase().includes(word));
  }

  #order() {
    const column = COLUMNS.find((one) => one.name === this.#view.sort) ?? COLUMNS[0];
    const sign = this.#view.isDown ? -1 : 1;
    return (left, right) => {
      const [a, b] = [column.sort(left, this.#fleet), column.sort(right, this.#fleet)];
      const isUnknown = (value) => value === null || value === undefined;
      if (isUnknown(a) || isUnknown(b)) {
        if (isUnknown(a) !== isUnknown(b)) return isUnknown(a) ? 1 : -1;
      } else if (a !== b) {
        const order = typeof a === "string" ? compare(a, b) : a - b;
        if (order) return sign * order;
      }
      return left.id < right.id ? -1 : 1;
    };
  }

  #make(id) {
    const cells = {};
    const made = element("tr", { role: "row" });
    for (const column of COLUMNS) {
      const text = element("span", { className: "text" });
      const [name, role] = column.name === "host" ? ["th", "rowheader"] : ["td", "cell"];
      const cell = element(name, { role, className: column.isNumber ? "number" : "", "data-title": column.title });
      if (column.name === "host") {
        cell.setAttribute("scope", "row");
        const link = element("a", { href: `?agent=${id}` }, text);
        link.addEventListener("click", (event) => {
          if (event.ctrlKey || event.metaKey || event.shiftKey) return;
          event.preventDefault();
          this.#open(id);
        });
        cell.append(link);
      } else {
        cell.append(text);
      }
      const drawn = column.bar ? bar(null) : null;
      if (drawn) cell.append(drawn);
      cells[column.name] = { cell, text, bar: drawn };
      made.append(cell);
    }
    return { made, cells };
  }

  #write(row, agent, names = null) {
    for (const column of COLUMNS) {
      if (names && !names.includes(column.name)) continue;
      const { cell, text, bar: drawn } = row.cells[column.name];
      let said = column.text(agent, this.#fleet);
      if (column.name === "status") {
        const state = stateOf(agent, this.#fleet);
        said = `${state.mark} ${said}${agent.status === "offline" && agent.reason ? `: ${agent.reason}` : ""}`;
        if (cell.dataset.state !== state.name) cell.dataset.state = state.name;
      }
      if (text.textContent !== said) text.textContent = said;
      if (column.name === "unknown" && cell.title !== said) cell.title = said;
      cell.classList.toggle("empty", said === "");
      if (drawn) setBar(drawn, column.bar(agent));
    }
  }
}
