"""From image files to views on the training device. Imports nothing else of the project."""
