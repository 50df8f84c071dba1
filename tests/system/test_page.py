"""The fleet page in a real browser, over a real ``chiffon up``."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

from chiffon.settings import up_addresses
from tests.fixtures.up import Running, state_folder

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]

RIGS = """
import asyncio, sys
from chiffon import BaseAgent
from chiffon.contract.messages import ResourceMetrics

class Rig:
    def __init__(self, vram, cores, problem=None):
        self.said = ResourceMetrics(
            cpu_percent=10.0, cpu_cores_physical=32, cpu_cores_available=cores,
            memory_percent=50.0, memory_available_gb=64.0,
            gpu_vram_total_gb=None if problem else 80.0, gpu_vram_available_gb=vram,
            gpu_type="nvidia", probe_errors=[problem] if problem else [],
            gpus=[] if problem else [dict(index=0, name="A100 <b>80GB</b>", uuid="GPU-1",
                vram_total_gb=80.0, vram_available_gb=vram, utilization_percent=5.0)],
        )
    def read(self): return self.said
    def close(self): pass

async def main(url, pool, *names):
    rigs = {"rig-2": Rig(40.0, 8), "rig-10": Rig(75.5, 2), "rig-1": Rig(None, 30, "NVML: lost")}
    agents = [
        BaseAgent(url, hostname=name, pool_name=pool, interval_seconds=0.5, resources=rigs[name])
        for name in names
    ]
    for agent in agents:
        await agent.__aenter__()
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def state() -> Iterator[Path]:
    with state_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def up(state: Path) -> Iterator[Running]:
    running = Running(state)
    try:
        running.ready()
        yield running
    finally:
        running.end()


@pytest.fixture(scope="module")
def addresses(up: Running, state: Path) -> dict[str, str]:
    return up_addresses(state)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


