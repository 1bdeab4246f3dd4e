"""Damage to files, drawn by hypothesis."""

from hypothesis import strategies as st


def bytes_changed(content: bytes, data) -> bytearray:
    """The content with one to three of its bytes changed."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    return changed
