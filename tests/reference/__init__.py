"""Slow, obvious references in float64, written from public sources; nothing here touches the library under test."""
