"""Searches for how much each group of targets loses, under one goal for the whole model."""
