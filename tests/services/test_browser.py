"""The pages as a person meets them, in a real browser without a network: Debian's chromium, driven by playwright."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.services.server import Server

ARTIFACTS = pathlib.Path(__file__).parents[2] / ".artifacts"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def page() -> Iterator[Page]:
    """A tab that reaches nothing but loopback; what it asked for elsewhere, and its complaints, fail the test."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        message = "needs a browser (apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    elsewhere: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 1600})
        page.set_default_timeout(20_000)
        page.on("request", lambda request: None if _is_here(request.url) else elsewhere.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        browser.close()
    assert elsewhere == []
    assert complaints == []


def _is_here(url: str) -> bool:
    return url.startswith(("http://localhost:", "http://127.0.0.1:", "data:", "blob:"))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_task_is_tried_out_from_the_docs_and_completes(server: Server, page: Page, host: str) -> None:
    page.goto(f"{server.url.replace('127.0.0.1', host)}/docs")
    create = page.locator("#operations-TaskService-CreateTask")
    create.locator(".opblock-summary-control").click()
    create.get_by_role("button", name="Try it out").click()
    assert "Hello from a task." in create.locator("textarea").input_value()
    create.get_by_role("button", name="Execute").click()
    answer = create.locator(".live-responses-table .response-col_description pre").first
    answer.wait_for()
    task_id = json.loads(answer.inner_text())["id"]
    assert server.wait_for(task_id) == "COMPLETE"

    get = page.locator("#operations-TaskService-GetTask")
    get.locator(".opblock-summary-control").click()
    get.get_by_role("button", name="Try it out").click()
    get.get_by_placeholder("id").fill(task_id)
    get.locator("select").first.select_option("FULL")
    get.get_by_role("button", name="Execute").click()
    answer = get.locator(".live-responses-table .response-col_description pre").first
    answer.wait_for()
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"docs-{host}.png", full_page=True)
    task = json.loads(answer.inner_text())
    assert task["state"] == "COMPLETE"
    assert task["logs"][0]["logs"][0]["stdout"] == "Hello from a task.\n"


def test_the_first_page_leads_to_the_docs(server: Server, page: Page) -> None:
    page.goto(server.url)
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "home.png")
    assert page.locator("h1").inner_text() == "tesapi"
    page.get_by_role("link", name="Try it out").click()
    page.locator("#operations-TaskService-CreateTask").wait_for()
    assert page.url == f"{server.url}/docs"
