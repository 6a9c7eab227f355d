"""The tuner: it searches, verifies and measures, and leaves everything in the database.

``autofuse.tune`` (in ``api.py``) is the way in from Python; ``job.py`` holds the job itself.
"""
