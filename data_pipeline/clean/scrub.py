"""Personal data that has a form: e-mail addresses, public IP addresses and telephone numbers.

What has no form (names, postal addresses) stays; a number that merely looks like one of these is
scrubbed with them. Addresses that are not public (192.168.x.x, ::1), being nobody's, stay, as in
FineWeb.
"""

import ipaddress
import re

EMAIL, IP, PHONE = "[EMAIL]", "[IP]", "[PHONE]"

# The local part is bounded (RFC 5321: 64 characters), so that a long run of letters costs linear time.
_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
# International: + and 8 to 15 digits (E.164), one by one, since groups would be tried in every way.
# North American: 3-3-4 with separators.
_PHONE = re.compile(
    r"(?<![\w+])(?:"
    r"\+\d{1,3}(?:[ .\-]?\(\d{1,4}\))?(?:[ .\-]?\d){4,14}"
    r"|(?:1[ .\-])?(?:\(\d{3}\)[ ]?|\d{3}[.\-])\d{3}[ .\-]\d{4}"
    r")(?![\w])"
)


def scrub(text: str) -> str:
    """The text with placeholders in place of e-mail addresses, IP addresses and telephone numbers."""
    if "@" in text:
        text = _EMAIL.sub(EMAIL, text)
    if "." in text:
        text = _IPV4.sub(_public, text)
    if "::" in text or text.count(":") >= 2:
        text = _IPV6.sub(_public, text)
    return _PHONE.sub(_phone, text)


def _public(match: re.Match[str]) -> str:
    try:
        return IP if ipaddress.ip_address(match.group()).is_global else match.group()
    except ValueError:
        return match.group()


def _phone(match: re.Match[str]) -> str:
    found = match.group()
    digits = sum(map(str.isdigit, found))
    return PHONE if digits <= 15 and digits >= (8 if found.startswith("+") else 10) else found
