"""What runs in kvpress's environment. Its modules import one another, the standard library, and what kvpress needs."""

from __future__ import annotations


class Refused(Exception):
    """A request that cannot be met; the message is for the user."""
