"""What all tests with servers share."""

import asyncio
from collections.abc import AsyncIterator

import pytest


@pytest.fixture(autouse=True)
async def _the_libraries_tidy_up() -> AsyncIterator[None]:
    """Let aiormq close what a test cut off: cancelled with the loop, its tasks leave others."""
    yield
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=2)
