"""Estimates of the memory and the traffic of a configuration, without its devices."""
