"""Log lines of chiffon's own processes: text for people, JSON for machines, on standard error.

Library modules only ask ``logging`` for a logger, so a program that embeds an agent or a planner
keeps its own logging. Text and JSON carry the same fields.
"""

import logging
import sys
import time
from typing import Literal

SAY_AGAIN_SECONDS = 60.0

LogFormat = Literal["text", "json"]


def configure(log_format: LogFormat, level: str) -> None:
    """Send every log record of this process to standard error, one line each.

    Args:
        log_format: ``text`` or ``json``.
        level: ``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``.
    """
    # structlog loads rich where it is installed; only processes that log pay for it.
    import structlog

    if log_format == "json":
        renderer: structlog.types.Processor = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *([structlog.processors.format_exc_info] if log_format == "json" else []),
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("chiffon").setLevel(level)
    _quiet_libraries()


def configure_for_command(level: str = "WARNING") -> None:
    """Send what a person at a command should know of to standard error, as ``chiffon: ...``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("chiffon: %(message)s"))
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger("chiffon").setLevel(level)
    _quiet_libraries()


class Trouble:
    """What goes wrong again and again, said when it is new, and once a minute while it lasts."""

    def __init__(self) -> None:
        self.said: str | None = None
        self._said_at = 0.0

    def is_news(self, trouble: str) -> bool:
        """Return whether to say it now."""
        now = time.monotonic()
        if trouble == self.said and now - self._said_at < SAY_AGAIN_SECONDS:
            return False
        self.said, self._said_at = trouble, now
        return True

    def is_over(self) -> bool:
        """Note that all is well; return whether it was not before."""
        before, self.said = self.said, None
        return before is not None


def _quiet_libraries() -> None:
    # The AMQP libraries log each failed dial at ERROR; ``amqp.reconnecting`` says it in one line.
    for name in ("aiormq", "aio_pika"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