class Watched:
    """A page whose console must stay empty."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")


@pytest.fixture
def watched(browser: Browser, addresses: dict[str, str]) -> Iterator[Watched]:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    made = Watched(page)
    page.goto(addresses["http_url"])
    yield made
    page.close()


@pytest.fixture
def page(watched: Watched) -> Iterator[Page]:
    yield watched.page
    assert watched.complaints == []


@contextmanager
def rigs(
    addresses: dict[str, str],
    pool: str,
    names: Sequence[str] = ("rig-1", "rig-2", "rig-10"),
) -> Iterator["subprocess.Popen[bytes]"]:
    """Agents in one process, which ends without a farewell.

    Each test names a pool of its own: agents of the test before may be online for seconds more.
    """
    process = subprocess.Popen([sys.executable, "-c", RIGS, addresses["amqp_url"], pool, *names])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def row(page: Page, host: str, pool: str = "") -> Locator:
    return (
        page.locator("#agents tbody tr")
        .filter(has=page.get_by_role("link", name=host, exact=True))
        .filter(has_text=pool)
    )


def hosts(page: Page) -> list[str]:
    return page.locator("#agents tbody tr:visible th .text").all_inner_texts()


def expect_hosts(page: Page, wanted: list[str]) -> None:
    expect(page.locator("#agents tbody tr th .text")).to_have_text(wanted)


def test_this_machine_is_shown_and_the_page_is_live(page: Page) -> None:
    own = os.uname().nodename

    expect(page).to_have_title("Fleet · chiffon")
    expect(row(page, own)).to_contain_text("● online")
    expect(page.locator("#counts")).to_contain_text("online")
    expect(page.locator("#line")).to_contain_text("● live, data")
    expect(page.locator("#degraded")).to_be_hidden()


def test_agents_are_sorted_filtered_and_found_by_the_address(
    page: Page, addresses: dict[str, str]
) -> None:
    """A browser, and agents that have to be heard first."""
    own = os.uname().nodename
    with rigs(addresses, "lab"):
        expect(row(page, "rig-10", "lab")).to_contain_text("75.5 / 80.0 GiB")
        expect(row(page, "rig-1", "lab")).to_contain_text("NVML: lost")

        page.locator("#filters").get_by_label("Search").fill("LAB a100")
        expect_hosts(page, ["rig-2", "rig-10"])
        page.locator("#filters").get_by_label("Search").fill("")
        page.locator("#filters [name=pool]").select_option("lab")
        expect_hosts(page, ["rig-1", "rig-2", "rig-10"])
        heads = page.locator("#agents thead")
        heads.get_by_role("button", name="Free VRAM").click()
        expect_hosts(page, ["rig-10", "rig-2", "rig-1"])
        expect(heads.get_by_role("columnheader", name="Free VRAM")).to_have_attribute(
            "aria-sort", "descending"
        )
        heads.get_by_role("button", name="Free cores").click()
        heads.get_by_role("button", name="Free cores").click()
        expect_hosts(page, ["rig-10", "rig-2", "rig-1"])
        assert "pool=lab" in page.url
        assert "sort=cores" in page.url

        page.reload()
        expect_hosts(page, ["rig-10", "rig-2", "rig-1"])
        expect(page.locator("#shown")).to_have_text(re.compile("^3 of "))

        page.locator("#filters").get_by_role("button", name="Clear").click()
        expect(row(page, own)).to_be_visible()
        assert page.url == f"{addresses['http_url']}/"


def test_an_agent_that_is_killed_goes_offline_on_the_page(
    page: Page, addresses: dict[str, str]
) -> None:
    # One alone: three of a pool that become silent at once are an outage, and not marked.
    """It is waited for until a lease is over."""
    with rigs(addresses, "desks", ["rig-2"]) as process:
        page.locator("#filters").get_by_label("Search").fill("desks")
        expect(row(page, "rig-2")).to_contain_text("● online")

        os.kill(process.pid, signal.SIGKILL)

        # Its lease is 5 s, and with the event exchange it is known after 1.5 s.
        expect(row(page, "rig-2")).to_contain_text(re.compile("○ offline: (connection|missed)"))
        expect(page.locator("#counts")).to_contain_text("offline")


def test_an_agent_is_shown_with_its_gpus_its_body_and_its_history(
    page: Page, addresses: dict[str, str]
) -> None:
    """A browser, and a history of several heartbeats."""
    with rigs(addresses, "shown"):
        row(page, "rig-10", "shown").filter(has_text="● online").get_by_role("link").click()

        detail = page.locator("#detail")
        expect(detail.get_by_role("heading", name="rig-10")).to_be_visible()
        expect(detail).to_contain_text("0: A100 <b>80GB</b> — 75.5 of 80.0 GiB free")
        expect(detail.locator("svg polyline")).not_to_have_count(0)
        expect(detail).to_contain_text("from this gateway's memory")
        detail.get_by_text("Last heartbeat").click()
        expect(detail.locator("pre")).to_contain_text('"incarnation"')
        assert "agent=" in page.url

        page.keyboard.press("Escape")
        expect(detail).to_be_hidden()
        page.wait_for_url(lambda url: "agent=" not in url)


def test_the_form_asks_as_a_planner_does_and_says_why_not(
    page: Page, addresses: dict[str, str]
) -> None:
    with rigs(addresses, "asked"):
        for host in ("rig-1", "rig-2", "rig-10"):
            expect(row(page, host, "asked").filter(has_text="● online")).to_have_count(1)
        page.get_by_text("Which agents can take a job now?").click()
        form = page.locator("#needs")
        form.get_by_label("Free VRAM, GiB").fill("50")
        form.locator("[name=pool_name]").fill("asked")
        form.get_by_role("button", name="Find").click()

        answer = page.locator("#answer")
        expect(answer).to_contain_text("1 agent can take this now")
        expect(answer.locator("table.offers tbody tr")).to_contain_text("rig-10")
        expect(answer).to_contain_text("too little free VRAM (best 40 of 50 on rig-2)")
        expect(answer.locator(".misses")).to_contain_text("not in pool asked")

        form.get_by_label("Free VRAM, GiB").fill("500")
        form.get_by_role("button", name="Find").click()
        expect(answer).to_contain_text("No agent can take this now.")
        assert "need.min_gpu_vram_gb=500" in page.url


def test_on_a_phone_agents_are_cards_that_fit(browser: Browser, addresses: dict[str, str]) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, color_scheme="dark", is_mobile=True
    )
    with context:
        page = context.new_page()
        watched = Watched(page)
        page.goto(addresses["http_url"])
        expect(row(page, os.uname().nodename)).to_contain_text("online")

        width = page.evaluate("document.documentElement.scrollWidth")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")

    assert width <= 390
    assert dark == "rgb(20, 24, 28)"
    assert watched.complaints == []


@contextmanager
def frozen(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Stop processes for as long as the context is open."""
    try:
        for process in processes:
            process.suspend()
        assert processes
        while {one.status() for one in processes} != {psutil.STATUS_STOPPED}:
            time.sleep(0.01)
        yield
    finally:
        for process in processes:
            process.resume()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("orchestrator", "We do not trust our own view now: no heartbeats are recorded"),
        ("postgres", "The gateway cannot reach the database. What is shown is what was known"),
    ],
)
def test_our_own_trouble_is_said_once_and_blames_no_agent(
    page: Page, up: Running, addresses: dict[str, str], part: str, words: str
) -> None:
    """Longer than a lease of 5 s, after which every agent looks silent."""
    with rigs(addresses, f"without-{part}", ["rig-2"]):
        page.locator("#filters").get_by_label("Search").fill(f"without-{part}")
        expect(row(page, "rig-2")).to_contain_text("● online")
        page.evaluate(
            "window.states = new Set(); setInterval(() => window.states.add("
            'document.querySelector("#agents td[data-state]")?.dataset.state), 50)'
        )
        processes = [one for one in up.children() if any(part in word for word in one.cmdline())]
        with frozen(processes):
            banner = page.locator(".banner:visible")
            expect(banner).to_have_count(1)
            expect(banner).to_contain_text(words)
            expect(banner).not_to_contain_text("Errno")
            expect(page.locator("body[data-stale]")).to_have_count(1)
            heard = row(page, "rig-2").locator("td[data-title=Heard]")
            expect(heard).to_have_text(re.compile(r"^\s*([89]|[1-9]\d)\D"))
            expect(row(page, "rig-2")).to_contain_text("● online")
            expect(page.locator("#counts")).not_to_contain_text("silent")

        expect(page.locator(".banner:visible").filter(has_text=words)).to_have_count(0)
        expect(page.locator("body[data-stale]")).to_have_count(0)
        expect(row(page, "rig-2")).to_contain_text("● online")
        assert page.evaluate("[...window.states]") == ["online"]


