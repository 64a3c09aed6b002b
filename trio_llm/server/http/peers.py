"""Addresses of peers: whether one is a loopback address, and its name for limits."""

from __future__ import annotations

import ipaddress


def is_loopback(address: str) -> bool:
    """Return whether an address is a loopback address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def limited_name(address: str) -> str:
    """Return the name for an address's limits: for IPv6 its /64, as one host can use all addresses in it."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
