"""Thin client of talksplat: stream speech in, get the frames of a talking head back."""
