"""Numbers as people write them."""

from __future__ import annotations


def quantity(value: float) -> str:
    """Write a number with three significant digits and a suffix: 950, 38.9k, 1.25M, 512B, 1.2T."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999.95k would round to 1000k.
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Write a time as 4:05 (minutes and seconds), 1:02:03 (with hours) or 2d 03:04 (days, hours and minutes)."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
