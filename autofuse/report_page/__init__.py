"""The database as one HTML page: ``gather`` reads it, ``html_page`` writes the page."""

from autofuse.report_page.content import Bucket, Curve, Report, gather
from autofuse.report_page.page import html_page
from autofuse.report_page.peers import Peers, load_peers

__all__ = ["Bucket", "Curve", "Peers", "Report", "gather", "html_page", "load_peers"]
