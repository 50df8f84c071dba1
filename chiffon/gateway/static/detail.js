// One agent: its GPUs, its last heartbeat, and its recent history.

import { age, bar, element, gigabytes, isNumber, number, percent } from "./format.js";
import { ageOf, problemsOf, stateOf } from "./fleet.js";

const SVG = "http://www.w3.org/2000/svg";

export class Detail {
  #dialog;
  #fleet;
  #id = null;
  #asked = 0;
  #text = element("pre", { tabIndex: 0 });
  #body = element("details", {}, element("summary", {}, "Last heartbeat"), this.#text);

  constructor(dialog, fleet, onClose) {
    this.#dialog = dialog;
    this.#fleet = fleet;
    dialog.addEventListener("close", () => {
      this.#id = null;
      onClose();
    });
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
  }

  async show(id) {
    if (id === this.#id) return;
    this.#id = id;
    if (!id) {
      this.#dialog.close();
      return;
    }
    if (!this.#dialog.open) {
      this.#fill(element("p", {}, "reading…"));
      this.#dialog.showModal();
    }
    await this.#read();
  }

  // Called with the ids of agents that changed.
  async changed(ids) {
    if (this.#id && (ids === null || ids.has(this.#id))) await this.#read();
  }

  async #read() {
    const id = this.#id;
    const asked = ++this.#asked;
    try {
      const path = `api/v1/agents/${encodeURIComponent(id)}`;
      const [agent, history] = await Promise.all([fetch(path), fetch(`${path}/history`)]);
      const [body, past] = [await agent.json(), await history.json()];
      if (this.#id !== id || this.#asked !== asked) return; // another was opened meanwhile
      if (agent.ok) this.#render(body, past.readings ?? []);
      else this.#fill(element("p", {}, body.detail));
    } catch {
      if (this.#id === id) this.#fill(element("p", {}, `not read: the gateway does not answer`));
    }
  }

  #fill(...children) {
    const close = element("button", { type: "button", className: "close" }, "Close");
    close.addEventListener("click", () => this.#dialog.close());
    const known = this.#fleet.agents.get(this.#id);
    const title = element("h2", { id: "detail-title" }, known?.host ?? this.#id ?? "");
    const place = this.#dialog.scrollTop;
    const hadFocus = document.activeElement?.className === "close";
    // What somebody may be reading stays where it is: the body is never taken out, only followed.
    for (const old of [...this.#dialog.children]) if (old !== this.#body) old.remove();
    const all = [element("div", { className: "title" }, title, close), ...children.filter(Boolean)];
    if (all.includes(this.#body) && this.#body.parentNode === this.#dialog) {
      this.#body.before(...all.filter((one) => one !== this.#body));
    } else {
      this.#dialog.replaceChildren(...all);
    }
    this.#dialog.scrollTop = place;
    if (hadFocus) close.focus();
  }

  #render(agent, readings) {
    const known = this.#fleet.agents.get(agent.agent_id);
    const state = known ? stateOf(known, this.#fleet) : { mark: "", text: agent.status };
    const reason = agent.status === "offline" && agent.status_reason ? `: ${agent.status_reason}` : "";
    const resources = agent.resources && typeof agent.resources === "object" ? agent.resources : {};
    const facts = [
      ["Status", `${state.mark} ${state.text}${reason}`],
      ["Heard", `${heard(known ? ageOf(known) : agent.heartbeat_age_seconds)}; every ${agent.interval_seconds} s, lease ${agent.lease_seconds} s`],
      ["Agent", agent.agent_id],
      ["Pool, type", `${agent.pool_name}, ${agent.agent_type}`],
      ["Capabilities", agent.capabilities.join(", ") || "none"],
      ["Version", agent.agent_version ?? "?"],
      ["Its clock", skew(agent.clock_skew_seconds)],
      ["CPU", `${percent(resources.cpu_percent)} busy, load ${number(resources.cpu_load_1min, 2)}, ${number(resources.cpu_cores_available)} cores free (${number(resources.cpu_cores_physical)} physical)`],
      ["Memory", `${gigabytes(resources.memory_available_gb)} free, ${percent(resources.memory_percent)} used`],
    ];
    if (agent.drained) {
      const until = agent.drain_deadline ? `; what is left is ended at ${new Date(agent.drain_deadline).toLocaleString()}` : "";
      facts.push(["Drained", `${agent.drain_reason ?? "no reason given"}${until}`]);
    }
    if (agent.available) {
      facts.push(["Available", `${gigabytes(agent.available.gpu_vram_gb)} VRAM (${gigabytes(agent.available.single_gpu_vram_gb)} on one GPU), ${number(agent.available.cpu_cores)} cores, ${gigabytes(agent.available.memory_gb)} memory`]);
    }
    if (agent.lower_incarnations > 0) {
      facts.push(["Id in use twice?", `${agent.lower_incarnations} heartbeats of an earlier start: a cloned disk, or a clock set back`]);
    }
    const list = element("dl", {});
    for (const [name, value] of facts) list.append(element("dt", {}, name), element("dd", {}, value));
    const problems = known ? problemsOf(known) : [];
    const text = JSON.stringify(agent, null, 2);
    const isRead = document.getSelection()?.containsNode(this.#text, true) && !document.getSelection().isCollapsed;
    if (this.#text.textContent !== text && !isRead) this.#text.textContent = text;
    this.#fill(
      list,
      problems.length ? element("ul", { className: "problems" }, ...problems.map((one) => element("li", {}, one))) : null,
      ...this.#reserved(agent.reserved),
      ...this.#gpus(resources),
      ...this.#history(readings),
      this.#body,
    );
  }

  #reserved(parts) {
    if (!parts.length) return [];
    const rows = parts.map((one) => {
      const gpus = one.gpus.map((gpu) => `${gigabytes(gpu.vram_gb)} on GPU ${gpu.index}`);
      const parts = [...gpus, one.cpu_cores ? `${one.cpu_cores} cores` : "", one.memory_gb ? `${gigabytes(one.memory_gb)} memory` : ""];
      return element("li", {}, `${parts.filter(Boolean).join(", ")} — ${one.reservation_id}`);
    });
    return [element("h3", {}, "Reserved"), element("ul", {}, ...rows)];
  }

  #gpus(resources) {
    const gpus = Array.isArray(resources.gpus) ? resources.gpus : [];
    if (!gpus.length) return [];
    const rows = gpus.map((gpu) => {
      const share = isNumber(gpu.vram_available_gb) && gpu.vram_total_gb > 0 ? gpu.vram_available_gb / gpu.vram_total_gb : null;
      return element(
        "li", {},
        `${gpu.index}: ${gpu.name ?? "?"} — ${number(gpu.vram_available_gb, 1)} of ${gigabytes(gpu.vram_total_gb)} free, ${percent(gpu.utilization_percent)} busy${gpu.is_unified ? ", the host's memory" : ""}`,
        bar(share),
      );
    });
    return [element("h3", {}, "GPUs"), element("ul", { className: "gpus" }, ...rows)];
  }

  #history(readings) {
    const title = element("h3", {}, "Recently");
    if (readings.length < 2) return [title, element("p", {}, "nothing yet: kept since this gateway started")];
    const seconds = (new Date(readings.at(-1).at) - new Date(readings[0].at)) / 1000;
    const lines = [
      ["CPU busy", "cpu_percent", (value) => `${value.toFixed(0)} %`],
      ["Free cores", "cpu_cores_available", (value) => value.toFixed(0)],
      ["Free memory", "memory_available_gb", gigabytes],
      ["Free VRAM", "gpu_vram_available_gb", gigabytes],
    ].map(([name, key, write]) => {
      const values = readings.map((one) => one[key]);
      const known = values.filter(isNumber);
      if (!known.length) return null;
      const [least, most] = [Math.min(...known), Math.max(...known)];
      const text = `${name}: ${write(least)} to ${write(most)}, now ${isNumber(values.at(-1)) ? write(values.at(-1)) : "?"}`;
      return element("figure", {}, element("figcaption", {}, text), sparkline(values, least, most));
    });
    return [title, ...lines, element("p", { className: "small" }, `${readings.length} heartbeats over ${age(seconds)}, from this gateway's memory`)];
  }
}

const heard = (seconds) => (isNumber(seconds) ? `${age(seconds)} ago` : "never");

function skew(seconds) {
  if (!isNumber(seconds)) return "?";
  return `${Math.abs(seconds).toFixed(2)} s ${seconds < 0 ? "behind" : "ahead of"} the database's`;
}

function sparkline(values, least, most) {
  const made = document.createElementNS(SVG, "svg");
  made.setAttribute("viewBox", "0 0 100 24");
  made.setAttribute("preserveAspectRatio", "none");
  made.setAttribute("aria-hidden", "true");
  const height = most - least || 1;
  let run = [];
  const draw = () => {
    if (run.length) {
      const line = document.createElementNS(SVG, "polyline");
      line.setAttribute("points", run.join(" "));
      made.append(line);
    }
    run = [];
  };
  values.forEach((value, place) => {
    // What is unknown is a gap, not a line from one known value to the next.
    if (!isNumber(value)) draw();
    else run.push(`${((place / (values.length - 1)) * 100).toFixed(2)},${(22 - ((value - least) / height) * 20).toFixed(2)}`);
  });
  draw();
  return made;
}
