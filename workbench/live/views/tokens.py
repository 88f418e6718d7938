"""Token ids as something a person can read."""

NAMED = {0x20: "space", 0x0A: "\\n newline", 0x09: "\\t tab", 0x0D: "\\r return", 0x00: "NUL"}


def token_label(token: int, vocabulary: str | None) -> str:
    """The printable form of a token id: the character of a byte ("bytes"), its code in hexadecimal, or the bare id."""
    if vocabulary != "bytes":
        return f"#{token}"
    if token in NAMED:
        return NAMED[token]
    return chr(token) if 0x20 < token < 0x7F else f"0x{token:02X}"
