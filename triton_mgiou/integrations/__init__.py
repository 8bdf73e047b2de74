"""Adapters for other frameworks. Each module imports its framework; nothing else imports them."""
