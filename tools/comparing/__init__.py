"""Comparisons: what is asked, what runs left, what seeds say, and the words for it."""
