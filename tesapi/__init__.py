"""A GA4GH TES 1.1 server: tasks in, containers run, files out."""

__version__ = "0.1.0"
