// The fleet as this page knows it, kept fresh by the gateway's stream.

// The gateway says something each second; when it has not for so long, the line is dead.
const SILENCE_MS = 20_000;

export class Fleet {
  agents = new Map();
  summary = null;
  trouble = null;
  isLive = false;
  heardAt = null;
  #listeners = [];
  #changed = new Set();
  #isScheduled = false;
  #stream = null;
  #url = "";
  #newsAt = 0;
  #before = new Map();

  // Calls `listener` with the ids of the agents that changed (null: all), once a frame at most.
  onChange(listener) {
    this.#listeners.push(listener);
  }

  follow(url) {
    this.#stream?.close();
    const stream = new EventSource(url);
    [this.#stream, this.#url, this.#newsAt] = [stream, url, performance.now()];
    const on = (name, take) =>
      stream.addEventListener(name, (event) => {
        this.isLive = true;
        this.#newsAt = performance.now();
        take(JSON.parse(event.data));
        this.#schedule();
      });
    on("restart", () => {
      this.#before = new Map([...this.agents].map(([id, agent]) => [id, agent.lastState]));
      this.agents.clear();
      this.#changed = null;
    });
    on("fleet", (summary) => {
      this.summary = summary;
      this.trouble = null;
      this.heardAt = performance.now() - summary.age * 1000;
    });
    on("agents", (agents) => {
      const now = performance.now();
      for (const agent of agents) {
        // Ages are counted from here on: this machine's clock is not asked what time it is.
        agent.heardAt = agent.age === null ? null : now - agent.age * 1000;
        agent.lastState = this.agents.get(agent.id)?.lastState ?? this.#before.get(agent.id);
        this.agents.set(agent.id, agent);
        this.#changed?.add(agent.id);
      }
    });
    on("gone", (ids) => {
      for (const id of ids) this.agents.delete(id);
      this.#changed = null;
    });
    on("trouble", (trouble) => {
      this.trouble = trouble;
    });
    stream.onerror = () => {
      this.isLive = false;
      this.#schedule();
      // The browser dials again by itself, unless it was refused.
      if (stream.readyState === EventSource.CLOSED) {
        setTimeout(() => this.follow(url), 2000 + Math.random() * 2000);
      }
    };
  }

  // A peer that vanished closes nothing: only its silence tells.
  watch() {
    if (performance.now() - this.#newsAt > SILENCE_MS) {
      this.isLive = false;
      this.follow(this.#url);
    }
  }

  // Seconds since the gateway last read the registry.
  get age() {
    return this.heardAt === null ? null : (performance.now() - this.heardAt) / 1000;
  }

  // Whether silence says anything about an agent: not while the gateway, the database or the
  // orchestrators are away.
  get isTrusted() {
    return this.isLive && this.trouble === null && this.summary !== null && this.summary.is_recording;
  }

  #schedule() {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    // A page in the background gets no frames, and shall not gather changes without end.
    const wait = document.hidden ? (call) => setTimeout(call, 1000) : requestAnimationFrame;
    wait(() => {
      this.#isScheduled = false;
      const changed = this.#changed;
      this.#changed = new Set();
      for (const listener of this.#listeners) listener(changed);
    });
  }
}

export const ageOf = (agent) =>
  agent.heardAt === null ? null : (performance.now() - agent.heardAt) / 1000;

// Judged as of when heartbeats were last known to be recorded: who was not heard since may have
// spoken.
const isSilent = (agent, fleet) => {
  if (agent.status === "offline") return false;
  const age = ageOf(agent);
  const unknown = (fleet.age ?? 0) + (fleet.summary.recording_age_seconds ?? 0);
  return agent.silent || age === null || age - unknown > agent.lease;
};

// A mark and a word for each state: never a colour alone. While we do not know, the last that was.
export function stateOf(agent, fleet) {
  if (fleet.isTrusted) agent.lastState = state(agent, isSilent(agent, fleet));
  return agent.lastState ?? state(agent, false);
}

function state(agent, silent) {
  if (agent.status === "offline") return { name: "offline", mark: "○", text: "offline" };
  if (silent) return { name: "silent", mark: "△", text: `${agent.status}, silent` };
  if (agent.drained) return { name: "drained", mark: "▽", text: `${agent.status}, drained` };
  if (agent.status === "busy") return { name: "busy", mark: "◐", text: "busy" };
  return { name: "online", mark: "●", text: "online" };
}

export function problemsOf(agent) {
  const problems = Array.isArray(agent.problems) ? agent.problems.map(String) : [];
  const isReported = agent.gpu !== undefined && agent.gpu !== null;
  return problems.length || isReported ? problems : ["reports no metrics, or none of its GPU"];
}
