// The capacity question, as a planner asks it, and why the other agents are no answer.

import { age, element, gigabytes, isNumber, number } from "./format.js";

const PREFIX = "need.";

export class Capacity {
  #form;
  #answer;
  #address;
  #open;
  #asked = 0;

  constructor(details, form, answer, address, onOpen) {
    this.#form = form;
    this.#answer = answer;
    this.#address = address;
    this.#open = onOpen;
    const asked = Object.entries(address.read()).filter(([name]) => name.startsWith(PREFIX));
    for (const [name, value] of asked) {
      const field = form.elements.namedItem(name.slice(PREFIX.length));
      if (field) field.value = value;
    }
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    if (asked.length) {
      details.open = true;
      this.#ask();
    }
  }

  async #ask() {
    const query = new URLSearchParams();
    const changes = {};
    for (const [name, value] of new FormData(this.#form)) {
      changes[PREFIX + name] = value;
      if (name === "capabilities") {
        for (const word of value.split(/[\s,]+/).filter(Boolean)) query.append(name, word);
      } else if (value !== "") {
        query.set(name, value);
      }
    }
    this.#address.write(changes);
    const asked = ++this.#asked;
    try {
      const answer = await fetch(`api/v1/capacity?${query}`);
      const body = await answer.json();
      if (asked !== this.#asked) return; // something else was asked meanwhile
      if (answer.ok) this.#render(body);
      else this.#answer.replaceChildren(element("p", { className: "error" }, body.detail));
    } catch {
      this.#answer.replaceChildren(element("p", { className: "error" }, `not asked: the gateway does not answer`));
    }
  }

  #render({ offers, explanation }) {
    const more = offers.total_relation === "gte" ? "more than " : "";
    const count = offers.total_matches;
    const found = count === 0 ? "No agent can take this now." : `${more}${count} ${count === 1 ? "agent" : "agents"} can take this now, best first.`;
    this.#answer.replaceChildren(
      element("p", { className: "found" }, found, offers.degraded ? " We do not trust our own view now: agents may be missing." : ""),
      count ? this.#offers(offers.agents) : "",
      element("p", {}, explanation.summary),
      explanation.relaxation ? element("p", { className: "relaxation" }, `What would do: ${explanation.relaxation.message}.`) : "",
      explanation.nearest.length ? this.#misses(explanation.nearest) : "",
    );
  }

  #offers(agents) {
    const titles = ["Host", "Pool", "Free VRAM", "On one GPU", "Free cores", "Free memory", "Heard"];
    const rows = agents.map((one) =>
      element(
        "tr", {},
        element("th", { scope: "row" }, this.#link(one)),
        element("td", {}, one.pool_name),
        element("td", { className: "number" }, gigabytes(one.gpu_vram_available_gb)),
        element("td", { className: "number" }, gigabytes(one.gpu_vram_max_available_gb)),
        element("td", { className: "number" }, number(one.cpu_cores_available)),
        element("td", { className: "number" }, gigabytes(one.memory_available_gb)),
        element("td", { className: "number" }, age(isNumber(one.heartbeat_age_seconds) ? one.heartbeat_age_seconds : null)),
      ),
    );
    const head = element("thead", {}, element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title))));
    const table = element("table", { className: "offers" }, head, element("tbody", {}, ...rows));
    return element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Offers" }, table);
  }

  #misses(nearest) {
    const items = nearest.map((one) => element("li", {}, this.#link(one), `: ${one.reasons.join(", ")}`));
    return element("details", { open: true }, element("summary", {}, "Why the others do not fit"), element("ul", { className: "misses" }, ...items));
  }

  #link(one) {
    const link = element("a", { href: `?agent=${one.agent_id}` }, one.hostname ?? one.agent_id);
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      this.#open(one.agent_id);
    });
    return link;
  }
}
