"""Which addresses jobs may connect to; asked for each that a name stands for, right before it is dialled."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, List, Optional, Sequence, Tuple, Union

_Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]

Found = Tuple[socket.AddressFamily, socket.SocketKind, int, str, Tuple[Any, ...]]
"""What getaddrinfo says of one address."""

_NEVER = (
    ("0.0.0.0/8", "no address of a server"),
    ("169.254.0.0/16", "link-local"),
    ("224.0.0.0/4", "multicast"),
    ("255.255.255.255/32", "broadcast"),
    ("100.100.100.200/32", "a metadata service"),
    ("::/128", "no address of a server"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
    ("fd00:ec2::254/128", "a metadata service"),
    ("fd20:ce::254/128", "a metadata service"),
)
_EMBEDDING = [ipaddress.IPv6Network(network) for network in ("::/96", "64:ff9b::/96")]


class Policy:
    """The addresses that nobody needs and cloud services keep their secrets at, and the networks in `deny`."""

    def __init__(self, deny: Sequence[str]) -> None:
        self._networks = [(ipaddress.ip_network(text), reason) for text, reason in _NEVER]
        for text in deny:
            self._networks.append((ipaddress.ip_network(text), f"in {text}, which storage.http.deny_networks denies"))

    def objection(self, address: str) -> Optional[str]:
        """What is against an address in plain notation, as the end of "it is …"; None where nothing is."""
        for form in _forms(ipaddress.ip_address(address.partition("%")[0])):
            for network, reason in self._networks:
                if form.version == network.version and form in network:
                    return reason
        return None

    def objection_to(self, found: Sequence[Found]) -> Optional[str]:
        """A clause on the first of some addresses that is not allowed."""
        for *_, address in found:
            reason = self.objection(str(address[0]))
            if reason is not None:
                return f"{address[0]} is {reason}"
        return None


def literal(host: str, port: int) -> Sequence[Found]:
    """The address that `host` is, in any notation that the resolver takes (also 0xa9fea9fe); empty for a name."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        return []


def _forms(address: _Address) -> List[_Address]:
    """The address, and the IPv4 address in it that a gateway, or the kernel itself, would connect to."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    inside = [address.ipv4_mapped, address.sixtofour, address.teredo[1] if address.teredo else None]
    if any(address in network for network in _EMBEDDING) and int(address) > 0xFFFF:
        inside.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [address, *(form for form in inside if form is not None)]
