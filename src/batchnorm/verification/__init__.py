"""Checks of an installation on a device."""
