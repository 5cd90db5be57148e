"""RUN/report.html: a run on one page that needs nothing but a browser."""

from ossia.train.report.page import write_report

__all__ = ["write_report"]
