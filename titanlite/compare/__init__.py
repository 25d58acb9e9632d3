"""Runs side by side: what differs in their configurations, how far apart their losses are, and if that is noise."""
