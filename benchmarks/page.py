"""How smooth the fleet page is while many agents speak: frames and long tasks of a real browser.

    python -m benchmarks.page --agents 1000

A whole `chiffon up`, simulated agents on it, and Debian's chromium, headless, all on this machine.
A long task is one that keeps the page from answering for more than 50 ms; beside them stands the
same page with this host's agent alone, in the same run.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from chiffon.settings import up_addresses
from tests.fixtures.up import Running, state_folder

WATCH_SECONDS = 8
SIMULATE_SECONDS = 60

WATCH = """(seconds) => new Promise((done) => {
  const tasks = [], frames = [];
  new PerformanceObserver((list) => tasks.push(...list.getEntries().map((one) => one.duration)))
    .observe({ type: "longtask" });
  let last = performance.now();
  const frame = () => {
    const now = performance.now();
    frames.push(now - last);
    last = now;
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
  setTimeout(() => {
    frames.sort((a, b) => a - b);
    const at = (share) => frames[Math.floor((frames.length - 1) * share)];
    done({ tasks, p50: at(0.5), p99: at(0.99), worst: at(1),
      rows: document.querySelectorAll("#agents tbody tr").length });
  }, seconds * 1000);
})"""


def watch(page: Page, url: str, rows: int) -> dict[str, Any]:
    """Return what the browser saw of a view, once it shows that many agents."""
    page.goto(url)
    page.locator("#agents tbody tr").nth(rows - 1).wait_for(state="attached")
    time.sleep(2)
    return dict(page.evaluate(WATCH, WATCH_SECONDS))


def show(name: str, seen: dict[str, Any]) -> None:
    """Print one line of the table."""
    tasks = seen["tasks"]
    print(
        f"{name:<24}{seen['rows']:>6}{len(tasks):>12}{max(tasks, default=0):>14.0f} ms"
        f"{seen['p50']:>10.1f} ms{seen['p99']:>9.1f} ms{seen['worst']:>9.1f} ms",
        flush=True,
    )


def measure(folder: Path, agents: int) -> None:
    """Start everything and watch the page with one agent and with many."""
    up = Running(folder)
    try:
        up.ready()
        url = up_addresses(folder)["http_url"]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path="/usr/bin/chromium",
                args=["--no-sandbox", "--disable-dev-shm-usage"],
            )
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.set_default_timeout(60_000)
            print(f"{'VIEW':<24}{'AGENTS':>6}{'LONG TASKS':>12}{'LONGEST':>17}", end="")
            print(f"{'FRAME P50':>13}{'P99':>12}{'WORST':>12}   in {WATCH_SECONDS} s")
            show("this host alone", watch(page, url, 1))
            arguments = ["--agents", str(agents), "--seconds", str(SIMULATE_SECONDS)]
            simulation = subprocess.Popen(
                [sys.executable, "-m", "chiffon", "simulate", *arguments, "--silent", "0.1"],
                env={**os.environ, "CHIFFON_STATE_DIR": str(folder)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                show("sorted by host", watch(page, url, agents))
                show("sorted by CPU", watch(page, f"{url}?sort=-cpu", agents))
            finally:
                simulation.terminate()
                simulation.wait()
            browser.close()
    finally:
        up.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--agents", type=int, default=1_000)
    with state_folder() as made:
        measure(made, parser.parse_args().agents)
