"""Measuring a model: what it is compared with, and the numbers it is judged by."""