def test_what_is_reserved_is_not_shown_as_free(page: Page, addresses: dict[str, str]) -> None:
    with rigs(addresses, "held", ["rig-10"]):
        expect(row(page, "rig-10", "held")).to_contain_text("75.5 / 80.0 GiB")
        wanted = {"gpu_vram_gb": 50.0, "pool_name": "held"}
        who = {"holder": "a test", "idempotency_key": str(uuid4())}

        made = httpx.post(f"{addresses['http_url']}/api/v1/reservations", json={**who, **wanted})

        assert made.status_code == 201
        expect(row(page, "rig-10", "held")).to_contain_text("25.5 / 80.0 GiB")


def test_a_gateway_that_was_killed_is_come_back_to(
    watched: Watched, up: Running, addresses: dict[str, str]
) -> None:
    """A gateway starts again, and the page asks again after a pause."""
    page = watched.page
    expect(page.locator("#line")).to_contain_text("● live")
    [gateway] = [child for child in up.children() if "gateway" in child.cmdline()]

    gateway.kill()

    expect(page.locator("#line")).to_contain_text("○ reconnecting")
    expect(page.locator("#line")).to_contain_text("● live")
    expect(row(page, os.uname().nodename)).to_contain_text("● online")
    # A line that breaks is told by the browser itself; nothing else is.
    network = [one for one in watched.complaints if "net::ERR" in one]
    assert network == watched.complaints
    assert not psutil.pid_exists(gateway.pid)


def accessible_names(page: Page) -> list[Any]:
    """Return what has no name for those who do not see it."""
    return list(
        page.evaluate(
            """() => [...document.querySelectorAll("input, select, button, a, table")]
                .filter((one) => !(one.labels?.length || one.textContent.trim()
                    || one.getAttribute("aria-label")))
                .map((one) => one.outerHTML)"""
        )
    )


def test_every_control_has_a_name(page: Page) -> None:
    expect(row(page, os.uname().nodename)).to_be_visible()

    assert accessible_names(page) == []
