"""Structured logs: one JSON object a line on standard error."""

from __future__ import annotations

import datetime
import json
import logging
import sys

__all__ = ["configure", "get_logger"]


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(service: str, level: str = "INFO") -> None:
    """Send all logs of this process to standard error as JSON lines, ours at ``level``, libraries' from WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("mint", f"mint_{service}"):
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)


def get_logger(name: str) -> logging.Logger:
    """A logger below the name ``mint``; extra fields go by ``extra={"fields": {...}}``."""
    return logging.getLogger(f"mint.{name}")
