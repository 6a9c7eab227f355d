"""The database as one HTML page: ``gather`` reads it, ``html_page`` writes the page."""

from autofuse.report_page.content import Bucket, Curve, Report, gather
from autofuse.report_page.page import html_page

__all__ = ["Bucket", "Curve", "Report", "gather", "html_page"]
